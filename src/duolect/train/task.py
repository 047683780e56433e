"""What is trained: a model, its batches, its losses. The loop knows nothing else of it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

Item = TypeVar("Item")
BatchT = TypeVar("BatchT", bound="Batch")


@dataclass(frozen=True)
class Place:
    """Where a run is: updates done, epoch, updates done of it, seconds of work spent."""

    step: int = 0
    epoch: int = 0
    update: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Ratio:
    """A figure as (sum, count), so that the parts of several processes add up; shown as a mean, in percent, or as exp of the mean."""

    sum: float
    count: float
    show: Literal["mean", "percent", "exp"] = "mean"

    @property
    def value(self) -> float:
        mean = self.sum / self.count if self.count else math.nan
        return {"mean": mean, "percent": 100 * mean, "exp": math.exp(min(mean, 50.0))}[self.show]


def shares(items: Sequence[Item], rank: int, world: int) -> list[tuple[Item, bool]]:
    """A process's part of the items, as long as every other's; the bool is false for one that another process counts.

    A sharded model gathers its weights in every forward, so all processes must call it equally often.
    """
    rounds = range(0, len(items), world)
    return [(items[min(at + rank, len(items) - 1)], at + rank < len(items)) for at in rounds]


@dataclass(frozen=True)
class Batch(ABC):
    """A micro-batch, ready for the model: a dataclass of tensors, mappings of tensors, and values that go nowhere."""

    seconds: float = field(default=0.0, kw_only=True)  # of audio, without padding

    @property
    @abstractmethod
    def counts(self) -> Mapping[str, int]:
        """What each loss is divided by (labels), by the loss's name."""

    def tensors(self) -> dict[str, Tensor]:
        """Everything that goes to the device, by name."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        found |= {f"{name}.{key}": x for name, part in found.items() if isinstance(part, Mapping) for key, x in part.items()}
        return {name: x for name, x in found.items() if isinstance(x, Tensor)}

    def on(self: BatchT, device: torch.device) -> BatchT:
        """The same batch there."""

        def there(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {name: there(x) for name, x in value.items()}
            return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value

        return replace(self, **{f.name: there(getattr(self, f.name)) for f in fields(self)})


class Task(ABC, Generic[Item, BatchT]):
    """A model with its batches and losses. `plan` and `load` are pure functions, so a killed run repeats itself to the bit."""

    model: nn.Module

    @property
    def network(self) -> nn.Module:
        """What `losses` calls: the model, or a module around it. Sharding hooks there, so it is called through `forward` only."""
        return self.model

    @abstractmethod
    def groups(self) -> Mapping[str, nn.Module]:
        """Modules by the name of their learning rate; a parameter belongs to the first that holds it."""

    @abstractmethod
    def plan(self, epoch: int, parts: int) -> Sequence[Sequence[tuple[Item, ...]]]:
        """The updates of an epoch, each of exactly `parts` micro-batches (processes x accumulation); a micro-batch may be empty."""

    @abstractmethod
    def load(self, items: Sequence[Item], place: Place) -> BatchT | None:
        """What the model needs of these items, on the CPU, perhaps in a worker process; None if nothing of them is usable."""

    @abstractmethod
    def losses(self, batch: BatchT) -> Mapping[str, Tensor]:
        """Sums of the losses by name, with gradient, of a batch on the model's device."""

    @abstractmethod
    def validate(self, rank: int, world: int) -> Mapping[str, Ratio]:
        """Figures of share `rank` of `world` of the validation data, of the model as it is (eval mode, no gradient); lower is better."""

    @abstractmethod
    def save(self, folder: Path, weights: Mapping[str, Tensor], *, note: str) -> None:
        """Writes a model folder that can be used; weights: the model's state dict; note: how far the training was, for its card."""

    def name_of(self, item: Item) -> str:
        """How messages call an item."""
        return str(item)

    def weight(self, loss: str) -> float:
        """How much a loss counts in the sum."""
        return 1.0
