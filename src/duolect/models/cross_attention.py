"""Attention layers to audio that are added to a language model of transformers, in front of its own layers.

Legend: B utterances, L positions, T audio positions, W width, H heads, S head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from duolect.models.packed import NewNodes, attend_packed


class CrossAttention(nn.Module):
    """Multi-head attention of hidden states to audio, added through a gate that is shut at first, so that the model starts as it was."""

    def __init__(self, width: int, heads: int, number: int) -> None:
        super().__init__()
        self.heads, self.number = heads, number
        self.norm, self.query, self.out = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)
        self.key_value, self.gate = nn.Linear(width, 2 * width), nn.Parameter(torch.zeros(1))

    def heard(self, audio: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, T, S] of audio [B, T, W]."""
        key, value = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in self.key_value(audio).chunk(2, -1))
        return key, value

    def before(self, layer: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What a layer of the language model is called with instead; without audio, the model is what it was."""
        heard: Heard | None = options.pop("heard", None)
        if heard is None:
            return arguments, options
        x = arguments[0]
        query = self.query(self.norm(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = heard.keys_values[self.number]
        if heard.new is None:
            y = F.scaled_dot_product_attention(query, key, value, attn_mask=heard.mask)
        else:
            y = attend_packed(heard.new, query, key, value, heard.mask)
        return (x + self.gate.tanh() * self.out(y.transpose(1, 2).flatten(2)), *arguments[1:]), options


@dataclass(frozen=True)
class Heard:
    """What added layers attend to: keys and values [B, H, T, S] by layer, mask [B, 1, 1, T] of real ones; new: where the call is packed."""

    keys_values: Sequence[tuple[Tensor, Tensor]]
    mask: Tensor
    new: NewNodes | None = None
