"""Scale tuning: the scales of a log-linear combination that make the fewest word errors on n-best lists, and how sure they are."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from duolect.evaluate.bootstrap import Interval, percentiles, rate_interval
from duolect.evaluate.nbest import NBestLists, corpus_digest
from duolect.evaluate.surface import Floats, Ints, Range, Surface, surface_of
from duolect.run import progress_bar, source, write_json

Method = Literal["line", "grid"]

_SWEEPS = 20
_STEPS, _ROUNDS = 21, 10  # of the paper's grid
_SCATTERED = 1_500  # probes where a grid would be too big
_PROBED = {1: 201, 2: 41, 3: 11}  # free scales -> steps a side of the probing grid


class ScalesError(ValueError):
    """A scales file cannot be read, or does not fit; the message names file and field."""


@dataclass(frozen=True, eq=False)
class Probes:
    """WER [P] at scales [P, D] (columns as in `names`) spread over the whole ranges: the surface, for a picture.

    as_good [P]: not significantly worse than the optimum, i.e. 0 lies in the 95% interval of the difference (paired bootstrap).
    """

    names: tuple[str, ...]
    scales: Floats
    wer: Floats
    as_good: NDArray[np.bool_]


@dataclass(frozen=True)
class Group:
    """What scales of its own are worth to a part of the utterances; WERs in percent.

    wer: at its own best scales, fitted to these very utterances; common: at the scales of all. held_out, held_out_common: each fold
    decoded with scales tuned without it, on the rest of the group or of all. gain: held_out - held_out_common, negative where scales of
    its own are better, with its 95% interval (paired bootstrap). None for fewer than two utterances.
    """

    scales: Mapping[str, float]
    utterances: int
    words: int
    wer: float
    common: float
    held_out: float | None
    held_out_common: float | None
    gain: float | None
    gain_interval: Interval | None


@dataclass(frozen=True)
class Tuned:
    """The scales found and what they are worth; WERs in percent.

    scales: absolute, the reference part's (1.0) first. interval: of `wer`, 95%, utterances drawn. scale_intervals: of the best scales,
    when the utterances are drawn anew. cross_validated: the WER when each fold is decoded with scales tuned on the others, which is what
    to expect elsewhere; `wer` itself is flattered. None for fewer than two utterances. first, oracle: of the first and of the best
    hypothesis in each list. alone: with the reference part only. at_edge: scales that lie at a bound of their range other than 0.
    as_good: between which scales the optimum and the probes lie that are not significantly worse (not all combinations in between are so).
    groups: the parts of the corpus that were asked for, by name.
    """

    scales: Mapping[str, float]
    scale_intervals: Mapping[str, Interval | None]
    as_good: Mapping[str, Interval]
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
    groups: Mapping[str, Group] = field(default_factory=dict)


@dataclass(frozen=True)
class Scales:
    """A scales file. digest: of the corpus the scales were tuned on."""

    scales: Mapping[str, float]
    corpus: str
    digest: str
    utterances: int


def tune(
    lists: NBestLists,
    *,
    reference: str,
    free: Mapping[str, Range],
    search: Method = "line",
    groups: Sequence[str] | None = None,
    folds: int = 5,
    draws: int = 1_000,
    seed: int = 0,
    progress: bool = False,
) -> Tuned:
    """The best scales of the parts in `free`, that of `reference` being 1.0.

    search: `line`, coordinate by coordinate, each exactly (Och, ACL 2003), from the best of some 1,500 points spread over the ranges; or
    `grid`, RWTH's (paper.md 2.8), which grids the box of the best points anew and needs no more than the errors at points. groups: a name
    per utterance, each tuned on its own too. draws: of the intervals of scales. ValueError where there is nothing to tune.
    """
    if not free or not len(lists):
        raise ValueError("there is nothing to tune: " + ("no free scale" if not free else "no utterance"))
    if not (total_words := int(lists.words.sum())):
        raise ValueError("there is nothing to tune: no reference has a word")
    places = {} if groups is None else {name: np.flatnonzero(np.array(groups) == name) for name in sorted(set(groups))}
    sizes = [len(lists), *map(len, places.values())]
    with progress_bar(total=sum(1 + _folds(n, folds) for n in sizes), desc="searches", unit="", disable=not progress) as bar:
        searching = _Search.of(lists, reference=reference, free=free, seed=seed, method=search, done=bar.update)
        everyone = np.ones(len(lists), np.int64)
        found = searching.best(everyone)
        wrong = searching.surface.utterance_errors(found)
        held_out = _held_out(searching, folds=folds, seed=seed)
        intervals, as_good = _resampled(searching, found, draws=draws, seed=seed)
        parts = {}
        for name, rows in places.items():
            own = _Search.of(lists.of(rows), reference=reference, free=free, seed=seed, method=search, done=bar.update)
            common = wrong[rows], None if held_out is None else held_out[rows]
            parts[name] = _group(own, lists.words[rows], common, reference=reference, folds=folds, seed=seed)
    words, zero = lists.words, searching.surface.utterance_errors(np.zeros(len(free)))
    kept = np.concatenate([searching.scales[as_good], searching.surface.scales(found[None])])
    near = kept.min(axis=0).tolist(), kept.max(axis=0).tolist()
    probes = Probes(tuple(free), searching.scales, 100.0 * searching.probed_totals(everyone) / total_words, as_good)
    return Tuned(
        scales=searching.named(found, reference), scale_intervals=intervals, as_good=dict(zip(free, map(Interval, *near), strict=True)),
        errors=int(wrong.sum()), words=total_words, wer=_percent(wrong, words), interval=rate_interval(wrong, words, seed=seed),
        cross_validated=None if held_out is None else _percent(held_out, words),
        cross_validated_interval=None if held_out is None else rate_interval(held_out, words, seed=seed),
        first=_percent(lists.first, words), oracle=_percent(lists.oracle, words), alone=_percent(zero, words),
        at_edge=_at_edge(free, found),
        impossible=lists.impossible, failed=lists.failed, probes=probes,
        corpus=lists.corpus, digest=lists.digest, utterances=len(lists),
        signature=f"{lists.signature}|tune:{search}|seed:{seed}|duolect:{source()}", groups=parts,
    )  # fmt: skip


def write_scales(path: str | Path, *, tuned: Tuned, by: str = "") -> None:
    """Writes scales.json: the scales, what they were tuned on and what they gave there. by: what its groups were made of."""

    def pair(interval: Interval | None) -> list[float] | None:
        return [round(interval.low, 6), round(interval.high, 6)] if interval else None

    write_json(path, {
        "scales": dict(tuned.scales),
        "scale_intervals": {k: pair(v) for k, v in tuned.scale_intervals.items()},
        "as_good": {k: pair(v) for k, v in tuned.as_good.items()},
        "parts": list(tuned.scales),
        "tuned_on": {"corpus": tuned.corpus, "digest": tuned.digest, "utterances": tuned.utterances},
        "wer": tuned.wer, "interval": pair(tuned.interval),
        "cross_validated": tuned.cross_validated, "cross_validated_interval": pair(tuned.cross_validated_interval),
        "first": tuned.first, "oracle": tuned.oracle, "alone": tuned.alone,
        "signature": tuned.signature,
        **({"by": {by: {name: {**asdict(g), "gain_interval": pair(g.gain_interval)} for name, g in tuned.groups.items()}}} if by else {}),
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
        if not isinstance(value, (int, float)) or not np.isfinite(value):
            raise ScalesError(f"{path}: scale {name!r} is {value!r}, expected a finite number")
    on = data.get("tuned_on") or {}
    return Scales({k: float(v) for k, v in scales.items()}, on.get("corpus", ""), on.get("digest", ""), on.get("utterances", 0))


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

    probes [P, D]: spread over the ranges, where a line search begins; probed [P, A] their errors. low, high [D]. done: told of each search.
    """

    surface: Surface
    method: Method
    low: Floats
    high: Floats
    probes: Floats
    probed: NDArray[np.float32]
    done: Callable[[], object]

    @classmethod
    def of(
        cls, lists: NBestLists, *, reference: str, free: Mapping[str, Range], seed: int, method: Method, done: Callable[[], object]
    ) -> _Search:
        low, high = np.array([r.low for r in free.values()]), np.array([r.high for r in free.values()])
        surface = surface_of(lists, reference=reference, free=free)
        if side := _PROBED.get(len(free)):
            probes = _gridded(low, high, side)
        else:
            probes = np.random.default_rng(seed).uniform(low, high, (_SCATTERED, len(free)))
        return cls(surface, method, low, high, probes, surface.errors(probes), done)

    @property
    def scales(self) -> Floats:
        return self.surface.scales(self.probes)

    def named(self, point: Floats, reference: str) -> dict[str, float]:
        return {reference: 1.0, **dict(zip(self.surface.names, self.surface.scales(point[None])[0].tolist(), strict=True))}

    def totals(self, points: Floats, weights: Ints) -> Ints:
        return self.surface.weighted(self.surface.errors(points), weights)

    def probed_totals(self, weights: Ints) -> Ints:
        return self.surface.weighted(self.probed, weights)

    def best(self, weights: Ints) -> Floats:
        """[D] the numbers with the fewest errors over the utterances, each counted weights [N] times."""
        totals = self.probed_totals(weights)
        probe, least = _middle(self.probes[totals == totals.min()], self.high - self.low).copy(), int(totals.min())
        if self.method == "line":
            found = self._lines(weights, probe, least)
        else:
            found = (self._grid if len(self.low) <= 2 else self._coordinates)(weights)
            if self.totals(found[None], weights)[0] > least:  # a coarse grid stepped over it
                found = probe
        self.done()
        return found

    def _lines(self, weights: Ints, point: Floats, least: int) -> Floats:
        since = 0  # lines since the last gain: a whole round without one is the end
        for step in range(_SWEEPS * len(point)):
            d = step % len(point)
            line = self.surface.line(point, coordinate=d, low=self.low[d], high=self.high[d], weights=weights)
            point[d], total = line.best()
            since, least = (0 if total < least else since + 1), total
            if since == len(point):
                break
        return point

    def _grid(self, weights: Ints, rounds: int = _ROUNDS) -> Floats:
        """The best point of grids, each over the box of the best points of the one before."""
        low, high, found = self.low, self.high, []
        for _ in range(rounds):
            points = _gridded(low, high, _STEPS)
            totals = self.totals(points, weights)
            found.append((int(totals.min()), _middle(points[totals == totals.min()], self.high - self.low)))
            kept = points[_good(totals)]
            if np.array_equal(kept.min(axis=0), low) and np.array_equal(kept.max(axis=0), high):
                break
            low, high = kept.min(axis=0), kept.max(axis=0)
        return min(found, key=lambda pair: pair[0])[1]

    def _coordinates(self, weights: Ints) -> Floats:
        """The middle of a box that shrinks along one coordinate after the other: for more scales than a grid can hold."""
        low, high = self.low.copy(), self.high.copy()
        for _ in range(_ROUNDS):
            before = low.copy(), high.copy()
            for d in range(len(low)):
                points = np.repeat((low + high)[None] / 2, _STEPS, axis=0)
                points[:, d] = np.linspace(low[d], high[d], _STEPS)
                kept = points[_good(self.totals(points, weights)), d]
                low[d], high[d] = kept.min(), kept.max()
            if np.array_equal(before, (low, high)):
                break
        return (low + high) / 2


