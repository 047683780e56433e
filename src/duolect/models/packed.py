"""Attention of packed new nodes over per-utterance key/value stores, inside the models of transformers.

A call adds a few nodes to some utterances and many to others. Padded to [G, n], most of a batch would be padding; so the nodes of all
utterances go through the model as one sequence of length P, and only inside attention are they laid out by utterance. transformers lets an
attention function be registered by name; outside `packing(...)` ours is plain sdpa.

Legend: G utterances, N nodes in the fullest store, P new nodes in all, n the most new nodes of one utterance.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin, EncoderDecoderCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "duolect_packed"


@dataclass(frozen=True)
class NewNodes:
    """The nodes that a call adds, packed: where each goes and what it sees."""

    labels: Tensor  # [P]
    positions: Tensor  # [P] how many nodes lie above
    group: Tensor  # [P]
    slot: Tensor  # [P] in the group's store
    rank: Tensor  # [P] number among the group's new nodes
    visible: Tensor  # [G, n, N] bool: ancestors and self

    @property
    def shape(self) -> tuple[int, int]:
        """(G, n)"""
        return self.visible.shape[0], self.visible.shape[1]

    def mask(self, dtype: torch.dtype) -> Tensor:
        """[G, 1, n, N] additive mask: 0 where visible, the least finite value elsewhere."""
        return torch.where(self.visible[:, None], 0.0, torch.finfo(dtype).min).to(dtype)


_current: ContextVar[NewNodes | None] = ContextVar("packing", default=None)


@contextmanager
def packing(new: NewNodes) -> Iterator[None]:
    """Inside, models that were prepared by `use_packed_attention` attend as the layout of `new` says."""
    token = _current.set(new)
    try:
        yield
    finally:
        _current.reset(token)


def run_packed(decoder: Any, new: NewNodes, cache: Cache, dtype: torch.dtype, **inputs: Any) -> Tensor:
    """[P, width] last hidden states of new nodes by a decoder of transformers, whose keys and values go to the cache."""
    options: dict[str, Any] = {"position_ids": new.positions[None], "past_key_values": cache, "use_cache": True}
    with packing(new):
        return decoder(attention_mask=new.mask(dtype), **options, **inputs).last_hidden_state[0]


def use_packed_attention(model: Any) -> None:
    """Lets a model of transformers run packed; its ordinary forwards stay what they were."""
    model.set_attn_implementation(NAME)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    new = _current.get()
    if new is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    # query [1, heads, P, size]; key and value are the stores already.
    options["is_causal"] = False
    out, _ = sdpa_attention_forward(module, _by_utterance(new, query), key, value, attention_mask, **options)
    return out[new.group, new.rank][None], None


def attend_packed(new: NewNodes, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """[1, heads, P, size] attention of new nodes' queries [1, heads, P, size] to stores [G, heads, N, size]; mask [G, 1, n or 1, N]."""
    out = torch.nn.functional.scaled_dot_product_attention(_by_utterance(new, query), key, value, attn_mask=mask)
    return out.transpose(1, 2)[new.group, new.rank].transpose(0, 1)[None]


def _by_utterance(new: NewNodes, query: Tensor) -> Tensor:
    """[G, heads, n, size] of queries [1, heads, P, size]."""
    spread = query.new_zeros(*new.shape, query.shape[1], query.shape[3])
    spread[new.group, new.rank] = query[0].transpose(0, 1)
    return spread.transpose(1, 2)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


class NodeLayer(CacheLayerMixin):
    """Keys and values [G, heads, N, head size] of one attention layer, written in place into a buffer that doubles."""

    def __init__(self) -> None:
        super().__init__()
        self.filled = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        groups = _new().shape[0]
        self.keys, self.values = (x.new_zeros(groups, x.shape[1], 0, x.shape[3]) for x in (key_states, value_states))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        new = _new()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        self.filled = new.visible.shape[2]
        if self.filled > self.keys.shape[2]:
            room = max(self.filled, 2 * self.keys.shape[2], 16)
            self.keys, self.values = (grown(x, 2, room) for x in (self.keys, self.values))
        self.keys[new.group, :, new.slot] = key_states[0].transpose(0, 1)
        self.values[new.group, :, new.slot] = value_states[0].transpose(0, 1)
        return self.keys[:, :, : self.filled], self.values[:, :, : self.filled]

    def fill(self, keys: Tensor, values: Tensor) -> None:
        """Takes whole stores [G, heads, N, head size], as of the audio that a decoder attends to."""
        self.keys, self.values, self.filled, self.is_initialized = keys, values, keys.shape[2], True

    def gather(self, groups: Tensor, slots: Tensor) -> NodeLayer:
        """A new layer of the nodes slots [G', N'] of groups [G']."""
        layer = NodeLayer()
        if self.is_initialized:
            assert self.keys is not None and self.values is not None
            keys, values = (x[groups[:, None], :, slots].transpose(1, 2).contiguous() for x in (self.keys, self.values))
            layer.fill(keys, values)
        return layer

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.filled + query_length, 0

    def get_seq_length(self) -> int:
        return self.filled

    def get_max_length(self) -> int:
        return -1


def node_cache(layers: int) -> Cache:
    """A cache of `layers` NodeLayers, as the attention modules of transformers take it."""
    return Cache(layers=[NodeLayer() for _ in range(layers)])


def bytes_per_position(config: Any, dtype: torch.dtype) -> int:
    """Bytes of the keys and values that a decoder of transformers, by its config, holds of one position, in all layers."""
    config = config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 2 * config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or heads) * size * dtype.itemsize


def gathered(cache: Cache, groups: Tensor, slots: Tensor) -> Cache:
    """A new cache of the nodes slots [G', N'] of groups [G']; what the groups attend to besides (audio) comes along whole."""
    if isinstance(cache, EncoderDecoderCache):
        own = gathered(cache.self_attention_cache, groups, slots)
        frames = torch.arange(cache.cross_attention_cache.get_seq_length(), device=groups.device)
        both = EncoderDecoderCache(own, gathered(cache.cross_attention_cache, groups, frames.expand(len(groups), -1)))
        both.is_updated = dict(cache.is_updated)
        return both
    return Cache(layers=[layer.gather(groups, slots) for layer in cache.layers if isinstance(layer, NodeLayer)])


def grown(x: Tensor, dim: int, size: int) -> Tensor:
    """x with `size` entries along dim, the new ones 0."""
    shape = list(x.shape)
    shape[dim] = size
    out = x.new_zeros(shape)
    out.narrow(dim, 0, x.shape[dim]).copy_(x)
    return out


def _new() -> NewNodes:
    new = _current.get()
    if new is None:
        raise RuntimeError("a store of nodes was used outside packing(...)")
    return new
