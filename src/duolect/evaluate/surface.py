"""The error surface of n-best lists: the word errors of the chosen hypotheses as a function of the scales, at points and along lines.

Shapes: N utterances (A of them active), H hypotheses, D free scales, P points.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from duolect.evaluate.nbest import NBestLists

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_CELLS, _POINTS = 8192, 16  # hypotheses x points at a time: their scores stay in the cache


@dataclass(frozen=True)
class Range:
    """Where a free scale may lie. of: another free scale; then the number in this range is multiplied by that scale.

    The paper's label prior is Range(-2.0, 0.0, of="llm"): prior = -rho * llm, 0 <= rho <= 2.
    """

    low: float = 0.0
    high: float = 2.0
    of: str | None = None


@dataclass(frozen=True, eq=False)
class Line:
    """Total errors along one free scale, exactly: errors[i] between edges[i] and edges[i + 1]."""

    edges: Floats
    errors: Ints

    def best(self) -> tuple[float, int]:
        """(middle of the widest stretch with the fewest errors, those errors); of equally wide ones the one nearest 0."""
        wide = np.diff(self.edges) > 1e-12 * max(1.0, float(np.abs(self.edges).max()))
        if not wide.any():
            return float(self.edges[0]), int(self.errors[-1])
        starts, ends, errors = self.edges[:-1][wide], self.edges[1:][wide], self.errors[wide]
        new = np.concatenate([[True], errors[1:] != errors[:-1]])
        starts, ends, errors = starts[new], ends[np.concatenate([new[1:], [True]])], errors[new]
        widths = np.where(errors == errors.min(), ends - starts, -1.0)
        candidates = np.flatnonzero(widths >= widths.max() * (1 - 1e-9))
        middles = (starts + ends)[candidates] / 2
        return float(middles[np.argmin(np.abs(middles))]), int(errors.min())


@dataclass(frozen=True, eq=False)
class Surface:
    """Which hypothesis wins where, for numbers x [D]: score = reference part + sum of scale_d(x) * part_d.

    Ties go to the hypothesis that stands first in its list. settled [N]: the errors of utterances whose hypotheses all have as
    many, 0 for active ones. rows [A]: the active ones; base [A, H]: their reference part, -inf where there is no hypothesis.
    """

    names: tuple[str, ...]
    ranges: tuple[Range, ...]
    settled: Ints
    rows: Ints
    base: Floats
    slopes: Floats  # [D, A, H]
    wrong: Ints  # [A, H]

    def scales(self, points: Floats) -> Floats:
        """[P, D] the scales that the numbers `points` [P, D] stand for: relative ones multiplied out."""
        scales = np.array(points, np.float64)
        for d, span in enumerate(self.ranges):
            if span.of is not None:
                scales[:, d] *= points[:, self.names.index(span.of)]
        return scales

    def errors(self, points: Floats) -> NDArray[np.float32]:
        """[P, A] errors of the active utterances at the points [P, D], columns as in `rows`; whole numbers, fp32 for fast exact sums."""
        scales = self.scales(points)
        found = np.zeros((len(points), len(self.rows)), np.float32)
        height = max(1, _CELLS // self.base.shape[1])
        for top in range(0, len(self.rows), height):
            part = slice(top, top + height)
            base, wrong = self.base[part], self.wrong[part]
            slopes, row = self.slopes[:, part].reshape(len(self.names), -1), np.arange(len(base))
            for p in range(0, len(points), _POINTS):
                scores = (scales[p : p + _POINTS] @ slopes).reshape(-1, *base.shape)
                scores += base
                found[p : p + _POINTS, part] = wrong[row, scores.argmax(axis=-1)]
        return found

    def weighted(self, errors: NDArray[np.float32], weights: Ints) -> Ints:
        """[P] errors over all utterances, each counted weights [N] times, from `errors` [P, A]."""
        # Products of fp32 matrices are fast, and exact as long as no sum of errors reaches 2 ** 24.
        return (errors @ weights[self.rows].astype(np.float32)).astype(np.int64) + int(self.settled @ weights)

    def utterance_errors(self, point: Floats) -> Ints:
        """[N] errors at one point [D]."""
        errors = self.settled.copy()
        errors[self.rows] = self.errors(point[None])[0]
        return errors

    def line(self, point: Floats, *, coordinate: int, low: float, high: float, weights: Ints) -> Line:
        """The exact errors along one number in low .. high, the others as in `point` [D] (Och, ACL 2003: upper envelopes of lines)."""
        ends = np.stack([point, point])
        ends[:, coordinate] = 0.0, 1.0
        start, unit = self.scales(ends)
        offset = np.tensordot(start, self.slopes, axes=1) + self.base
        slope = np.tensordot(unit - start, self.slopes, axes=1)
        first, place, change = _envelope(offset, slope, self.wrong, weights[self.rows], low=low, high=high)
        order = np.argsort(place, kind="stable")
        errors = first + int(self.settled @ weights) + np.concatenate([[0], np.cumsum(change[order])])
        return Line(np.concatenate([[low], place[order], [high]]), errors)


def surface_of(lists: NBestLists, *, reference: str, free: Mapping[str, Range]) -> Surface:
    """The surface of lists with the scale of the part `reference` 1.0 and those in `free` to be found; other parts count nothing."""
    base = np.where(lists.possible, lists.parts[reference], -np.inf)
    slopes = np.stack([lists.parts[name] for name in free]) if free else np.zeros((0, *base.shape))
    most, least = (f(np.where(lists.possible, lists.errors, x), axis=1) for f, x in ((np.max, -1), (np.min, np.iinfo(np.int64).max)))
    rows = np.flatnonzero(most != least)
    settled = np.where(most == least, least, 0)
    return Surface(tuple(free), tuple(free.values()), settled, rows, base[rows], slopes[:, rows], lists.errors[rows])


def _envelope(offset: Floats, slope: Floats, errors: Ints, weights: Ints, *, low: float, high: float) -> tuple[int, Floats, Ints]:
    """(weighted errors at low, places where the winner of an utterance changes, weighted changes of its errors) for lines [n, h].

    All utterances walk at once from winner to winner; the next one is whichever steeper line crosses first.
    """
    row = np.arange(len(offset))
    current = (offset + low * slope).argmax(axis=1)
    first = int(errors[row, current] @ weights)
    places, changes = [np.zeros(0)], [np.zeros(0, np.int64)]
    while len(row):
        steeper = slope[row] - slope[row, current][:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            crossing = np.where(steeper > 0, (offset[row, current][:, None] - offset[row]) / steeper, np.inf)
        nearest = crossing.min(axis=1)
        following = np.where(crossing == nearest[:, None], steeper, -np.inf).argmax(axis=1)
        moves = nearest < high
        change = (errors[row, following] - errors[row, current]) * weights[row]
        places.append(nearest[moves & (change != 0)])
        changes.append(change[moves & (change != 0)])
        row, current = row[moves], following[moves]
    return first, np.maximum(np.concatenate(places), low), np.concatenate(changes)
