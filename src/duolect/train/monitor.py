"""What a run tells while it runs: one progress line, metrics.jsonl, and an optional mirror (TensorBoard, W&B, trackio)."""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from duolect.train.checkpoint import TrainError
from duolect.train.parallel import World, peak_flops
from duolect.train.task import Place

METRICS = "metrics.jsonl"


def flop_counter() -> FlopCounterMode:
    """A counter of what runs inside, whose formula for gradients of grouped convolutions is right.

    torch's counts the gradient of a group's weight as if it met all channels: a depthwise convolution's `channels` times too much.
    """
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: _convolution_backward})


def _convolution_backward(*shapes: Any, **options: Any) -> int:
    """Operations of convolution_backward, by its arguments with shapes for tensors: each gradient costs what the forward pass did."""
    gradient, x, weight, transposed, wanted = (shapes[i] for i in (0, 1, 2, 7, 10))
    return sum(wanted[:2]) * conv_flop_count(x, weight, gradient, transposed)


class Monitor:
    """Sums since the last line, and the clock of the run: `seconds` counts the work of earlier starts too."""

    def __init__(self, folder: Path, world: World, place: Place, *, mirror: str = "") -> None:
        self.folder, self.world = folder, world
        self._started = time.monotonic() - place.seconds
        self._peak = peak_flops(world.device)
        self._flops_per_second: float | None = None  # of audio
        self._mirror = _mirror(mirror, folder) if mirror and world.first else None
        if place.step and world.first:
            _rewind(folder / METRICS, place.step)
        self._reset()

    @property
    def seconds(self) -> float:
        """Of work so far."""
        return time.monotonic() - self._started

    @property
    def wants_flops(self) -> bool:
        """Whether the work of a batch should be counted once, for the MFU."""
        return self._peak is not None and self._flops_per_second is None

    def flops(self, count: float, seconds: float) -> None:
        """Takes the floating-point operations that `seconds` of audio cost, forward and backward."""
        self._flops_per_second = count / seconds if seconds else None

    def add(self, sums: Mapping[str, float], counts: Mapping[str, float], norm: float, seconds: float) -> None:
        """Takes the figures of one update."""
        for name, value in sums.items():
            old, count = self._losses.get(name, (0.0, 0.0))
            self._losses[name] = old + value, count + counts[name]
        self._norm, self._audio, self._updates = self._norm + norm, self._audio + seconds, self._updates + 1

    def log(self, place: Place, progress: float, rates: Mapping[str, float]) -> None:
        """Writes a line of metrics and of progress; the sums begin anew."""
        if not self.world.first:
            return self._reset()
        spent = max(1e-9, time.monotonic() - self._since)
        losses = {name: value / max(1.0, count) for name, (value, count) in self._losses.items()}
        speed, norm = self._audio / spent, self._norm / max(1, self._updates)
        line: dict[str, Any] = {"step": place.step, "epoch": place.epoch, "seconds": round(place.seconds, 1)}
        line |= {"loss": {name: round(x, 5) for name, x in losses.items()}, "lr": dict(rates), "grad_norm": round(norm, 4)}
        line |= {"audio_per_second": round(speed, 2)}
        if self._flops_per_second and self._peak:
            line["mfu"] = round(speed * self._flops_per_second / self._peak / self.world.size, 4)
        self._write(line)
        left = place.seconds / max(1e-9, progress) - place.seconds
        parts = [f"update {place.step:6d}", f"epoch {place.epoch}", *(f"{name} {value:.4f}" for name, value in losses.items())]
        parts += [f"lr {max(rates.values()):.1e}", f"grad {norm:.2f}", *([f"{speed:.1f} s audio/s"] if self._audio else [])]
        parts += [f"MFU {100 * line['mfu']:.0f}%"] if "mfu" in line else []
        parts += [f"{100 * min(1.0, progress):.1f}%", f"{_time(left)} left"]
        print(" · ".join(parts), end="\r" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)
        self._reset()

    def figures(self, place: Place, figures: Mapping[str, float], label: str = "") -> None:
        """Writes figures of a validation; label: of which weights, where these are not simply the newest."""
        if self.world.first and figures:
            self._write(
                {"step": place.step, "epoch": place.epoch, "seconds": round(self.seconds, 1), "validation": dict(figures), "of": label}
            )
            shown = " · ".join(f"{name} {value:.2f}" for name, value in figures.items())
            self.say(f"update {place.step:6d} · {label + ': ' if label else ''}{shown}")

    def say(self, text: str) -> None:
        """Prints a line, on the process that is concerned."""
        print(text if self.world.first else f"process {self.world.rank}: {text}", file=sys.stderr, flush=True)

    def _write(self, line: Mapping[str, Any]) -> None:
        with open(self.folder / METRICS, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        if self._mirror is not None:
            self._mirror(line)

    def _reset(self) -> None:
        self._losses: dict[str, tuple[float, float]] = {}
        self._norm, self._audio, self._updates, self._since = 0.0, 0.0, 0, time.monotonic()


def _rewind(path: Path, step: int) -> None:
    """Drops logged lines beyond a step, which a resumed run repeats, and a line torn by a kill."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else ():
        if line.endswith("\n") and json.loads(line)["step"] <= step:
            kept.append(line)
    path.write_text("".join(kept), encoding="utf-8")


def _mirror(kind: str, folder: Path) -> Any:
    """A function that takes a metrics line to another tool. Raises TrainError where the tool is not installed or not known."""
    if kind not in ("tensorboard", "wandb", "trackio"):
        raise TrainError(f"mirror is {kind!r}, expected tensorboard, wandb or trackio")
    try:
        if kind == "tensorboard":
            writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter(str(folder / "tensorboard"))

            def write(values: Mapping[str, float], step: int) -> None:
                for name, value in values.items():
                    writer.add_scalar(name, value, step)
        else:
            tool = importlib.import_module(kind)
            tool.init(project="duolect", name=folder.name)

            def write(values: Mapping[str, float], step: int) -> None:
                tool.log(dict(values), step=step)
    except ImportError as error:
        raise TrainError(f"mirror {kind}: is not installed ({error}): pip install {kind}") from error
    return lambda line: write(dict(_flat(line)), line["step"])


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    pairs: list[tuple[str, float]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            pairs += _flat(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)):
            pairs.append((f"{prefix}{name}", float(value)))
    return pairs


def _time(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min"
