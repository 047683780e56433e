"""The training loop: one readable loop without callbacks; what is trained is a Task."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor, nn

from duolect.train.optim import Decay, adamw, rate_share, set_rates

Batch = TypeVar("Batch")
STATE = "state.pt"


class TrainError(RuntimeError):
    """Training cannot go on; the message is one line: where, what, next step."""


@dataclass(frozen=True)
class TrainConfig:
    """How to train. learning_rates: peak per parameter group. seconds: a budget of wall-clock time (s) that ends and decays the run earlier
    than `steps` would; batches then are still those of (seed, epoch). average: decay per step of a moving average of the weights, which
    then is what is validated and saved (small batches at high rates are noisy); 0: none."""

    steps: int
    learning_rates: Mapping[str, float]
    seconds: float | None = None
    warmup_steps: int = 100
    decay: Decay = "cosine"
    final_share: float = 0.01
    weight_decay: float = 0.01
    clip: float = 1.0
    average: float = 0.0
    precision: Literal["fp32", "bf16"] = "fp32"
    seed: int = 0
    log_every: int = 20
    validate_every: int = 500
    save_every: int = 200


@dataclass(frozen=True)
class Loss:
    """A loss as (sum, count), so that batches of any size add up; seconds: of audio in the batch, 0 where there is none."""

    sum: Tensor
    count: int
    seconds: float = 0.0


class Task(ABC, Generic[Batch]):
    """What is trained: a model, its batches and its loss."""

    model: nn.Module

    @abstractmethod
    def groups(self) -> Mapping[str, nn.Module]:
        """Modules by the name of their learning rate; a parameter belongs to the first that holds it."""

    @abstractmethod
    def plan(self, epoch: int) -> Sequence[Batch]:
        """The batches of an epoch, a pure function of it, so that a resumed run goes on where it stopped."""

    @abstractmethod
    def loss(self, batch: Batch, epoch: int) -> Loss:
        """The loss of one batch, with gradient."""

    @abstractmethod
    def validate(self) -> Mapping[str, float]:
        """Figures of the model as it is (in eval mode, without gradient)."""

    @abstractmethod
    def save(self, folder: Path, *, note: str) -> None:
        """Writes a model folder that can be used; note: how far the training was, for its card."""


@dataclass(frozen=True)
class _Position:
    """Where a run is: step (0-based, the next one), epoch, next batch of the epoch, seconds of work spent."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    seconds: float = 0.0


@dataclass
class _Window:
    """Sums since the last log line."""

    loss: float = 0.0
    count: int = 0
    audio: float = 0.0
    grad_norm: float = 0.0
    steps: int = 0
    since: float = field(default_factory=time.monotonic)


class Average:
    """The exponential moving average of parameters, young at first: its decay grows with the steps (1 + n) / (10 + n) to `decay`."""

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float) -> None:
        self.parameters, self.decay = parameters, decay
        self.values = [p.detach().clone() for p in parameters] if decay else []

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes the parameters in after update number `step` (0-based)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        if self.values:
            for value, parameter in zip(self.values, self.parameters, strict=True):
                value.lerp_(parameter, 1 - decay)

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


