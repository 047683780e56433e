"""Scale tuning: the scales of a log-linear combination that make the fewest word errors on n-best lists, and how sure they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from duolect.evaluate.bootstrap import Interval, percentiles, rate_interval
from duolect.evaluate.nbest import NBestLists, corpus_digest
from duolect.evaluate.surface import Floats, Ints, Range, Surface, surface_of
from duolect.run import source, write_json

_SWEEPS = 20
_SCATTERED = 1_500  # probes where a grid would be too big
_PROBED = {1: 201, 2: 41, 3: 11}  # free scales -> steps a side of the probing grid


class ScalesError(ValueError):
    """A scales file cannot be read, or does not fit; the message names file and field."""


@dataclass(frozen=True, eq=False)
class Probes:
    """WER [P] at scales [P, D] (columns as in `names`) spread over the whole ranges: the surface, for a picture."""

    names: tuple[str, ...]
    scales: Floats
    wer: Floats


@dataclass(frozen=True)
class Tuned:
    """The scales found and what they are worth; WERs in percent.

    scales: absolute, the reference part's (1.0) first. interval: of `wer`, 95%, utterances drawn. scale_intervals: of the best scales,
    when the utterances are drawn anew. cross_validated: the WER when each fold is decoded with scales tuned on the others, which is what
    to expect elsewhere; `wer` itself is flattered. None for fewer than two utterances. first, oracle: of the first and of the best
    hypothesis in each list. alone: with the reference part only. at_edge: scales that lie at a bound of their range other than 0.
    """

    scales: Mapping[str, float]
    scale_intervals: Mapping[str, Interval | None]
    errors: int
    words: int
    wer: float
    interval: Interval | None
    cross_validated: float | None
    cross_validated_interval: Interval | None
    first: float
    oracle: float
    alone: float
    at_edge: tuple[str, ...]
    impossible: int
    failed: tuple[str, ...]
    probes: Probes
    corpus: str
    digest: str
    utterances: int
    signature: str


@dataclass(frozen=True)
class Scales:
    """A scales file. digest: of the corpus the scales were tuned on."""

    scales: Mapping[str, float]
    corpus: str
    digest: str
    utterances: int
    wer: float | None
    signature: str


def tune(
    lists: NBestLists,
    *,
    reference: str,
    free: Mapping[str, Range],
    folds: int = 5,
    draws: int = 1_000,
    seed: int = 0,
) -> Tuned:
    """The best scales of the parts in `free`, that of `reference` being 1.0.

    Coordinate by coordinate, each exactly (Och, ACL 2003), from the best of some 1,500 points spread over the ranges. (Gridding the box of
    the best points anew, as RWTH's scale tuning does it, fits the lists a little better and held-out ones a little worse.) ValueError for
    parts the lists lack, a relative range without its base, nothing to tune.
    """
    if not free or not len(lists):
        raise ValueError("there is nothing to tune: " + ("no free scale" if not free else "no utterance"))
    search = _Search.of(lists, reference=reference, free=free, seed=seed)
    everyone = np.ones(len(lists), np.int64)
    found = search.best(everyone)
    wrong = search.surface.utterance_errors(found)
    held_out = _held_out(search, folds=folds, seed=seed) if len(lists) > 1 else None
    words, total_words = lists.words, int(lists.words.sum())
    numbers = {reference: 1.0, **dict(zip(free, search.surface.scales(found[None])[0].tolist(), strict=True))}
    zero = search.surface.utterance_errors(np.zeros(len(free)))
    return Tuned(
        scales=numbers,
        scale_intervals=_scale_intervals(search, draws=draws, seed=seed),
        errors=int(wrong.sum()), words=total_words, wer=_percent(wrong, words), interval=rate_interval(wrong, words, seed=seed),
        cross_validated=None if held_out is None else _percent(held_out, words),
        cross_validated_interval=None if held_out is None else rate_interval(held_out, words, seed=seed),
        first=_percent(lists.first, words), oracle=_percent(lists.oracle, words), alone=_percent(zero, words),
        at_edge=_at_edge(free, found),
        impossible=lists.impossible, failed=lists.failed,
        probes=Probes(tuple(free), search.surface.scales(search.probes), 100.0 * search.probed_totals(everyone) / max(1, total_words)),
        corpus=lists.corpus, digest=lists.digest, utterances=len(lists),
        signature=f"{lists.signature}|tune:line|seed:{seed}|duolect:{source()}",
    )  # fmt: skip


def write_scales(path: str | Path, *, tuned: Tuned) -> None:
    """Writes scales.json: the scales, what they were tuned on and what they gave there."""

    def pair(interval: Interval | None) -> list[float] | None:
        return [round(interval.low, 6), round(interval.high, 6)] if interval else None

    write_json(path, {
        "scales": dict(tuned.scales),
        "scale_intervals": {k: pair(v) for k, v in tuned.scale_intervals.items()},
        "parts": list(tuned.scales),
        "tuned_on": {"corpus": tuned.corpus, "digest": tuned.digest, "utterances": tuned.utterances},
        "wer": tuned.wer, "interval": pair(tuned.interval),
        "cross_validated": tuned.cross_validated, "cross_validated_interval": pair(tuned.cross_validated_interval),
        "first": tuned.first, "oracle": tuned.oracle, "alone": tuned.alone,
        "signature": tuned.signature,
    })  # fmt: skip


def read_scales(path: str | Path) -> Scales:
    """The scales of a scales.json; a file with nothing but {"scales": {...}}, written by hand, will do. ScalesError else."""
    try:
        data: Any = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ScalesError(f"{path}: no scales file ({error}); `duolect tune` writes one") from error
    scales = data.get("scales") if isinstance(data, dict) else None
    if not isinstance(scales, dict) or not scales:
        raise ScalesError(f'{path}: expected {{"scales": {{"ctc": 1.0, "llm": 0.4}}, ...}}')
    for name, value in scales.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not np.isfinite(value):
            raise ScalesError(f"{path}: scale {name!r} is {value!r}, expected a finite number")
    on = data.get("tuned_on") or {}
    return Scales(
        {k: float(v) for k, v in scales.items()},
        on.get("corpus", ""),
        on.get("digest", ""),
        on.get("utterances", 0),
        data.get("wer"),
        data.get("signature", ""),
    )


def same_corpus_warning(scales: Scales, *, references: Mapping[str, str]) -> str | None:
    """A sentence of warning if the scales were tuned on the very utterances (id -> raw reference) that are decoded with them, else None."""
    if not scales.digest or scales.digest != corpus_digest(references):
        return None
    return (
        f"the scales were tuned on these same {scales.utterances} utterances{f' ({scales.corpus})' if scales.corpus else ''}, "
        "so this WER flatters them: report the cross-validated WER of the scales file, or decode another corpus"
    )


@dataclass(frozen=True, eq=False)
class _Search:
    """One search for the best numbers x [D], to be run for any selection of the utterances.

    probes [P, D]: spread over the ranges, where every search begins; probed [P, A] their errors.
    """

    surface: Surface
    probes: Floats
    probed: NDArray[np.float32]

    @classmethod
    def of(cls, lists: NBestLists, *, reference: str, free: Mapping[str, Range], seed: int) -> _Search:
        low, high = np.array([r.low for r in free.values()]), np.array([r.high for r in free.values()])
        surface = surface_of(lists, reference=reference, free=free)
        if side := _PROBED.get(len(free)):
            probes = _gridded(low, high, side)
        else:
            probes = np.random.default_rng(seed).uniform(low, high, (_SCATTERED, len(free)))
        return cls(surface, probes, surface.errors(probes))

    def probed_totals(self, weights: Ints) -> Ints:
        return self.surface.weighted(self.probed, weights)

    def best(self, weights: Ints) -> Floats:
        """[D] the numbers with the fewest errors over the utterances, each counted weights [N] times."""
        totals = self.probed_totals(weights)
        low, high = (np.array([getattr(r, side) for r in self.surface.ranges]) for side in ("low", "high"))
        point, least = _middle(self.probes[totals == totals.min()], high - low).copy(), int(totals.min())
        since = 0  # lines since the last gain: a whole round without one is the end
        for step in range(_SWEEPS * len(point)):
            d = step % len(point)
            line = self.surface.line(point, coordinate=d, low=low[d], high=high[d], weights=weights)
            point[d], total = line.best()
            since, least = (0 if total < least else since + 1), total
            if since == len(point):
                break
        return point


def _gridded(low: Floats, high: Floats, steps: int) -> Floats:
    """[steps ** D, D] points of a regular grid, the last number varying fastest."""
    axes = [np.linspace(a, b, steps) for a, b in zip(low, high, strict=True)]
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(low))


def _middle(points: Floats, span: Floats) -> Floats:
    """The one of equally good points [P, D] nearest to their mean; of equally near ones the smallest."""
    unit = points / np.where(span > 0, span, 1.0)
    away = np.round(((unit - unit.mean(axis=0)) ** 2).sum(axis=1), 12)
    return points[np.lexsort((np.round(np.abs(unit).sum(axis=1), 12), away))[0]]


def _held_out(search: _Search, *, folds: int, seed: int) -> Ints:
    """[N] errors of each utterance at scales tuned without its fold."""
    count = len(search.surface.settled)
    fold = np.random.default_rng(seed).permutation(count) % min(folds, count)
    errors = np.zeros(count, np.int64)
    for k in range(int(fold.max()) + 1):
        found = search.best((fold != k).astype(np.int64))
        errors[fold == k] = search.surface.utterance_errors(found)[fold == k]
    return errors


def _scale_intervals(search: _Search, *, draws: int, seed: int) -> dict[str, Interval | None]:
    """95% intervals of the best probe when utterances are drawn with replacement; of equally good ones the mean."""
    count, rows = len(search.surface.settled), search.surface.rows
    if count < 2:
        return dict.fromkeys(search.surface.names)
    rng = np.random.default_rng(seed)
    scales = search.surface.scales(search.probes)
    found = []
    for start in range(0, draws, 100):
        drawn = rng.integers(0, count, size=(min(100, draws - start), count))
        times = np.stack([np.bincount(one, minlength=count)[rows] for one in drawn]).astype(np.float32)
        totals = times @ search.probed.T
        least = (totals == totals.min(axis=1, keepdims=True)).astype(np.float64)
        found.append(least @ scales / least.sum(axis=1, keepdims=True))
    best = np.concatenate(found)
    return {name: percentiles(best[:, d]) for d, name in enumerate(search.surface.names)}


def _at_edge(free: Mapping[str, Range], found: Floats) -> tuple[str, ...]:
    near = []
    for (name, span), value in zip(free.items(), found, strict=True):
        margin = (span.high - span.low) / 40
        if span.low < span.high and any(bound != 0 and abs(value - bound) <= margin for bound in (span.low, span.high)):
            near.append(name)
    return tuple(near)


def _percent(errors: Ints, words: Ints) -> float:
    total = int(words.sum())
    return 100.0 * int(errors.sum()) / total if total else 0.0
