"""Rescoring: what another scorer says of finished hypotheses. Shared beginnings of a list are scored once (a trie inside the scorer)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from duolect.scorer import Hypothesis, Scorer
from duolect.search.fusion import SearchError, TextPolicy
from duolect.vocabulary import Vocabulary

LabelsOf = Callable[[Hypothesis], Sequence[int]]
"""A hypothesis in the scorer's labels."""


def own_labels(hypothesis: Hypothesis) -> Sequence[int]:
    """The labels the search found, for a scorer of the same vocabulary."""
    if hypothesis.text and not hypothesis.labels:
        raise SearchError(
            f"hypothesis {hypothesis.text[:40]!r} has no labels, so a scorer of the acoustic model's vocabulary cannot score it"
        )
    return hypothesis.labels


def labels_of_text(vocabulary: Vocabulary, *, policy: TextPolicy | None = None, begun: bool = False) -> LabelsOf:
    """Hypotheses as labels of another vocabulary, word by word: what `Retokenized` would have passed on; as a whole where it could not."""
    policy = policy or TextPolicy()

    def labels(hypothesis: Hypothesis) -> Sequence[int]:
        if vocabulary.word_joint == "none":
            return vocabulary.encode((" " if begun else "") + policy.text(hypothesis.text))
        out: list[int] = []
        for word in policy.words(hypothesis.text):
            if written := policy(word, first=not out and not begun):
                out += vocabulary.encode_word(written, first=not out and not begun)
        return out + (vocabulary.encode(policy.end) if policy.end else [])

    return labels


def labels_for(
    vocabulary: Vocabulary, hypotheses: Sequence[Hypothesis], *, policy: TextPolicy | None = None, begun: bool = False
) -> LabelsOf:
    """`own_labels` where the hypotheses' labels spell their text in this vocabulary, else `labels_of_text`."""

    def spells(h: Hypothesis) -> bool:
        return all(0 <= y < vocabulary.size for y in h.labels) and vocabulary.decode(h.labels) == h.text

    labelled = [h for h in hypotheses[:200] if h.text]
    same = bool(labelled) and all(h.labels and spells(h) for h in labelled)
    return own_labels if same else labels_of_text(vocabulary, policy=policy, begun=begun)


def rescored(nbest: Sequence[Sequence[Hypothesis]], *, name: str, scorer: Scorer[Any], labels: LabelsOf) -> list[list[Hypothesis]]:
    """The same lists with the part `name`: log p(labels eos) of each hypothesis. One list per utterance, in the scorer's order of rows."""
    found = label_scores(scorer, [[labels(h) for h in hypotheses] for hypotheses in nbest])
    return [[replace(h, parts={**h.parts, name: score}) for h, score in zip(*pair, strict=True)] for pair in zip(nbest, found, strict=True)]


def label_scores(scorer: Scorer[Any], lists: Sequence[Sequence[Sequence[int]]]) -> list[list[float]]:
    """log p(labels eos) of each label sequence of each utterance, in the scorer's order of rows."""
    state = scorer.start(len(lists))
    rows = torch.tensor([b for b, sequences in enumerate(lists) for _ in sequences], dtype=torch.long)
    if not len(rows):
        return [[] for _ in lists]
    chunks = [torch.tensor(list(x), dtype=torch.long) for sequences in lists for x in sequences]
    lengths = torch.tensor([len(c) for c in chunks])
    padded = torch.nn.utils.rnn.pad_sequence(chunks, batch_first=True)
    score, state = scorer.advance(scorer.select(state, rows), padded, lengths)
    total = iter((score + scorer.finish(state)).tolist())
    return [[next(total) for _ in sequences] for sequences in lists]


def text_scores(scorer: Scorer[Any], texts: Sequence[str], *, begun: bool = False) -> list[tuple[float, int]]:
    """(log p(text eos), its labels, eos included) of each text as the scorer's vocabulary writes it; begun: text precedes it."""
    labels = [scorer.vocabulary.encode((" " if begun else "") + text) for text in texts]
    return [(score, len(x) + 1) for (score,), x in zip(label_scores(scorer, [[x] for x in labels]), labels, strict=True)]


def ranked(hypotheses: Sequence[Hypothesis], scales: Mapping[str, float]) -> list[Hypothesis]:
    """Best first under the scales; equal scores keep their order. SearchError where a scale names a part that is not there."""
    for h in hypotheses[:1]:
        missing = [name for name in scales if name not in h.parts]
        if missing:
            raise SearchError(
                f"there is a scale for {', '.join(missing)}, but the hypotheses have only {', '.join(h.parts)}: rescore them first"
            )
    used = {name: scale for name, scale in scales.items() if scale != 0}
    return sorted(hypotheses, key=lambda h: -h.score(used))