def _good(totals: Ints) -> NDArray[np.bool_]:
    """The best twentieth of points, and what is as good."""
    return totals <= np.percentile(totals, 5) * 1.0001


def _gridded(low: Floats, high: Floats, steps: int) -> Floats:
    """[steps ** D, D] points of a regular grid, the last number varying fastest."""
    axes = [np.linspace(a, b, steps) for a, b in zip(low, high, strict=True)]
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(low))


def _middle(points: Floats, span: Floats) -> Floats:
    """The one of equally good points [P, D] nearest to their mean; of equally near ones the smallest."""
    unit = points / np.where(span > 0, span, 1.0)
    away = np.round(((unit - unit.mean(axis=0)) ** 2).sum(axis=1), 12)
    return points[np.lexsort((np.round(np.abs(unit).sum(axis=1), 12), away))[0]]


def _folds(count: int, folds: int) -> int:
    return min(folds, count) if count > 1 else 0


def _held_out(search: _Search, *, folds: int, seed: int) -> Ints | None:
    """[N] errors of each utterance at scales tuned without its fold; None for a single one."""
    count = len(search.surface.settled)
    if count < 2:
        return None
    fold = np.random.default_rng(seed).permutation(count) % _folds(count, folds)
    errors = np.zeros(count, np.int64)
    for k in range(int(fold.max()) + 1):
        found = search.best((fold != k).astype(np.int64))
        errors[fold == k] = search.surface.utterance_errors(found)[fold == k]
    return errors


