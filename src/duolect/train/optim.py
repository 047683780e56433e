"""The optimizer, its learning rate over time, and averages of weights."""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from duolect.config import registered


class Schedule(ABC):
    """The learning rate over time, as a share of its peak."""

    @abstractmethod
    def share(self, step: int, progress: float) -> float:
        """0 .. 1 at an update (0-based) and a progress 0 .. 1 of the whole run (continuous epochs, updates or seconds)."""


@registered
@dataclass(frozen=True)
class WarmUp(Schedule):
    """Linear over the first `steps` updates (the first quarter, if the run is shorter than that), then down to final_share of the peak."""

    steps: int = 100
    then: Literal["cosine", "linear", "constant"] = "cosine"
    final_share: float = 0.01

    def share(self, step: int, progress: float) -> float:
        progress = min(1.0, max(0.0, progress))
        shape = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}[self.then]
        return min(1.0, max((step + 1) / max(1, self.steps), 4 * progress)) * (self.final_share + (1 - self.final_share) * shape)


@registered
@dataclass(frozen=True)
class Piecewise(Schedule):
    """Straight lines between (progress, share) points: the one-cycle schedule of paper.md 1.9 by default."""

    points: tuple[tuple[float, float], ...] = ((0.0, 0.01), (0.45, 1.0), (0.9, 0.01), (1.0, 0.001))

    def __post_init__(self) -> None:
        places = [x for x, _ in self.points]
        if len(places) < 2 or places[0] != 0.0 or places[-1] != 1.0 or any(a >= b for a, b in pairwise(places)):
            raise ValueError(f"points are at progress {places}, expected rising numbers from 0 to 1")

    def share(self, step: int, progress: float) -> float:
        progress = min(1.0, max(0.0, progress))
        for (a, low), (b, high) in pairwise(self.points):
            if progress <= b:
                return low + (high - low) * (progress - a) / (b - a)
        return self.points[-1][1]


def adamw(groups: Mapping[str, nn.Module], rates: Mapping[str, float], *, weight_decay: float, eps: float = 1e-8) -> torch.optim.AdamW:
    """AdamW over the trainable parameters of named modules, each with the peak rate of its name; no decay on norms, biases and embeddings.

    A parameter of two groups belongs to the first. Raises ValueError if a group has no rate.
    """
    if missing := groups.keys() - rates.keys():
        raise ValueError(f"parameter groups {sorted(missing)} have no learning rate; rates are given for {sorted(rates)}")
    embeddings = {id(p) for group in groups.values() for m in group.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    seen: set[int] = set()
    parts = []
    for name, module in groups.items():
        own = [p for p in module.parameters() if p.requires_grad and id(p) not in seen]
        seen |= {id(p) for p in own}
        plain = [p.ndim <= 1 or id(p) in embeddings for p in own]
        for decay, chosen in ((weight_decay, False), (0.0, True)):
            if some := [p for p, is_plain in zip(own, plain, strict=True) if is_plain == chosen]:
                parts.append({"params": some, "peak": rates[name], "lr": 0.0, "weight_decay": decay, "name": name})
    return torch.optim.AdamW(parts, betas=(0.9, 0.98), eps=eps)


def set_rates(optimizer: torch.optim.Optimizer, share: float, *, resting: Collection[str] = ()) -> dict[str, float]:
    """Sets each group to its share of its peak, those of the names in `resting` to 0; the rates by group name."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0 if group["name"] in resting else group["peak"] * share
    return {group["name"]: group["lr"] for group in optimizer.param_groups}


class Average:
    """The exponential moving average of parameters, young at first: its decay grows with the steps (1 + n) / (10 + n) to `decay`."""

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = parameters, decay
        self.values: list[Tensor] = [p.detach().clone() for p in parameters] if decay else []

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes the parameters in after update number `step` (0-based)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for value, parameter in zip(self.values, self.parameters, strict=bool(self.values)):
            value.lerp_(parameter.detach(), 1 - decay)

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """The parameters are the average inside the block, and what they were behind it."""
        now = [p.detach().clone() for p in self.parameters] if self.values else []
        with torch.no_grad():
            for p, value in zip(self.parameters, self.values, strict=bool(self.values)):
                p.copy_(value)
            try:
                yield
            finally:
                for p, value in zip(self.parameters, now, strict=bool(now)):
                    p.copy_(value)
