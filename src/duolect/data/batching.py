"""Batches by seconds: similar lengths together, so that little of a batch is padding."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")

JITTER = 0.1  # how much longer or shorter an utterance counts when training batches are cut: other neighbours in each epoch, little padding


def batches_by_seconds(seconds: Sequence[float], *, batch_seconds: float, batch_utterances: int | None = None) -> list[list[int]]:
    """Batches of indices, longest utterance first; each index is in exactly one.

    A batch's padded cost (longest x count) is at most batch_seconds, unless it is one longer utterance alone; its count is at most
    batch_utterances. Ties keep their order. ValueError for lengths that are not finite and >= 0.
    """
    _check(seconds, batch_seconds, batch_utterances)
    order = sorted(range(len(seconds)), key=lambda i: -seconds[i])
    return _cut(order, seconds, batch_seconds, batch_utterances)


def shuffled_batches(
    seconds: Sequence[float], *, batch_seconds: float, seed: int, epoch: int, batch_utterances: int | None = None
) -> list[list[int]]:
    """Batches of an epoch of training in random order, each of similar lengths: a pure function of its arguments.

    So a run resumes exactly by leaving out the batches it has seen. The bounds are those of `batches_by_seconds`.
    """
    _check(seconds, batch_seconds, batch_utterances)
    # Only random() is promised to stay the same over Python versions; shuffle() is not.
    draw = random.Random(f"{seed}/{epoch}").random
    jittered = [length * (1.0 + JITTER * (2.0 * draw() - 1.0)) for length in seconds]
    order = sorted(range(len(seconds)), key=lambda i: -jittered[i])
    keyed = [(draw(), batch) for batch in _cut(order, seconds, batch_seconds, batch_utterances)]
    return [batch for _, batch in sorted(keyed)]


def restore_order(results: Iterable[Sequence[T]], *, batches: Sequence[Sequence[int]]) -> list[T]:
    """Results of batches, one per index in them, in the order of the indices. ValueError where the numbers do not match."""
    pairs: list[tuple[int, T]] = []
    for n, (batch, values) in enumerate(zip(batches, results, strict=True)):
        if len(batch) != len(values):
            raise ValueError(f"batch {n} has {len(values)} results for {len(batch)} utterances: give one each, in the batch's order")
        pairs += zip(batch, values, strict=True)
    return [value for _, value in sorted(pairs, key=lambda pair: pair[0])]


def padding_share(seconds: Sequence[float], *, batches: Sequence[Sequence[int]]) -> float:
    """The share, 0 .. 1, of the padded seconds of all batches that is padding."""
    longest = [max((seconds[i] for i in batch), default=0.0) for batch in batches]
    padded = math.fsum(length * len(batch) for length, batch in zip(longest, batches, strict=True))
    padding = math.fsum(length - seconds[i] for length, batch in zip(longest, batches, strict=True) for i in batch)
    return padding / padded if padded > 0 else 0.0


def _cut(order: Sequence[int], seconds: Sequence[float], batch_seconds: float, batch_utterances: int | None) -> list[list[int]]:
    """The order cut, greedily, where the next index would break a bound."""
    batches: list[list[int]] = []
    longest = 0.0
    for i in order:
        batch = batches[-1] if batches else []
        longest = max(longest, seconds[i])
        if batch and longest * (len(batch) + 1) <= batch_seconds and len(batch) != batch_utterances:
            batch.append(i)
        else:
            batches.append([i])
            longest = seconds[i]
    return batches


def _check(seconds: Sequence[float], batch_seconds: float, batch_utterances: int | None) -> None:
    if not batch_seconds > 0:
        raise ValueError(f"batch_seconds is {batch_seconds}, expected > 0: the seconds of padded audio that fit into the memory at once")
    if batch_utterances is not None and batch_utterances < 1:
        raise ValueError(f"batch_utterances is {batch_utterances}, expected >= 1, or None for no limit")
    for i, length in enumerate(seconds):
        if not 0 <= length < math.inf:
            raise ValueError(f"utterance {i} is {length} s long, expected a finite length >= 0: measure it with duration_of")
