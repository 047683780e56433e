from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duolect.data.batching import batches_by_seconds, padding_share, restore_order, shuffled_batches

lengths = st.lists(st.floats(0, 40, allow_nan=False) | st.sampled_from([1.0, 2.0, 35.0]), max_size=60)
bounds = st.floats(0.5, 120)
limits = st.none() | st.integers(1, 8)


def check_bounds(seconds: list[float], batches: list[list[int]], batch_seconds: float, limit: int | None) -> None:
    assert sorted(i for batch in batches for i in batch) == list(range(len(seconds)))
    for batch in batches:
        assert batch
        assert len(batch) == 1 or max(seconds[i] for i in batch) * len(batch) <= batch_seconds
        assert limit is None or len(batch) <= limit


@given(lengths, bounds, limits)
@settings(deadline=None)
def test_every_index_once_and_the_cost_bounded(seconds: list[float], batch_seconds: float, limit: int | None) -> None:
    batches = batches_by_seconds(seconds, batch_seconds=batch_seconds, batch_utterances=limit)
    check_bounds(seconds, batches, batch_seconds, limit)
    flat = [i for batch in batches for i in batch]
    assert flat == sorted(flat, key=lambda i: (-seconds[i], i))
    for batch in batches[:-1]:  # none was closed too early
        assert seconds[batch[0]] * (len(batch) + 1) > batch_seconds or len(batch) == limit


@given(lengths, bounds, limits, st.integers(0, 2**40), st.integers(0, 5))
@settings(deadline=None)
def test_shuffled_is_bounded_and_pure(seconds: list[float], batch_seconds: float, limit: int | None, seed: int, epoch: int) -> None:
    options = {"batch_seconds": batch_seconds, "batch_utterances": limit, "seed": seed, "epoch": epoch}
    batches = shuffled_batches(seconds, **options)
    check_bounds(seconds, batches, batch_seconds, limit)
    assert batches == shuffled_batches(list(seconds), **options)


@given(lengths, bounds)
@settings(deadline=None)
def test_order_is_restored(seconds: list[float], batch_seconds: float) -> None:
    batches = batches_by_seconds(seconds, batch_seconds=batch_seconds)
    assert restore_order([[seconds[i] for i in batch] for batch in batches], batches=batches) == seconds
    assert 0.0 <= padding_share(seconds, batches=batches) < 1.0


def test_results_that_do_not_match() -> None:
    with pytest.raises(ValueError, match="batch 1 has 2 results for 1 utterances"):
        restore_order([["a", "b"], ["c", "d"]], batches=[[1, 0], [2]])
    with pytest.raises(ValueError):
        restore_order([["a"]], batches=[[0], [1]])


def test_padding_share() -> None:
    assert padding_share([4.0, 2.0, 3.0], batches=[[0, 1], [2]]) == pytest.approx(2 / 11)
    assert padding_share([], batches=[]) == padding_share([0.0], batches=[[0]]) == 0.0


def test_training_batches_are_tight_and_change() -> None:
    seconds = np.random.default_rng(0).uniform(1, 30, 2000).tolist()
    epochs = [shuffled_batches(seconds, batch_seconds=300.0, seed=1, epoch=epoch) for epoch in range(3)]
    for batches in epochs:
        assert padding_share(seconds, batches=batches) < 0.12
        longest = [max(seconds[i] for i in batch) for batch in batches]
        assert abs(np.corrcoef(longest, range(len(longest)))[0, 1]) < 0.3  # not by length
    neighbours = [{frozenset(batch) for batch in batches} for batches in epochs]
    assert len(neighbours[0] & neighbours[1]) < 0.1 * len(neighbours[0])
    assert shuffled_batches(seconds, batch_seconds=300.0, seed=2, epoch=0) != epochs[0]


def test_shuffle_is_the_same_everywhere() -> None:
    seconds = [i % 7 + 0.5 for i in range(12)]
    assert shuffled_batches(seconds, batch_seconds=20, seed=3, epoch=1) == [[9, 1, 8, 7, 0], [4, 3, 10, 2], [6, 5, 11]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_bad_lengths(bad: float) -> None:
    with pytest.raises(ValueError, match=r"utterance 1 is .* long, expected a finite length"):
        batches_by_seconds([1.0, bad], batch_seconds=10)


@pytest.mark.parametrize("options", [{"batch_seconds": 0}, {"batch_seconds": float("nan")}, {"batch_seconds": 1, "batch_utterances": 0}])
def test_bad_bounds(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected >"):
        batches_by_seconds([1.0], **options)  # type: ignore[reportArgumentType]
