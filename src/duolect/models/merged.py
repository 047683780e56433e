"""Keys and values of audio by a language model's own layers, for attention=merged: what a layer would compute of such an input.

Legend: B utterances, T audio positions, W width, H heads, S head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from duolect.models import ModelError


def layers_of(llm: PreTrainedModel) -> Sequence[Any]:
    """The layers, as the families of transformers name them. Raises ModelError."""
    decoder: Any = llm.base_model
    found = getattr(decoder, "layers", None) or getattr(decoder, "h", None)
    if found is None:
        raise ModelError(f"{type(llm).__name__} has no list of layers that is known here: use attention=prefix")
    return found


def keys_values(llm: PreTrainedModel, audio: Tensor, positions: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Keys and values [B, H, T, S] of audio [B, T, W] at positions [B, T], layer by layer, by the layers' own norms and projections."""
    angles = _angles(llm, audio, positions)
    for layer in layers_of(llm):
        yield _key_value(layer, audio, angles)


@torch.no_grad()
def require_known_keys(llm: PreTrainedModel) -> None:
    """Raises ModelError where `keys_values` would not be what each layer itself computes of such inputs."""
    matrix: Any = llm.get_input_embeddings()
    x, cache, inputs = matrix.weight[None, :4], DynamicCache(), list[Tensor]()
    positions = torch.arange(3, 7, device=x.device)[None]
    hooks = [layer.register_forward_pre_hook(lambda _, heard: inputs.append(heard[0])) for layer in layers_of(llm)]
    llm.base_model(inputs_embeds=x, position_ids=positions, past_key_values=cache, use_cache=True)
    for hook in hooks:
        hook.remove()
    for layer, heard, made in zip(layers_of(llm), inputs, cache.layers, strict=True):
        own: Any = made
        try:
            pairs = zip(_key_value(layer, heard, _angles(llm, x, positions)), (own.keys, own.values), strict=True)
            known = all(float((ours - theirs).abs().max()) <= 0.01 * float(theirs.abs().max()) for ours, theirs in pairs)
        except (TypeError, AttributeError, RuntimeError):
            known = False
        if not known:
            raise ModelError(
                f"{type(llm).__name__} computes keys and values in a way that is not known here (partial or interleaved rotary "
                "embeddings, other norms): use attention=prefix or attention=cross"
            )


def _angles(llm: PreTrainedModel, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor] | None:
    turn: Any = getattr(llm.base_model, "rotary_emb", None)
    return None if turn is None else turn(x, position_ids=positions)


def _key_value(layer: Any, x: Tensor, angles: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Keys and values [B, H, T, S] that a layer would compute of its input x [B, T, W], keys turned by (cos, sin) [B, T, S]."""
    if (attention := getattr(layer, "self_attn", None)) is not None and hasattr(attention, "k_proj"):
        normed, size = layer.input_layernorm(x), attention.head_dim
        key, value = (proj(normed).unflatten(-1, (-1, size)) for proj in (attention.k_proj, attention.v_proj))
        norm = getattr(attention, "k_norm", None)
        key = key if norm is None else norm(key)
    elif (attention := getattr(layer, "attn", None)) is not None and hasattr(attention, "c_attn"):
        normed = layer.ln_1(x)
        _, key, value = (part.unflatten(-1, (attention.num_heads, -1)) for part in attention.c_attn(normed).chunk(3, -1))
    else:
        raise ModelError(f"{type(layer).__name__} has no key and value projections that are known here: use attention=prefix")
    key, value = key.transpose(1, 2), value.transpose(1, 2)
    if angles is not None:
        (a, b), (cos, sin) = key.chunk(2, -1), (x[:, None] for x in angles)
        key = key * cos + torch.cat([-b, a], -1) * sin
    return key, value
