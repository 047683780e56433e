"""A trie of label histories with one key/value store per utterance: what a causal decoder has computed, and never computes twice.

Every history that a search or an n-best list asks for is a path from the root; a row of a state is the index of a node. Selecting rows
copies indices only, equal histories are one node, and a prefix (prompt, audio) is held once per utterance whatever the beam. Nodes are
only ever added, so a state taken earlier stays valid: it is a value although the store behind it grows.

Legend: G groups (utterances), N nodes so far, n new nodes of a call (the most any group has), R rows, S labels of a call, D depth.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, EncoderDecoderCache


class NodeLayer(CacheLayerMixin):
    """Keys and values [G, heads, N, head size] of one attention layer, in place in a buffer that doubles: no copy per call."""

    def __init__(self) -> None:
        super().__init__()
        self.filled = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys = key_states.new_empty(*key_states.shape[:2], 0, key_states.shape[3])
        self.values = value_states.new_empty(*value_states.shape[:2], 0, value_states.shape[3])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        end = self.filled + key_states.shape[2]
        if end > self.keys.shape[2]:
            self.keys, self.values = (_grown(x, 2, max(end, 2 * self.filled, 16)) for x in (self.keys, self.values))
        self.keys[:, :, self.filled : end] = key_states
        self.values[:, :, self.filled : end] = value_states
        self.filled = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def gather(self, groups: Tensor, slots: Tensor) -> NodeLayer:
        """A new layer of the nodes slots [G', N'] of groups [G']."""
        layer = NodeLayer()
        if self.is_initialized:
            assert self.keys is not None and self.values is not None
            layer.keys = self.keys[groups[:, None], :, slots].transpose(1, 2).contiguous()
            layer.values = self.values[groups[:, None], :, slots].transpose(1, 2).contiguous()
            layer.filled, layer.is_initialized = slots.shape[1], True
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


@dataclass(frozen=True)
class NewNodes:
    """What a call to `Trie.extend` added, in slots first .. first+n-1 of every group (padding slots are nobody's ancestor)."""

    labels: Tensor  # [G, n]
    positions: Tensor  # [G, n] how many nodes lie above
    visible: Tensor  # [G, n, N + n] bool: ancestors and self; a padding slot sees itself alone
    real: Tensor  # [G, n] bool
    first: int


@dataclass
class Trie:
    """The nodes: their labels, parents, depths, paths, and the log-probability of each label given what lies above it."""

    label: Tensor  # [G, N]
    parent: Tensor  # [G, N], -1 at the root
    depth: Tensor  # [G, N]
    path: Tensor  # [G, N, D] the node's ancestors in order, itself last, then -1
    log_prob: Tensor  # [G, N] fp32 log p(label | parent)
    normalizer: Tensor  # [G, N] fp32 log-sum-exp of the logits behind the node, NaN until somebody asks
    hidden: Tensor  # [G, N, width] the decoder's last hidden state
    size: int
    cache: Cache
    utterance: Tensor  # [G] which row of `start` the group belongs to
    keys: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))  # sorted (group, parent, label) of all nodes ...
    nodes: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))  # ... and their slots

    @classmethod
    def empty(cls, groups: int, *, width: int, cache: Cache, device: torch.device, dtype: torch.dtype) -> Trie:
        def ints() -> Tensor:
            return torch.zeros(groups, 0, dtype=torch.long, device=device)

        floats = torch.zeros(groups, 0, device=device)
        index = torch.empty(0, dtype=torch.long, device=device)
        hidden = torch.zeros(groups, 0, width, device=device, dtype=dtype)
        utterance = torch.arange(groups, device=device)
        return cls(ints(), ints(), ints(), ints()[..., None], floats, floats.clone(), hidden, 0, cache, utterance, index, index.clone())

    @property
    def groups(self) -> int:
        return self.label.shape[0]

    def extend(self, group: Tensor, node: Tensor, labels: Tensor, lengths: Tensor) -> tuple[Tensor, NewNodes | None]:
        """([R, S] the node behind each label, NewNodes or None where all were known) for chunks labels [R, S] below nodes node [R].

        Past a row's length its last node repeats. The new nodes' hidden states, keys and log-probs are the caller's to fill in.
        """
        first, steps = self.size, labels.shape[1]
        most = int(torch.zeros(self.groups, dtype=torch.long, device=node.device).index_add(0, group, lengths).max()) if len(group) else 0
        self._reserve(first + most, deepest=int(self.depth[group, node.clamp(min=0)].max()) + 1 + steps if self.size else steps)
        fill = torch.full((self.groups,), first, dtype=torch.long, device=node.device)
        behind = torch.empty_like(labels)
        for s in range(steps):
            active = (lengths > s).nonzero()[:, 0]
            node = node.clone()
            if len(active):
                node[active] = self._children(group[active], node[active], labels[active, s], fill)
            behind[:, s] = node
        n = int(fill.max()) - first
        if n == 0:
            return behind, None
        self.size = first + n
        return behind, self._new(first, n, fill)

    def _children(self, group: Tensor, node: Tensor, label: Tensor, fill: Tensor) -> Tensor:
        key = self._key(group, node, label)
        child = torch.full_like(node, -1)
        if len(self.keys):
            at = torch.searchsorted(self.keys, key).clamp(max=len(self.keys) - 1)
            child = torch.where(self.keys[at] == key, self.nodes[at], child)
        missing = (child < 0).nonzero()[:, 0]
        if not len(missing):
            return child
        fresh, inverse = torch.unique(key[missing], return_inverse=True)
        rows = torch.zeros(len(fresh), dtype=torch.long, device=key.device).scatter(0, inverse, missing)  # one representative each
        g, p, y = group[rows], node[rows], label[rows]
        # `fresh` is sorted by group first, so a node's rank within its group is its distance from the group's first.
        slot = fill[g] + torch.arange(len(g), device=g.device) - torch.searchsorted(g, g)
        fill.index_add_(0, g, torch.ones_like(g))
        depth = torch.where(p < 0, 0, self.depth[g, p.clamp(min=0)] + 1)
        self.label[g, slot], self.parent[g, slot], self.depth[g, slot] = y, p, depth
        self.path[g, slot] = torch.where((p < 0)[:, None], -1, self.path[g, p.clamp(min=0)])
        self.path[g, slot, depth] = slot
        self.normalizer[g, slot] = torch.nan
        self.keys, order = torch.sort(torch.cat([self.keys, fresh]))
        self.nodes = torch.cat([self.nodes, slot])[order]
        child[missing] = slot[inverse]
        return child

    def _new(self, first: int, n: int, fill: Tensor) -> NewNodes:
        slots = slice(first, first + n)
        own = torch.arange(first, first + n, device=fill.device)
        real = own[None] < fill[:, None]
        visible = torch.zeros(self.groups, n, first + n + 1, dtype=torch.bool, device=fill.device)
        path = torch.where(real[..., None], self.path[:, slots], -1)
        visible.scatter_(2, torch.where(path < 0, first + n, path), True)  # the extra column swallows the -1s
        visible = visible[..., :-1]
        visible[:, torch.arange(n, device=fill.device), own] = True
        return NewNodes(torch.where(real, self.label[:, slots], 0), torch.where(real, self.depth[:, slots], 0), visible, real, first)

    def _key(self, group: Tensor, node: Tensor, label: Tensor) -> Tensor:
        # 12 bits of group would be plenty; 2^20 nodes and 2^22 labels leave 21 bits for it.
        return (group << 42) | ((node + 1) << 22) | label

    def _reserve(self, nodes: int, *, deepest: int) -> None:
        if nodes > self.label.shape[1]:
            room = max(nodes, 2 * self.size, 16)
            for name in ("label", "parent", "depth", "path", "log_prob", "normalizer", "hidden"):
                setattr(self, name, _grown(getattr(self, name), 1, room))
        if deepest > self.path.shape[2]:
            wider = _grown(self.path, 2, max(deepest, 2 * self.path.shape[2]))
            wider[..., self.path.shape[2] :] = -1
            self.path = wider

    def live(self, group: Tensor, node: Tensor) -> Tensor:
        """[G, N] bool: the nodes on the paths to the given ones."""
        mask = torch.zeros(self.groups, self.size + 1, dtype=torch.bool, device=node.device)
        path = self.path[group, node]
        mask[group[:, None], torch.where(path < 0, self.size, path)] = True
        return mask[:, :-1]

    def compact(self, group: Tensor, node: Tensor) -> tuple[Trie, Tensor, Tensor]:
        """(a trie of the paths to the given rows alone, the rows' groups in it, their nodes in it); this one is left as it is."""
        live = self.live(group, node)
        kept = live.any(1).nonzero()[:, 0]
        live = live[kept]
        count = live.sum(1)
        slots = torch.argsort(~live, dim=1, stable=True)[:, : int(count.max())]  # the live ones in order, so parents stay before children
        number = live.cumsum(1) - 1
        number = torch.where(live, number, -1)
        new_group = torch.full((self.groups,), -1, dtype=torch.long, device=node.device)
        new_group[kept] = torch.arange(len(kept), device=node.device)
        k = kept[:, None]
        real = torch.arange(slots.shape[1], device=node.device)[None] < count[:, None]

        def moved(x: Tensor, index: Tensor) -> Tensor:
            old = x[k, index]
            rows = torch.arange(len(kept), device=x.device).view(-1, *[1] * (old.dim() - 1)).expand_as(old)
            return torch.where(old < 0, -1, number[rows, old.clamp(min=0)])

        parent, path = moved(self.parent, slots), moved(self.path, slots)
        trie = Trie(self.label[k, slots], parent, self.depth[k, slots], path, self.log_prob[k, slots], self.normalizer[k, slots],
                    self.hidden[k, slots], slots.shape[1], _gathered(self.cache, kept, slots), self.utterance[kept])
        g, slot = real.nonzero(as_tuple=True)
        keys = trie._key(g, parent[g, slot], trie.label[g, slot])
        trie.keys, order = torch.sort(keys)
        trie.nodes = slot[order]
        return trie, new_group[group], number[new_group[group], node]


def _gathered(cache: Cache, groups: Tensor, slots: Tensor) -> Cache:
    if isinstance(cache, EncoderDecoderCache):
        own = _gathered(cache.self_attention_cache, groups, slots)
        frames = cache.cross_attention_cache.layers[0].get_seq_length()
        every = torch.arange(frames, device=groups.device).expand(len(groups), -1)
        both = EncoderDecoderCache(own, _gathered(cache.cross_attention_cache, groups, every))
        both.is_updated = dict(cache.is_updated)
        return both
    return Cache(layers=[layer.gather(groups, slots) for layer in cache.layers if isinstance(layer, NodeLayer)])


def _grown(x: Tensor, dim: int, size: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] = size
    out = x.new_zeros(shape)
    out.narrow(dim, 0, x.shape[dim]).copy_(x)
    return out
