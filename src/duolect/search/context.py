"""Context: phrases that the user expects (names, terms) are rewarded as they are spelled, whole words only, whatever labels spell them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from duolect.scorer import Scorer
from duolect.search.fusion import SPACED, SearchError
from duolect.vocabulary import Vocabulary

KEPT = 256
"""Nodes of which it is remembered what every label gains."""

NOTHING, SPACE, OTHER = 0, 1, 2
"""Letters' numbers: behind the end of a label's text, between words, in no phrase."""


def plain(text: str) -> str:
    """A text as phrases are looked for in it: in lower case, punctuation but the apostrophe parting words."""
    return text.lower().translate(SPACED)


class ContextScorer(Scorer[Tensor]):
    """The bonus of the phrases in a text: for each occurrence, in whole words, its weight (nats a letter) times its letters.

    It is given letter by letter (a cost only when the phrase is whole) and taken back where a word goes on otherwise: a search is led
    through a phrase, and a finished text has the sum over its occurrences exactly. An Aho-Corasick automaton over letters: any segmentation
    of a phrase into labels counts, and a state [R] is a node. Letters that a label writes only in part (bytes) are in no phrase.
    """

    def __init__(self, phrases: Mapping[str, float], vocabulary: Vocabulary) -> None:
        weights: dict[str, float] = {}
        for phrase, weight in phrases.items():
            if key := " ".join(plain(phrase).split()):
                weights[f" {key} "] = weight
        if not weights:
            raise SearchError("there is no phrase with a letter in it: give --context a file of one phrase a line, or phrases")
        self.vocabulary = vocabulary
        written = [plain(text) for text in vocabulary.label_texts]
        letters = {c: i for i, c in enumerate(sorted({c for key in weights for c in key} - {" "}), start=OTHER + 1)} | {" ": SPACE}
        texts = [torch.tensor([letters.get(c, OTHER) for c in text], dtype=torch.long) for text in written]
        self.letters = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=NOTHING)  # [V, letters]
        self.unwritable = sorted(key.strip() for key in weights if set(key) - {" "} - {c for text in written for c in text})
        self.next, self.gain, self.end, self.reward = _automaton(weights, letters)
        sizes = (self.letters != NOTHING).sum(1)
        self._longest_first = sizes.argsort(descending=True)
        self._writing = [int((sizes > i).sum()) for i in range(self.letters.shape[1])]
        self._known: dict[int, Tensor] = {}

    def start(self, rows: int) -> Tensor:
        return torch.full((rows,), int(self.next[0, SPACE]))

    def log_probs(self, state: Tensor, labels: Tensor | None = None) -> Tensor:
        nodes, row = state.unique(return_inverse=True)
        gained = self._every_label(nodes.tolist())[row]
        return gained if labels is None else gained.gather(1, labels.cpu())

    def _every_label(self, nodes: Sequence[int]) -> Tensor:
        """[N, V] what each label gains from some nodes; those of a search's hypotheses are few, and come again and again."""
        known = self._known
        if new := [node for node in nodes if node not in known]:
            at = torch.tensor(new)[:, None].expand(-1, self.vocabulary.size).clone()
            gained = torch.zeros(at.shape)
            for column, count in zip(self.letters[self._longest_first].unbind(1), self._writing, strict=True):
                here, letter = at[:, :count], column[:count]  # of the labels that have so many letters
                gained[:, :count] += self.gain[here, letter]
                at[:, :count] = self.next[here, letter]
            gained[:, self._longest_first] = gained.clone()
            gained[:, self.vocabulary.eos] = self.end[new]
            known.update((node, row.clone()) for node, row in zip(new, gained, strict=True))  # views would keep all rows
        found = torch.stack([known[node] for node in nodes]) if nodes else torch.zeros(0, self.vocabulary.size)
        for node in list(known)[: max(0, len(known) - KEPT)]:
            del known[node]
        return found

    def advance(self, state: Tensor, labels: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        real = torch.arange(labels.shape[1]) < lengths.cpu()[:, None]
        spelled = torch.where(real[..., None], self.letters[labels.cpu()], NOTHING)
        return self._walk(state, spelled.flatten(1))

    def finish(self, state: Tensor) -> Tensor:
        return self.end[state]

    def select(self, state: Tensor, rows: Tensor) -> Tensor:
        return state[rows.cpu()]

    def _walk(self, node: Tensor, letters: Tensor) -> tuple[Tensor, Tensor]:
        """(bonus gained, node behind) the letters [..., L] from nodes of the other shape."""
        gained = torch.zeros(node.shape)
        for letter in letters.unbind(-1):
            gained += self.gain[node, letter]
            node = self.next[node, letter]
        return gained, node


def _automaton(weights: Mapping[str, float], letters: Mapping[str, int]) -> tuple[Tensor, Tensor, Tensor, float]:
    """(next node [N, letters], what that step gains [N, letters], what the end of the text gains [N], the most that the phrases ending at
    one place can win); node 0 has seen nothing."""
    children: list[dict[int, int]] = [{}]
    complete, hope, spaced = [0.0], [0.0], [False]
    for phrase, weight in weights.items():
        node, seen = 0, 0
        for place, c in enumerate(phrase):
            if (letter := letters[c]) not in children[node]:
                children[node][letter] = len(children)
                children.append({})
                complete.append(0.0)
                hope.append(0.0)
                spaced.append(c == " ")
            node, seen = children[node][letter], seen + (c != " ")
            if place < len(phrase) - 1:
                hope[node] = max(hope[node], weight * seen)  # lent until the phrase is whole; what is unwanted costs nothing before it is
        complete[node] += weight * seen
    nodes, fail = len(children), [0] * len(children)
    after = torch.zeros(nodes, max(letters.values()) + 1, dtype=torch.long)
    order = [0]
    for node in order:  # breadth first: the longest proper end of a node that is a node, too, comes before it
        if node:
            after[node] = after[fail[node]]
            complete[node] += complete[fail[node]]
            hope[node] = hope[node] if children[node] else hope[fail[node]]
        for letter, child in children[node].items():
            fail[child] = int(after[node, letter]) if node else 0
            after[node, letter] = child
            order.append(child)
    lent, whole = torch.tensor(hope), torch.tensor(complete)
    gain = whole[after] + lent[after] - lent[:, None]
    stays = torch.zeros_like(after, dtype=torch.bool)
    stays[:, NOTHING] = True
    stays[:, SPACE] = torch.tensor(spaced)  # spaces in a row are one
    after = torch.where(stays, torch.arange(nodes)[:, None], after)
    gain = torch.where(stays, 0.0, gain)
    return after, gain, gain[:, SPACE] - lent[after[:, SPACE]], float(whole.max().clamp(min=0))
