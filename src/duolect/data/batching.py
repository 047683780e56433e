"""Batches by seconds: similar lengths together, so that little of a batch is padding; pure functions, so that a place is a number."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")

BIN_BATCHES = 40  # how many batches the utterances are drawn for that are sorted together: more of them pad less and mix less
JITTER = 0.02  # how much longer or shorter an utterance counts there: a corpus of less than one bin is mixed by nothing else


def batches_by_seconds(seconds: Sequence[float], *, batch_seconds: float, batch_utterances: int | None = None) -> list[list[int]]:
    """Batches of indices, longest utterance first; each index is in exactly one.

    A batch's padded cost (longest x count) is at most batch_seconds, unless it is one longer utterance alone; its count is at most
    batch_utterances. Ties keep their order. ValueError for lengths that are not finite and >= 0.
    """
    _check(seconds, batch_seconds, batch_utterances)
    order = sorted(range(len(seconds)), key=lambda i: -seconds[i])
    return _cut(order, seconds, batch_seconds, batch_utterances)


def shuffled_batches(
    seconds: Sequence[float], *, batch_seconds: float, seed: int, epoch: int, batch_utterances: int | None = None, at_least: int = 1
) -> list[list[int]]:
    """Batches of an epoch of training in random order, each of similar lengths: a pure function of its arguments.

    So a run resumes exactly by leaving out the batches it has seen. The bounds are those of `batches_by_seconds`; a batch has at least
    `at_least` utterances (if there are as many), even where that breaks them. The utterances are dealt into bins at random and sorted in
    each, up and down in turn (RETURNN's "laplace"). Blurring all lengths and sorting once, which this replaces, brings 2 to 9 times as
    many pairs of neighbours together again in the next epoch at the same padding: 25% instead of 10% at 3% padding (3 h, 60 s).
    """
    _check(seconds, batch_seconds, batch_utterances)
    # Only random() is promised to stay the same over Python versions; shuffle() is not.
    draw = random.Random(f"{seed}/{epoch}").random
    mixed = _shuffled(range(len(seconds)), draw)
    blurred = [length * (1.0 + JITTER * (2.0 * draw() - 1.0)) for length in seconds]
    bins = max(1, round(math.fsum(seconds) / (BIN_BATCHES * batch_seconds)))
    order: list[int] = []
    for n in range(bins):
        part = mixed[n * len(mixed) // bins : (n + 1) * len(mixed) // bins]
        order += sorted(part, key=lambda i: blurred[i], reverse=n % 2 == 0)
    return _shuffled(_cut(order, seconds, batch_seconds, batch_utterances, at_least), draw)


def sub_epoch(utterances: int, *, index: int, parts: int, seed: int, groups: Sequence[Hashable] | None = None) -> list[int]:
    """The indices of sub-epoch `index` (0, 1, ... over the whole training) of epochs cut into `parts`; each epoch is cut in another way.

    groups: of each utterance, the file it lies in: such files stay together, so that a sub-epoch of a large corpus reads few of them.
    """
    if parts < 1 or index < 0 or (groups is not None and len(groups) != utterances):
        raise ValueError(f"sub-epoch {index} of epochs of {parts} parts: expected index >= 0, parts >= 1, and a group for each utterance")
    epoch, part = divmod(index, parts)
    draw = random.Random(f"{seed}/{epoch}/parts").random
    if groups is None:
        order = _shuffled(range(utterances), draw)
    else:
        members: dict[Hashable, list[int]] = {}
        for i, group in enumerate(groups):
            members.setdefault(group, []).append(i)
        order = [i for group in _shuffled(list(members.values()), draw) for i in group]
    return sorted(order[part * utterances // parts : (part + 1) * utterances // parts])


def dealt(batch: Sequence[T], *, parts: int) -> list[tuple[T, ...]]:
    """A batch in `parts` micro-batches (processes x accumulation) whose counts differ by one at most: empty ones where it is too small.

    All processes take as many steps, and an update is of the same utterances however many processes share it.
    """
    return [tuple(batch[part::parts]) for part in range(parts)]


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


def _shuffled(values: Sequence[T], draw: Callable[[], float]) -> list[T]:
    keys = [draw() for _ in values]
    return [values[i] for i in sorted(range(len(values)), key=keys.__getitem__)]


def _cut(
    order: Sequence[int], seconds: Sequence[float], batch_seconds: float, batch_utterances: int | None, at_least: int = 1
) -> list[list[int]]:
    """The order cut, greedily, where the next index would break a bound; a rest of less than at_least joins the batch before it."""
    batches: list[list[int]] = []
    longest = 0.0
    for i in order:
        batch = batches[-1] if batches else []
        longest = max(longest, seconds[i])
        fits = longest * (len(batch) + 1) <= batch_seconds and len(batch) != batch_utterances
        if batch and (fits or len(batch) < at_least):
            batch.append(i)
        else:
            batches.append([i])
            longest = seconds[i]
    if len(batches) > 1 and len(batches[-1]) < at_least:
        batches[-2:] = [batches[-2] + batches[-1]]
    return batches


def _check(seconds: Sequence[float], batch_seconds: float, batch_utterances: int | None) -> None:
    if not batch_seconds > 0:
        raise ValueError(f"batch_seconds is {batch_seconds}, expected > 0: the seconds of padded audio that fit into the memory at once")
    if batch_utterances is not None and batch_utterances < 1:
        raise ValueError(f"batch_utterances is {batch_utterances}, expected >= 1, or None for no limit")
    for i, length in enumerate(seconds):
        if not 0 <= length < math.inf:
            raise ValueError(f"utterance {i} is {length} s long, expected a finite length >= 0: measure it with duration_of")
