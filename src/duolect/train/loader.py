"""Batches ahead of time: the updates of a run from any place on, loaded here or by worker processes, the same in every case."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.utils.data import DataLoader, Dataset

from duolect.train.task import Batch, Place, Task

Micro = tuple[tuple[Any, ...], "Batch | None"]


@dataclass(frozen=True)
class _Updates(Dataset[list[Micro]]):
    """The updates of (the rest of) an epoch for one process."""

    task: Task[Any, Any]
    plan: Sequence[Sequence[tuple[Any, ...]]]
    place: Place
    rank: int
    world: int

    def __len__(self) -> int:
        return len(self.plan) - self.place.update

    def __getitem__(self, index: int) -> list[Micro]:
        place = replace(self.place, step=self.place.step + index, update=self.place.update + index)
        mine = self.plan[place.update][self.rank :: self.world]
        return [(items, self.task.load(items, place) if items else None) for items in mine]


def updates(
    task: Task[Any, Any], place: Place, *, rank: int, world: int, accumulate: int, workers: int
) -> Iterator[tuple[Place, int, list[Micro]]]:
    """(place before it, updates in its epoch, this process's micro-batches with their items) for each update, without end.

    Raises ValueError for an epoch without batches.
    """
    while True:
        plan = task.plan(place.epoch, world * accumulate)
        if not plan:
            raise ValueError(f"epoch {place.epoch} has no batch: check the training data and what was left out of it")
        rest = _Updates(task, plan, place, rank, world)
        loader = DataLoader(rest, batch_size=None, shuffle=False, num_workers=workers, prefetch_factor=4 if workers else None)
        for micros in loader if len(rest) else ():
            yield place, len(plan), micros
            place = replace(place, step=place.step + 1, update=place.update + 1)
        place = replace(place, epoch=place.epoch + 1, update=0)
