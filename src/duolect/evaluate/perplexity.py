"""Perplexity per label and per word, with intervals: how well a language model predicts a text, whatever its units."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from duolect.evaluate.bootstrap import DRAWS, Interval, percentiles
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


def perplexities(scored: Sequence[Scored], *, model: str, text: str, seed: int = 0) -> list[Perplexity]:
    """One for the whole text and, where it has more than one domain, one for each, in alphabetical order."""
    domains = sorted({x.domain for x in scored})
    groups = [("all", list(scored)), *((d, [x for x in scored if x.domain == d]) for d in domains if len(domains) > 1)]
    return [_perplexity(part, model, text, domain, seed) for domain, part in groups if part]


def _perplexity(scored: Sequence[Scored], model: str, text: str, domain: str, seed: int) -> Perplexity:
    nats, labels, words = (np.array([getattr(x, name) for x in scored], np.float64) for name in ("nats", "labels", "words"))

    def figure(count: np.ndarray) -> tuple[float, Interval | None]:
        if len(scored) < 2:
            return _exp(nats.sum() / count.sum()), None
        rng = np.random.default_rng(seed)
        drawn = []
        for at_once in np.diff(np.r_[0 : DRAWS : max(1, (1 << 22) // len(scored)), DRAWS]):  # a text may have millions of sentences
            rows = rng.integers(0, len(scored), size=(at_once, len(scored)))
            drawn.append(nats[rows].sum(1) / count[rows].sum(1))
        return _exp(nats.sum() / count.sum()), percentiles(np.exp(np.concatenate(drawn)))

    (by_label, by_label_interval), (by_word, by_word_interval) = figure(labels), figure(words)
    # The end of a sentence is a label and a word of its own, and says nothing of how words are cut.
    ratio = (labels.sum() - len(scored)) / max(1.0, words.sum() - len(scored))
    return Perplexity(model, text, domain, len(scored), float(ratio), by_label, by_label_interval, by_word, by_word_interval)


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf


def plain_rows(rows: Sequence[Perplexity]) -> str:
    """A table for a terminal."""
    head = ("model", "text", "domain", "sentences", "labels/word", "PPL/label", "95%", "PPL/word", "95%")
    body = [
        (
            r.model,
            r.text.rsplit("/", 1)[-1],
            r.domain,
            str(r.sentences),
            f"{r.labels_per_word:.2f}",
            f"{r.label_ppl:.2f}",
            str(r.label_interval or ""),
            f"{r.word_ppl:.1f}",
            f"[{r.word_interval.low:.1f}, {r.word_interval.high:.1f}]" if r.word_interval else "",
        )
        for r in rows
    ]
    return aligned([head, *body], left=3)


def json_rows(rows: Sequence[Perplexity]) -> list[dict[str, Any]]:
    """The rows as JSON values."""
    return [asdict(r) for r in rows]
