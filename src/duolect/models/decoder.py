"""Causal decoders as Scorers: one implementation for language models, AED decoders and speech LLMs, over a trie of histories."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from duolect.models.cache import Trie
from duolect.models.packed import NewNodes
from duolect.scorer import Scorer
from duolect.vocabulary import Vocabulary

COMPACT_FROM = 512
"""Nodes per utterance from which dead histories are dropped, once less than half of the nodes is still in use."""

LOGITS_AT_ONCE = 2**24
"""Logits (rows x labels) computed in one piece, 64 MiB of fp32."""


@dataclass(frozen=True)
class Histories:
    """Rows of a trie: row r is the history that ends in node[r] of group[r]."""

    trie: Trie
    group: Tensor  # [R]
    node: Tensor  # [R]


@dataclass(frozen=True)
class OutputLayer:
    """logits = softcap(scale * (hidden @ weight.T + bias)), for the rows of the vocabulary only."""

    weight: Tensor  # [V, width]
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """[..., V] fp32 logits of hidden [..., width]."""
        return self._bent(torch.nn.functional.linear(hidden, self.weight, self.bias).float())

    def of(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """[R, C] fp32 logits of labels [R, C] alone behind hidden [R, width]: C rows of the matrix are read, not V."""
        logits = torch.einsum("rcw,rw->rc", self.weight[labels], hidden).float()
        return self._bent(logits if self.bias is None else logits + self.bias[labels].float())

    def _bent(self, logits: Tensor) -> Tensor:
        logits = logits * self.scale if self.scale != 1.0 else logits
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class DecoderScorer(Scorer[Histories]):
    """log p(labels | history [, audio]) by a causal decoder.

    What a subclass adds is how new nodes get their hidden states. Each distinct history is computed once per utterance; the softmax
    behind a history is normalized over the whole vocabulary once, when its first continuation is asked for.
    """

    output: OutputLayer
    vocabulary: Vocabulary

    @abstractmethod
    def _cache(self, rows: int) -> Cache:
        """The empty store of keys and values for `rows` utterances."""

    @abstractmethod
    def _prompts(self, rows: int) -> Sequence[Sequence[int]]:
        """The labels before the first real one (bos, task labels, audio) of each utterance; at least one each."""

    @abstractmethod
    def _hidden(self, trie: Trie, new: NewNodes) -> Tensor:
        """[P, width] last hidden states of the new nodes; their keys and values go to trie.cache."""

    @torch.no_grad()
    def start(self, rows: int) -> Histories:
        weight = self.output.weight
        trie = Trie.empty(rows, width=weight.shape[1], cache=self._cache(rows), device=weight.device, dtype=weight.dtype)
        group = torch.arange(rows, device=trie.label.device)
        prompts = [torch.tensor(x) for x in self._prompts(rows)]
        lengths = torch.tensor([len(x) for x in prompts], dtype=torch.long, device=group.device)
        padded = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True).to(group.device) if rows else group[:, None]
        behind, new = trie.extend(group, torch.full_like(group, -1), padded, lengths)
        if new is not None:
            trie.hidden[new.group, new.slot] = self._hidden(trie, new)
        return Histories(trie, group, behind[:, -1] if rows else group)

    @torch.no_grad()
    def log_probs(self, state: Histories, labels: Tensor | None = None) -> Tensor:
        if labels is not None:
            labels = labels.to(state.node.device)
            normalizer = self._normalizers(state.trie, state.group, state.node)
            return self.output.of(state.trie.hidden[state.group, state.node], labels) - normalizer[:, None]
        place, inverse = torch.unique(torch.stack([state.group, state.node]), dim=1, return_inverse=True)
        logits = self.output(state.trie.hidden[place[0], place[1]])
        state.trie.normalizer[place[0], place[1]] = normalizer = logits.logsumexp(-1)
        return (logits - normalizer[:, None])[inverse]

    @torch.no_grad()
    def advance(self, state: Histories, labels: Tensor, lengths: Tensor) -> tuple[Tensor, Histories]:
        if labels.shape[1] == 0 or not bool((lengths > 0).any()):
            return torch.zeros(len(lengths), device=state.node.device), state
        labels, lengths = labels.to(state.node.device), lengths.to(state.node.device)
        trie, group, node = self._room(state)
        behind, new = trie.extend(group, node, labels, lengths)
        if new is not None:
            g, slot = new.group, new.slot
            trie.hidden[g, slot] = self._hidden(trie, new)
            parent = trie.parent[g, slot]
            normalizer = self._normalizers(trie, g, parent)
            logit = self.output.of(trie.hidden[g, parent], trie.label[g, slot][:, None])[:, 0]
            trie.log_prob[g, slot] = logit - normalizer
        real = torch.arange(labels.shape[1], device=labels.device)[None] < lengths[:, None]
        score = torch.where(real, trie.log_prob[group[:, None], behind], 0.0).sum(1)
        return score, Histories(trie, group, behind[:, -1])

    @torch.no_grad()
    def finish(self, state: Histories) -> Tensor:
        eos = torch.full((len(state.node), 1), self.vocabulary.eos, device=state.node.device)
        return self.log_probs(state, eos)[:, 0]

    def select(self, state: Histories, rows: Tensor) -> Histories:
        rows = rows.to(state.node.device)
        return Histories(state.trie, state.group[rows], state.node[rows])

    def _room(self, state: Histories) -> tuple[Trie, Tensor, Tensor]:
        # Histories that left the beam would widen every later attention; dropping them copies the store, so only when it halves it.
        trie = state.trie
        if trie.size >= COMPACT_FROM and 2 * int(trie.live(state.group, state.node).sum(1).max()) < trie.size:
            return trie.compact(state.group, state.node)
        return trie, state.group, state.node

    def _normalizers(self, trie: Trie, group: Tensor, node: Tensor) -> Tensor:
        missing = trie.normalizer[group, node].isnan()
        if bool(missing.any()):
            place = torch.unique(torch.stack([group[missing], node[missing]]), dim=1)
            for g, n in zip(*(x.split(max(1, LOGITS_AT_ONCE // self.vocabulary.size)) for x in place), strict=True):
                trie.normalizer[g, n] = self.output(trie.hidden[g, n]).logsumexp(-1)
        return trie.normalizer[group, node]
