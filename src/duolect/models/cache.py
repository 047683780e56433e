"""A trie of label histories with one key/value store per utterance: what a causal decoder has computed, and never computes twice.

Every history that a search or an n-best list asks for is a path from the root; a row of a state is the index of a node. Selecting rows
copies indices only, equal histories are one node, and a prefix (prompt, audio) is held once per utterance whatever the beam. Nodes are
only ever added, so a state taken earlier stays valid: it is a value although the store behind it grows.

Legend: G groups (utterances), N nodes of the fullest group, P new nodes of a call, R rows, S labels of a call, D depth.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from duolect.models.packed import NewNodes, gathered, grown


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
    fill: Tensor  # [G] how many nodes the group has
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
        return cls(
            ints(), ints(), ints(), ints()[..., None], floats, floats.clone(), hidden, ints().sum(1), cache, utterance, index, index.clone()
        )

    @property
    def groups(self) -> int:
        return self.label.shape[0]

    @property
    def size(self) -> int:
        """Nodes of the fullest group."""
        return int(self.fill.max()) if self.groups else 0

    def extend(self, group: Tensor, node: Tensor, labels: Tensor, lengths: Tensor) -> tuple[Tensor, NewNodes | None]:
        """([R, S] the node behind each label, NewNodes or None where all were known) for chunks labels [R, S] below nodes node [R].

        Past a row's length its last node repeats. The new nodes' hidden states, keys and log-probs are the caller's to fill in.
        """
        before, steps = self.fill.clone(), labels.shape[1]
        if len(group):
            asked = torch.zeros_like(before).index_add(0, group, lengths)
            deepest = int(torch.where(node < 0, -1, self.depth[group, node.clamp(min=0)]).max()) + 1 + steps if self.size else steps
            self._reserve(int((before + asked).max()), deepest=deepest)
        behind = torch.empty_like(labels)
        for s in range(steps):
            active = (lengths > s).nonzero()[:, 0]
            node = node.clone()
            if len(active):
                node[active] = self._children(group[active], node[active], labels[active, s])
            behind[:, s] = node
        return behind, self._new(before) if bool((self.fill > before).any()) else None

    def _children(self, group: Tensor, node: Tensor, label: Tensor) -> Tensor:
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
        slot = self.fill[g] + torch.arange(len(g), device=g.device) - torch.searchsorted(g, g)
        self.fill = self.fill.index_add(0, g, torch.ones_like(g))
        depth = torch.where(p < 0, 0, self.depth[g, p.clamp(min=0)] + 1)
        self.label[g, slot], self.parent[g, slot], self.depth[g, slot] = y, p, depth
        self.path[g, slot] = torch.where((p < 0)[:, None], -1, self.path[g, p.clamp(min=0)])
        self.path[g, slot, depth] = slot
        self.normalizer[g, slot] = torch.nan
        self.keys, order = torch.sort(torch.cat([self.keys, fresh]))
        self.nodes = torch.cat([self.nodes, slot])[order]
        child[missing] = slot[inverse]
        return child

    def _new(self, before: Tensor) -> NewNodes:
        count = self.fill - before
        place = torch.arange(int(count.max()), device=count.device)
        group, rank = (place[None] < count[:, None]).nonzero(as_tuple=True)
        slot = before[group] + rank
        path, size = self.path[group, slot], self.size
        seen = torch.zeros(len(group), size + 1, dtype=torch.bool, device=count.device)
        seen.scatter_(1, torch.where(path < 0, size, path), True)  # the extra column swallows the -1s
        visible = torch.zeros(self.groups, len(place), size, dtype=torch.bool, device=count.device)
        visible[group, rank] = seen[:, :-1]
        return NewNodes(self.label[group, slot], self.depth[group, slot], group, slot, rank, visible)

    def _key(self, group: Tensor, node: Tensor, label: Tensor) -> Tensor:
        # 12 bits of group would be plenty; 2^20 nodes and 2^22 labels leave 21 bits for it.
        return (group << 42) | ((node + 1) << 22) | label

    def _reserve(self, nodes: int, *, deepest: int) -> None:
        if nodes > self.label.shape[1]:
            room = max(nodes, 2 * self.size, 16)
            for name in ("label", "parent", "depth", "path", "log_prob", "normalizer", "hidden"):
                setattr(self, name, grown(getattr(self, name), 1, room))
        if deepest > self.path.shape[2]:
            wider = grown(self.path, 2, max(deepest, 2 * self.path.shape[2]))
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
        trie = Trie(
            self.label[k, slots],
            parent,
            self.depth[k, slots],
            path,
            self.log_prob[k, slots],
            self.normalizer[k, slots],
            self.hidden[k, slots],
            count,
            gathered(self.cache, kept, slots),
            self.utterance[kept],
        )
        g, slot = real.nonzero(as_tuple=True)
        keys = trie._key(g, parent[g, slot], trie.label[g, slot])
        trie.keys, order = torch.sort(keys)
        trie.nodes = slot[order]
        return trie, new_group[group], number[new_group[group], node]