def train(task: Task[Any], config: TrainConfig, folder: str | Path) -> Mapping[str, float]:
    """The last validation figures, after training to the end; goes on where an earlier run in `folder` stopped.

    Writes folder/metrics.jsonl, folder/model (the newest usable model) and folder/state.pt (to resume). Raises TrainError on a loss that
    is not finite.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    optimizer = adamw(task.groups(), config.learning_rates, weight_decay=config.weight_decay)
    trainable = [p for group in optimizer.param_groups for p in group["params"]]
    average = Average(trainable, config.average)
    place = _resume(task, optimizer, average, folder)
    started, window, figures = time.monotonic() - place.seconds, _Window(), {}
    batches: Sequence[Any] = task.plan(place.epoch)
    task.model.train()
    while (progress := _progress(place, config)) < 1.0:
        if place.batch >= len(batches):
            place = replace(place, epoch=place.epoch + 1, batch=0)
            batches = task.plan(place.epoch)
            if not batches:
                raise TrainError(f"{folder}: epoch {place.epoch} has no batch: check the training data and its filters")
        share = rate_share(place.step, progress, warmup_steps=config.warmup_steps, decay=config.decay, final_share=config.final_share)
        rates = set_rates(optimizer, share)
        # Dropout is a function of the step too: a resumed run repeats nothing and skips nothing.
        torch.manual_seed(random.Random(f"{config.seed}/{place.step}").getrandbits(48))
        _step(task, optimizer, trainable, batches[place.batch], place, config, window)
        average.update(place.step)
        place = replace(place, step=place.step + 1, batch=place.batch + 1, seconds=time.monotonic() - started)
        if place.step % config.log_every == 0:
            window = _log(folder, place, config, window, rates)
        last = _progress(place, config) >= 1.0
        if last or place.step % config.validate_every == 0:
            with average.used():
                figures = _validate(task, folder, place)
        if last or place.step % config.save_every == 0:
            _save(task, optimizer, average, folder, replace(place, seconds=time.monotonic() - started))
    return figures


def _progress(place: _Position, config: TrainConfig) -> float:
    return max(place.step / config.steps, place.seconds / config.seconds if config.seconds else 0.0)


def _step(
    task: Task[Any],
    optimizer: torch.optim.Optimizer,
    trainable: list[Tensor],
    batch: Any,
    place: _Position,
    config: TrainConfig,
    window: _Window,
) -> None:
    """One update; adds its figures to the window."""
    device = trainable[0].device.type
    with torch.autocast(device, torch.bfloat16, enabled=config.precision == "bf16"):
        loss = task.loss(batch, place.epoch)
    (loss.sum / max(1, loss.count)).backward()
    norm = float(nn.utils.clip_grad_norm_(trainable, config.clip))
    total = float(loss.sum.detach())
    if not (math.isfinite(total) and math.isfinite(norm)):
        raise TrainError(
            f"step {place.step}: the loss is {total}, the gradient norm {norm}: epoch {place.epoch}, batch {place.batch}; "
            "lower the learning rate or look at that batch, then start again from the last saved state"
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    window.loss, window.count, window.audio = window.loss + total, window.count + loss.count, window.audio + loss.seconds
    window.grad_norm, window.steps = window.grad_norm + norm, window.steps + 1


def _log(folder: Path, place: _Position, config: TrainConfig, window: _Window, rates: Mapping[str, float]) -> _Window:
    """Writes one line of metrics and of progress; a fresh window."""
    spent = time.monotonic() - window.since
    speed, progress = window.audio / spent, _progress(place, config)
    left = place.seconds / progress - place.seconds
    loss = window.loss / max(1, window.count)
    norm = window.grad_norm / window.steps
    _append(
        folder,
        {
            "step": place.step,
            "epoch": place.epoch,
            "seconds": round(place.seconds, 1),
            "loss": round(loss, 5),
            "lr": dict(rates),
            "grad_norm": round(norm, 4),
            "audio_per_second": round(speed, 2),
        },
    )
    heard = f" · {speed:5.1f} s audio/s" if window.audio else ""
    line = (
        f"step {place.step:5d} · epoch {place.epoch} · loss {loss:7.4f} · lr {max(rates.values()):.1e} · grad {norm:6.2f}{heard}"
        f" · {100 * progress:4.1f}% · {left / 60:.0f} min left"
    )
    print(line, end="\r" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)
    return _Window()


@torch.inference_mode()
def _validate(task: Task[Any], folder: Path, place: _Position) -> Mapping[str, float]:
    task.model.eval()
    figures = dict(task.validate())
    task.model.train()
    _append(folder, {"step": place.step, "epoch": place.epoch, "seconds": round(place.seconds, 1), "validation": figures})
    print(f"step {place.step:5d} · " + " · ".join(f"{name} {value:.2f}" for name, value in figures.items()), file=sys.stderr, flush=True)
    return figures


def _append(folder: Path, line: Mapping[str, Any]) -> None:
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _save(task: Task[Any], optimizer: torch.optim.Optimizer, average: Average, folder: Path, place: _Position) -> None:
    """The model to use and the state to resume from; each replaced whole, so that a kill leaves the older one."""
    with average.used():
        task.save(folder / "model", note=f"step {place.step}, {place.seconds / 60:.0f} minutes of training")
    state = {"model": task.model.state_dict(), "optimizer": optimizer.state_dict(), "average": average.values, "place": vars(place)}
    torch.save(state, folder / f"{STATE}.part")
    os.replace(folder / f"{STATE}.part", folder / STATE)


def _resume(task: Task[Any], optimizer: torch.optim.Optimizer, average: Average, folder: Path) -> _Position:
    path = folder / STATE
    if not path.is_file():
        return _Position()
    state = torch.load(path, map_location="cpu", weights_only=True)
    try:
        task.model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average.values = state["average"]
    except (RuntimeError, ValueError, KeyError) as error:
        cause = " ".join(str(error).split())[:160]
        raise TrainError(f"{path}: was saved by another configuration ({cause}): name another run folder") from error
    place = _Position(**state["place"])
    print(f"goes on at step {place.step}, epoch {place.epoch} of {folder}", file=sys.stderr, flush=True)
    return place
