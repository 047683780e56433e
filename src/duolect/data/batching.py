"""Batches by seconds: similar lengths together, so that little of a batch is padding; pure functions, so that a place is a number."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

T = TypeVar("T")

BIN_BATCHES = 40  # how many batches the utterances are drawn for that are sorted together: more of them pad less and mix less
JITTER = 0.02  # how much longer or shorter an utterance counts there: a corpus of less than one bin is mixed by nothing else


def batches_by_seconds(seconds: Sequence[float], *, batch_seconds: float) -> list[list[int]]:
    """Batches of indices, longest utterance first; each index is in exactly one. Ties keep their order.

    A batch's padded cost (longest x count) is at most batch_seconds, unless it is one longer utterance alone.
    """
    return _cut(sorted(range(len(seconds)), key=lambda i: -seconds[i]), seconds, _positive(batch_seconds))


def shuffled_batches(seconds: Sequence[float], *, batch_seconds: float, seed: int, epoch: int, at_least: int = 1) -> list[list[int]]:
    """Batches of an epoch of training in random order, each of similar lengths: a pure function of its arguments.

    So a run resumes exactly by leaving out the batches it has seen. The bounds are those of `batches_by_seconds`; a batch has at least
    `at_least` utterances (if there are as many), even where that breaks them. The utterances are dealt into bins at random and sorted in
    each, up and down in turn (RETURNN's "laplace").
    """
    # Only random() is promised to stay the same over Python versions; shuffle() is not.
    draw = random.Random(f"{seed}/{epoch}").random
    mixed = _shuffled(range(len(seconds)), draw)
    blurred = [length * (1.0 + JITTER * (2.0 * draw() - 1.0)) for length in seconds]
    bins = max(1, round(math.fsum(seconds) / (BIN_BATCHES * _positive(batch_seconds))))
    order: list[int] = []
    for n in range(bins):
        part = mixed[n * len(mixed) // bins : (n + 1) * len(mixed) // bins]
        order += sorted(part, key=lambda i: blurred[i], reverse=n % 2 == 0)
    return _shuffled(_cut(order, seconds, batch_seconds, at_least), draw)


def sub_epoch(files: Sequence[Hashable], *, index: int, parts: int, seed: int) -> list[int]:
    """The utterances of sub-epoch `index` (0, 1, ... over the whole training) of epochs cut into `parts`; each epoch is cut in another way.

    files: of each utterance, where it lies: one file's stay together, so that a sub-epoch of a large corpus reads few of them.
    """
    if parts < 1:
        raise ValueError(f"an epoch of a corpus has {parts} parts, expected >= 1")
    epoch, part = divmod(index, parts)
    members: dict[Hashable, list[int]] = {}
    for i, file in enumerate(files):
        members.setdefault(file, []).append(i)
    order = [i for file in _shuffled(list(members.values()), random.Random(f"{seed}/{epoch}/parts").random) for i in file]
    return sorted(order[part * len(order) // parts : (part + 1) * len(order) // parts])


def dealt(batch: Sequence[T], *, parts: int) -> list[tuple[T, ...]]:
    """A batch in `parts` micro-batches (processes x accumulation) whose counts differ by one at most: empty ones where it is too small.

    All processes take as many steps, and an update is of the same utterances however many processes share it.
    """
    return [tuple(batch[part::parts]) for part in range(parts)]


def _positive(batch_seconds: float) -> float:
    if not batch_seconds > 0:
        raise ValueError(f"batch_seconds is {batch_seconds}, expected > 0: the seconds of padded audio that fit into the memory at once")
    return batch_seconds


def _shuffled(values: Sequence[T], draw: Callable[[], float]) -> list[T]:
    keys = [draw() for _ in values]
    return [values[i] for i in sorted(range(len(values)), key=keys.__getitem__)]


def _cut(order: Sequence[int], seconds: Sequence[float], batch_seconds: float, at_least: int = 1) -> list[list[int]]:
    """The order cut, greedily, where the next index would break a bound; a rest of less than at_least joins the batch before it."""
    batches: list[list[int]] = []
    longest = 0.0
    for i in order:
        batch = batches[-1] if batches else []
        longest = max(longest, seconds[i])
        if batch and (longest * (len(batch) + 1) <= batch_seconds or len(batch) < at_least):
            batch.append(i)
        else:
            batches.append([i])
            longest = seconds[i]
    if len(batches) > 1 and len(batches[-1]) < at_least:
        batches[-2:] = [batches[-2] + batches[-1]]
    return batches
