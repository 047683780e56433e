"""Perplexity per label and per word, with intervals: how well a language model predicts a text, whatever its units."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from duolect.evaluate.bootstrap import Interval, percentiles, resampled_sums
from duolect.evaluate.table import aligned


@dataclass(frozen=True)
class Scored:
    """A sentence: -log p in nats, and the labels and words that this is of; its end is one of each."""

    domain: str
    nats: float
    labels: int
    words: int


@dataclass(frozen=True)
class Perplexity:
    """exp(nats / labels) and exp(nats / words) of a text or one domain of it; intervals: 95%, sentences drawn with replacement."""

    model: str
    text: str
    domain: str
    sentences: int
    labels_per_word: float
    label_ppl: float
    label_interval: Interval | None
    word_ppl: float
    word_interval: Interval | None


def perplexities(scored: Sequence[Scored], *, model: str, text: str) -> list[Perplexity]:
    """One for the whole text and, where it has more than one domain, one for each, in alphabetical order."""
    domains = sorted({x.domain for x in scored})
    parts = {d: [x for x in scored if x.domain == d] for d in domains} if len(domains) > 1 else {}
    return [_perplexity(part, model, text, domain) for domain, part in {"all": scored, **parts}.items()]


def _perplexity(scored: Sequence[Scored], model: str, text: str, domain: str) -> Perplexity:
    numbers = np.array([(x.nats, x.labels, x.words) for x in scored], np.float64)
    nats, labels, words = numbers.sum(axis=0)
    intervals: list[Interval | None] = [None, None]
    if len(scored) > 1:
        drawn = resampled_sums(numbers)
        intervals = [percentiles(np.exp(drawn[:, 0] / drawn[:, column])) for column in (1, 2)]
    # The end of a sentence is a label and a word of its own, and says nothing of how words are cut.
    ratio = float((labels - len(scored)) / max(1.0, words - len(scored)))
    return Perplexity(model, text, domain, len(scored), ratio, _exp(nats / labels), intervals[0], _exp(nats / words), intervals[1])


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def plain_rows(rows: Sequence[Perplexity]) -> str:
    """A table for a terminal."""
    head = ("model", "text", "domain", "sentences", "labels/word", "PPL/label", "95%", "PPL/word", "95%")
    body = []
    for r in rows:
        of_words = f"[{r.word_interval.low:.1f}, {r.word_interval.high:.1f}]" if r.word_interval else ""
        names = (r.model, r.text.rsplit("/", 1)[-1], r.domain, str(r.sentences), f"{r.labels_per_word:.2f}")
        body.append((*names, f"{r.label_ppl:.2f}", str(r.label_interval or ""), f"{r.word_ppl:.1f}", of_words))
    return aligned([head, *body], left=3)
