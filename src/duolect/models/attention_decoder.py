"""The decoder of an attention encoder-decoder as the paper's baseline has it (paper.md 1.5), whole for training and packed for search.

Legend: B utterances, L labels of a history (bos included), T frames, V labels, D width, H heads, S head size, P new nodes of a call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import EncoderDecoderCache

from duolect.models.conformer import TimeDropout, heads_of, sinusoids
from duolect.models.encoders import Encoded, frame_mask, require_layers
from duolect.models.packed import NewNodes, attend_packed

IGNORE = -100
"""Stands in targets where there is nothing to predict."""


@dataclass(frozen=True)
class DecoderDims:
    """The size of a decoder; aux: layers (from 1) with an output of their own, for training."""

    dim: int = 1024
    layers: int = 6
    heads: int = 8
    dropout: float = 0.1
    attention_dropout: float = 0.1
    aux: tuple[int, ...] = (3,)

    @classmethod
    def of(cls, *, layers: int, dim: int, **others: Any) -> DecoderDims:
        """The dims of a depth and a width, an auxiliary output halfway; `others` are fields as they are."""
        return cls(**{"layers": layers, "dim": dim, "heads": heads_of(dim), "aux": (layers // 2,) if layers > 1 else (), **others})


@dataclass(frozen=True)
class Decoded:
    """logits [B, L, V] fp32 of the label after each of a history, and those of the auxiliary outputs by layer."""

    logits: Tensor
    aux: Mapping[int, Tensor]


@dataclass(frozen=True)
class _Looks:
    """How a forward attends: own(layer, query, key, value) to the history, heard(layer, query) to the audio; [B, H, L, S] all."""

    own: Callable[[int, Tensor, Tensor, Tensor], Tensor]
    heard: Callable[[int, Tensor], Tensor]


class AttentionDecoder(nn.Module):
    """Embedding times sqrt(D) plus sinusoidal positions, layers, RMS norm, and the embedding matrix again as output."""

    def __init__(self, dims: DecoderDims, *, labels: int, encoder_dim: int) -> None:
        super().__init__()
        if dims.dim % (2 * dims.heads):
            raise ValueError(f"a decoder of dim {dims.dim} and {dims.heads} heads cannot be built: dim must be a multiple of 2 * heads")
        require_layers(dims.aux, dims.layers)
        self.dims = dims
        self.embedding = nn.Embedding(labels, dims.dim)
        nn.init.normal_(self.embedding.weight, std=dims.dim**-0.5)
        self.dropout = TimeDropout(dims.dropout)
        self.layers = nn.ModuleList(_Layer(dims, encoder_dim) for _ in range(dims.layers))
        self.norm = _norm(dims.dim)
        self.aux = nn.ModuleDict({str(n): nn.Sequential(_norm(dims.dim), _copied(self.embedding)) for n in dims.aux})

    def forward(self, history: Tensor, encoded: Encoded) -> Decoded:
        """The logits behind each label of histories [B, L] that begin with bos; what follows a history's end changes nothing before it."""
        chance = self.dims.attention_dropout if self.training else 0.0
        heard, mask = self.heard(encoded.frames), frame_mask(encoded.lengths, encoded.frames.shape[1])[:, None, None]
        looks = _Looks(
            lambda i, q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=chance),
            lambda i, q: F.scaled_dot_product_attention(q, *heard[i], attn_mask=mask, dropout_p=chance),
        )
        hidden, between = self._run(history, torch.arange(history.shape[1], device=history.device)[None], looks)
        logits = F.linear(hidden, self.embedding.weight).float()
        return Decoded(logits, {int(n): output(between[int(n)]).float() for n, output in self.aux.items()})

    def heard(self, frames: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values [B, H, T, S] of frames [B, T, encoder dim], layer by layer: all that a decoder needs of the audio."""
        return [layer.heard(frames) for layer in self.layers]  # pyright: ignore[reportCallIssue]

    def packed(self, new: NewNodes, cache: EncoderDecoderCache, frames: Tensor) -> Tensor:
        """[P, D] what is behind new nodes of a trie with this cache; frames [G, 1, 1, T] bool, those of each group that are real."""
        stores: Any = cache.self_attention_cache.layers
        audio: Any = cache.cross_attention_cache.layers
        visible = new.mask(self.embedding.weight.dtype)

        def own(i: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            keys, values = stores[i].update(key, value)
            return attend_packed(new, query, keys, values, visible)

        looks = _Looks(own, lambda i, query: attend_packed(new, query, audio[i].keys, audio[i].values, frames))
        return self._run(new.labels[None], new.positions[None], looks)[0][0]

    def _run(self, labels: Tensor, positions: Tensor, looks: _Looks) -> tuple[Tensor, dict[int, Tensor]]:
        x = self.embedding(labels) * math.sqrt(self.dims.dim)
        x = self.dropout(x + sinusoids(positions, self.dims.dim).to(x.dtype))
        turn = sinusoids(positions, self.dims.dim // self.dims.heads)[:, None]
        between = {}
        for i, layer in enumerate(self.layers):
            x = between[i + 1] = layer(x, i, turn, looks)
        return self.norm(x), between


class _Layer(nn.Module):
    """Self-attention, attention to the audio, SwiGLU feed-forward (arXiv 2002.05202); each pre-norm and residual."""

    def __init__(self, dims: DecoderDims, encoder_dim: int) -> None:
        super().__init__()
        dim, inner = dims.dim, 256 * math.ceil(8 * dims.dim / 3 / 256)
        self.heads = dims.heads
        self.norms = nn.ModuleList(_norm(dim) for _ in range(3))
        self.own, self.own_out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.query, self.key_value, self.out = nn.Linear(dim, dim), nn.Linear(encoder_dim, 2 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 2 * inner, bias=False), nn.Linear(inner, dim, bias=False)
        self.dropout = TimeDropout(dims.dropout)

    def heard(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        key, value = self._heads(self.key_value(frames), 2)
        return key.contiguous(), value.contiguous()

    def forward(self, x: Tensor, number: int, turn: Tensor, looks: _Looks) -> Tensor:
        q, k, v = self._heads(self.own(self.norms[0](x)), 3)
        y = looks.own(number, turned(q, turn), turned(k, turn), v)
        x = x + self.dropout(self.own_out(y.transpose(1, 2).flatten(2)))
        (q,) = self._heads(self.query(self.norms[1](x)), 1)
        x = x + self.dropout(self.out(looks.heard(number, q).transpose(1, 2).flatten(2)))
        gate, up = self.up(self.norms[2](x)).chunk(2, -1)
        return x + self.dropout(self.down(self.dropout(F.silu(gate) * up)))

    def _heads(self, x: Tensor, parts: int) -> list[Tensor]:
        """[B, L, parts * D] as so many [B, H, L, S]."""
        return [part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in x.chunk(parts, -1)]


def turned(x: Tensor, turn: Tensor) -> Tensor:
    """x [B, H, L, S] with its pairs (s, s + S/2) turned by the angles whose sines and cosines are turn [B, 1, L, S] (RoPE, 2104.09864)."""
    (sin, cos), (a, b) = turn.chunk(2, -1), x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def histories(labels: Tensor, sizes: Tensor, *, bos: int, eos: int) -> tuple[Tensor, Tensor]:
    """(bos and labels, labels and eos) [B, L + 1] of labels [B, L], sizes [B]; targets past the eos are IGNORE."""
    place = torch.arange(labels.shape[1] + 1, device=labels.device)[None]
    targets = F.pad(labels, (0, 1)).masked_fill(place == sizes[:, None], eos).masked_fill(place > sizes[:, None], IGNORE)
    return F.pad(labels, (1, 0), value=bos).masked_fill(place > sizes[:, None], eos), targets


def smoothed_cross_entropy(logits: Tensor, labels: Tensor, *, smoothing: float = 0.1) -> Tensor:
    """Sum over labels [...] (not IGNORE) of -log p(label) for logits [..., V]: its value is plain, its gradient that of smoothed targets.

    The gradient is that of -sum_v q(v) log p(v) with q = 1 - smoothing for the label and smoothing / (V - 1) for each other one.
    """
    logits, size = logits.float(), logits.shape[-1]
    real = labels != IGNORE
    normalizer = logits.logsumexp(-1)
    right = logits.gather(-1, labels.clamp(min=0)[..., None])[..., 0] - normalizer
    wrong = logits.sum(-1) - size * normalizer - right
    smoothed = -(1 - smoothing) * right - smoothing / (size - 1) * wrong
    return torch.where(real, smoothed + (-right - smoothed).detach(), 0.0).sum()


def _copied(embedding: nn.Embedding) -> nn.Linear:
    """An output layer that begins as the embedding matrix and then goes its own way."""
    labels, dim = embedding.weight.shape
    linear = nn.Linear(dim, labels, bias=False)
    linear.load_state_dict(embedding.state_dict())
    return linear


def _norm(dim: int) -> nn.RMSNorm:
    return nn.RMSNorm(dim, eps=1e-6)
