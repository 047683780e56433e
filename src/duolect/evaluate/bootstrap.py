"""The bootstrap over utterances or speakers (Bisani and Ney, ICASSP 2004): how far a rate would move on another sample of the corpus."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

DRAWS = 10_000
_CELLS = 1 << 18  # indices drawn at a time: they stay in the cache


@dataclass(frozen=True)
class Interval:
    """The central 95% of the bootstrap distribution."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"[{self.low:.2f}, {self.high:.2f}]"


def resampled_sums(values: NDArray[Any], *, draws: int = DRAWS, seed: int = 0) -> NDArray[Any]:
    """[draws, C] column sums of `draws` samples of N rows drawn with replacement from values [N, C]."""
    rng = np.random.default_rng(seed)
    units, columns = values.shape
    distinct, counts = np.unique(values, axis=0, return_counts=True)
    if 4 * len(distinct) < units:
        # Utterances with equal counts are interchangeable: how often each kind is drawn is multinomial, which is the same distribution.
        return rng.multinomial(units, counts / units, size=draws) @ distinct
    sums = np.empty((draws, columns), values.dtype)
    step = max(1, _CELLS // units)
    for start in range(0, draws, step):
        rows = rng.integers(0, units, size=(min(step, draws - start), units))
        for column in range(columns):
            sums[start : start + step, column] = values[:, column][rows].sum(axis=1)
    return sums


def percentiles(samples: NDArray[np.float64]) -> Interval | None:
    """The central 95% of samples (not finite ones left out), None if there are none."""
    kept = samples[np.isfinite(samples)]
    if not kept.size:
        return None
    low, high = np.quantile(kept, [0.025, 0.975])
    return Interval(float(low), float(high))


def rate_interval(errors: NDArray[np.int64], words: NDArray[np.int64], *, seed: int = 0) -> Interval | None:
    """95% interval of 100 * sum(errors) / sum(words) over units [N]; None for fewer than two units, which say nothing of the spread."""
    if len(words) < 2 or not words.any():
        return None
    sums = resampled_sums(np.stack([errors, words], axis=1), seed=seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        return percentiles(100.0 * sums[:, 0] / sums[:, 1])
