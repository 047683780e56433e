from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duolect.data.batching import batches_by_seconds, dealt, shuffled_batches, sub_epoch

lengths = st.lists(st.floats(0, 40, allow_nan=False) | st.sampled_from([1.0, 2.0, 35.0]), max_size=60)
bounds = st.floats(0.5, 120)


def check_bounds(seconds: list[float], batches: list[list[int]], batch_seconds: float) -> None:
    assert sorted(i for batch in batches for i in batch) == list(range(len(seconds)))
    for batch in batches:
        assert batch
        assert len(batch) == 1 or max(seconds[i] for i in batch) * len(batch) <= batch_seconds


@given(lengths, bounds)
@settings(deadline=None)
def test_every_index_once_and_the_cost_bounded(seconds: list[float], batch_seconds: float) -> None:
    batches = batches_by_seconds(seconds, batch_seconds=batch_seconds)
    check_bounds(seconds, batches, batch_seconds)
    flat = [i for batch in batches for i in batch]
    assert flat == sorted(flat, key=lambda i: (-seconds[i], i))
    for batch in batches[:-1]:  # none was closed too early
        assert seconds[batch[0]] * (len(batch) + 1) > batch_seconds


@given(lengths, bounds, st.integers(0, 2**40), st.integers(0, 5))
@settings(deadline=None)
def test_shuffled_is_bounded_and_pure(seconds: list[float], batch_seconds: float, seed: int, epoch: int) -> None:
    options = {"batch_seconds": batch_seconds, "seed": seed, "epoch": epoch}
    batches = shuffled_batches(seconds, **options)
    check_bounds(seconds, batches, batch_seconds)
    assert batches == shuffled_batches(list(seconds), **options)


def padding_share(seconds: list[float], *, batches: list[list[int]]) -> float:
    padded = sum(max(seconds[i] for i in batch) * len(batch) for batch in batches)
    return 1 - sum(seconds[i] for batch in batches for i in batch) / padded


def pairs(batches: list[list[int]]) -> set[tuple[int, int]]:
    return {(i, j) for batch in batches for i in batch for j in batch if i < j}


def test_training_batches_are_tight_and_change() -> None:
    seconds = np.random.default_rng(0).uniform(1, 30, 20_000).tolist()
    epochs = [shuffled_batches(seconds, batch_seconds=300.0, seed=1, epoch=epoch) for epoch in range(3)]
    for batches in epochs:
        assert padding_share(seconds, batches=batches) < 0.05
        longest = [max(seconds[i] for i in batch) for batch in batches]
        assert abs(np.corrcoef(longest, range(len(longest)))[0, 1]) < 0.3  # not by length
    neighbours = [pairs(batches) for batches in epochs]
    assert len(neighbours[0] & neighbours[1]) < 0.03 * len(neighbours[0])
    assert shuffled_batches(seconds, batch_seconds=300.0, seed=2, epoch=0) != epochs[0]


def test_a_corpus_of_less_than_a_bin_is_mixed_too() -> None:
    seconds = np.random.default_rng(0).uniform(1, 16, 1000).tolist()
    epochs = [shuffled_batches(seconds, batch_seconds=400.0, seed=1, epoch=epoch) for epoch in range(2)]
    assert padding_share(seconds, batches=epochs[0]) < 0.08
    assert len(pairs(epochs[0]) & pairs(epochs[1])) < 0.8 * len(pairs(epochs[0]))


REAL = Path(__file__).parents[3] / "shared" / "data" / "train" / "manifest.jsonl"


@pytest.mark.skipif(not REAL.is_file(), reason="the shared corpus is not here")
@pytest.mark.parametrize("batch_seconds", [24.0, 60.0, 120.0, 300.0])
def test_padding_of_real_speech(batch_seconds: float) -> None:
    seconds = [json.loads(line)["duration"] for line in REAL.read_text().splitlines()]
    for epoch in range(3):
        batches = shuffled_batches(seconds, batch_seconds=batch_seconds, seed=0, epoch=epoch)
        assert padding_share(seconds, batches=batches) < 0.05


def test_shuffle_is_the_same_everywhere() -> None:
    seconds = [i % 7 + 0.5 for i in range(12)]
    assert shuffled_batches(seconds, batch_seconds=20, seed=3, epoch=1) == [[6, 5, 11], [4, 10, 3, 9], [2, 1, 8, 0, 7]]
    assert sub_epoch(range(12), index=4, parts=3, seed=3) == [1, 2, 10, 11]


@given(lengths, bounds, st.integers(1, 6))
@settings(deadline=None)
def test_batches_of_at_least_some(seconds: list[float], batch_seconds: float, at_least: int) -> None:
    batches = shuffled_batches(seconds, batch_seconds=batch_seconds, seed=0, epoch=0, at_least=at_least)
    assert sorted(i for batch in batches for i in batch) == list(range(len(seconds)))
    assert all(len(batch) >= min(at_least, len(seconds)) for batch in batches)


@given(st.integers(0, 60), st.integers(1, 9), st.integers(0, 3), st.integers(1, 7), st.integers(0, 2**40))
def test_sub_epochs_are_a_partition_of_each_epoch(count: int, parts: int, epoch: int, files: int, seed: int) -> None:
    groups = [f"audio-{i * files // max(1, count)}.tar" for i in range(count)]
    found = [sub_epoch(groups, index=epoch * parts + part, parts=parts, seed=seed) for part in range(parts)]
    assert sorted(i for part in found for i in part) == list(range(count))
    assert max(map(len, found)) - min(map(len, found)) <= 1
    # Each file is cut where parts meet only.
    assert sum(len({groups[i] for i in part}) for part in found) <= len(set(groups)) + parts - 1


def test_sub_epochs_change() -> None:
    first, again = (sub_epoch(range(1000), index=index, parts=4, seed=0) for index in (0, 4))
    assert 0 < len(set(first) & set(again)) < 200 and first != sub_epoch(range(1000), index=0, parts=4, seed=1)
    with pytest.raises(ValueError, match="expected >= 1"):
        sub_epoch(range(5), index=0, parts=0, seed=0)


@given(st.lists(st.integers(), max_size=20), st.integers(1, 6))
def test_dealt(batch: list[int], parts: int) -> None:
    shares = dealt(batch, parts=parts)
    assert len(shares) == parts and sorted(x for share in shares for x in share) == sorted(batch)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("bad", [0, float("nan")])
def test_bad_bounds(bad: float) -> None:
    with pytest.raises(ValueError, match="expected >"):
        shuffled_batches([1.0], batch_seconds=bad, seed=0, epoch=0)
    with pytest.raises(ValueError, match="expected >"):
        batches_by_seconds([1.0], batch_seconds=bad)