def _group(search: _Search, words: Ints, common: tuple[Ints, Ints | None], *, reference: str, folds: int, seed: int) -> Group:
    """common: errors of the group's utterances at the scales of all, tuned with and without them."""
    found = search.best(np.ones(len(words), np.int64))
    wrong, held_out = search.surface.utterance_errors(found), _held_out(search, folds=folds, seed=seed)
    gained = None if held_out is None or common[1] is None else held_out - common[1]
    return Group(
        scales=search.named(found, reference), utterances=len(words), words=int(words.sum()),
        wer=_percent(wrong, words), common=_percent(common[0], words),
        held_out=None if held_out is None else _percent(held_out, words),
        held_out_common=None if common[1] is None or held_out is None else _percent(common[1], words),
        gain=None if gained is None else _percent(gained, words),
        gain_interval=None if gained is None else rate_interval(gained, words, seed=seed),
    )  # fmt: skip


def _resampled(search: _Search, best: Floats, *, draws: int, seed: int) -> tuple[dict[str, Interval | None], NDArray[np.bool_]]:
    """When utterances are drawn with replacement: 95% intervals of the best probe, of equally good ones the mean; and [P] which probes
    are no worse than `best` in more than 2.5% of the draws."""
    count, rows = len(search.surface.settled), search.surface.rows
    scales, probed = search.scales, search.probed.T
    if count < 2:
        return dict.fromkeys(search.surface.names), np.ones(len(scales), bool)
    rng = np.random.default_rng(seed)
    found, no_worse = [], np.zeros(len(scales), np.int64)
    at_best = search.surface.errors(best[None])[0]
    for start in range(0, draws, 100):
        drawn = rng.integers(0, count, size=(min(100, draws - start), count))
        times = np.stack([np.bincount(one, minlength=count)[rows] for one in drawn]).astype(np.float32)
        totals = times @ probed
        no_worse += (totals <= (times @ at_best)[:, None]).sum(axis=0)
        least = (totals == totals.min(axis=1, keepdims=True)).astype(np.float64)
        found.append(least @ scales / least.sum(axis=1, keepdims=True))
    bests = np.concatenate(found)
    return {name: percentiles(bests[:, d]) for d, name in enumerate(search.surface.names)}, no_worse > 0.025 * draws


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
