"""The training loop: one readable loop without callbacks; what is trained is a Task."""

from __future__ import annotations

import contextlib
import json
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from duolect.config import registered
from duolect.train.checkpoint import (
    STATE,
    TrainError,
    check_room,
    learned_of,
    load_state,
    mean_weights,
    read_weights,
    save_state,
    set_learned,
    weights_of,
    write_weights,
)
from duolect.train.loader import updates
from duolect.train.monitor import Monitor, flop_counter
from duolect.train.optim import Average, Schedule, WarmUp, adamw, set_rates
from duolect.train.parallel import Numbers, World, computing, whole
from duolect.train.task import Batch, Place, Ratio, Task

RESULT = "result.json"


@registered
@dataclass(frozen=True)
class TrainConfig:
    """How to train. The run ends at the first of epochs, updates (steps) and seconds of work that is given.

    learning_rates: peak per parameter group. learns: (from, until) in epochs, per parameter group that rests outside of them. accumulate:
    micro-batches per process and update. average: decay per update of a moving average of the weights, which then is what is validated and
    saved; 0: none. keep_best: so many of the best validated weights are kept, and their mean is tried at the end. watch: the figure that
    decides what is best (the first one where it is empty; a name is looked up before training). precision: of the products; auto: bf16
    where the device has instructions for it. A budget in seconds makes the learning rate follow the clock: only runs without one repeat
    themselves to the bit, on devices of one kind.
    """

    learning_rates: Mapping[str, float]
    epochs: float | None = None
    steps: int | None = None
    seconds: float | None = None
    schedule: Schedule = field(default_factory=WarmUp)
    weight_decay: float = 0.01
    eps: float = 1e-8
    clip: float = 1.0
    accumulate: int = 1
    average: float = 0.0
    precision: Numbers = "fp32"
    seed: int = 0
    workers: int = 0
    log_every: int = 20
    validate_every: int = 500
    save_every: int = 200
    keep_best: int = 0
    watch: str = ""
    learns: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def resting(self, epoch: float) -> set[str]:
        """The parameter groups that do not learn at a time in (continuous) epochs."""
        return {name for name, (begin, end) in self.learns.items() if not begin <= epoch < end}

    def __post_init__(self) -> None:
        for name in ("log_every", "validate_every", "save_every", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected >= 1")
        for name in ("epochs", "steps", "seconds"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"{name} is {value}, expected > 0")
        if odd := sorted(self.learns.keys() - self.learning_rates.keys()):
            raise ValueError(f"learns names {', '.join(odd)}, which have no learning rate: they are {', '.join(self.learning_rates)}")


@dataclass
class _Run:
    """What one call of `train` works with."""

    task: Task[Any, Any]
    config: TrainConfig
    folder: Path
    world: World
    optimizer: torch.optim.Optimizer
    trainable: list[nn.Parameter]
    average: Average
    monitor: Monitor
    best: dict[str, float] = field(default_factory=dict)  # file name to the watched figure, best first
    stand_in: Batch | None = None  # of an empty micro-batch in a sharded run, where all processes must take part in every pass

    def progress(self, place: Place, per_epoch: int) -> float:
        """0 .. 1 of the whole run."""
        c = self.config
        epoch = place.epoch + place.update / max(1, per_epoch)
        pairs = ((epoch, c.epochs), (place.step, c.steps), (place.seconds, c.seconds))
        return max(done / whole for done, whole in pairs if whole is not None)


def train(
    task: Task[Any, Any],
    config: TrainConfig,
    folder: str | Path,
    *,
    world: World | None = None,
    mirror: str = "",
) -> Mapping[str, float]:
    """The figures of the model that was saved at the end; goes on where an earlier run in `folder` stopped.

    Writes folder/metrics.jsonl, folder/model (the newest usable model, at the end the best) and folder/state.safetensors (to go on from).
    mirror: `tensorboard`, `wandb` or `trackio`, also to write to. Raises TrainError
    for a loss that is not finite, and for a folder that is too small or belongs to another configuration.
    """
    folder, world = Path(folder), world or World()
    if config.epochs is None and config.steps is None and config.seconds is None:
        raise TrainError("a run needs an end: epochs, steps or seconds: set one")
    if world.first:
        check_room(folder, task.model, copies=8 + config.keep_best)
    torch.manual_seed(config.seed)
    world.place(task.network)
    optimizer = adamw(task.groups(), config.learning_rates, weight_decay=config.weight_decay, eps=config.eps)
    trainable = [p for group in optimizer.param_groups for p in group["params"]]
    average = Average(trainable, config.average)
    place, best = Place(), dict[str, float]()
    if (folder / STATE).is_file():
        place, note = load_state(folder / STATE, task.model, optimizer, average)
        best = {str(name): float(value) for name, value in note["best"].items()}
    monitor = Monitor(folder, world, place, mirror=mirror)
    run = _Run(task, config, folder, world, optimizer, trainable, average, monitor, best)
    figures: Mapping[str, float] = {}
    if config.watch and not place.step:
        _watched(run, _validated(run, place))  # a wrong name is said now, not after the first hours
    task.model.train()
    begun = place.step
    for now, per_epoch, micros in updates(
        task, place, rank=world.rank, world=world.size, accumulate=config.accumulate, workers=config.workers
    ):
        place = replace(now, seconds=monitor.seconds)
        done = run.progress(place, per_epoch) >= 1.0
        if place.step == begun > 0 and world.first:
            what = f"is finished: its model is {folder / 'model'}" if done else f"goes on at update {place.step}, epoch {place.epoch}"
            monitor.say(f"{folder} {what}")
        if done and place.step == begun and world.size == 1 and (folder / RESULT).is_file():  # other nodes may not see the file
            found = json.loads((folder / RESULT).read_text())
            return {name: value for name, value in found.items() if name not in ("step", "weights")}
        if done:
            break
        share = config.schedule.share(place.step, run.progress(place, per_epoch))
        rates = set_rates(optimizer, share, resting=config.resting(place.epoch + place.update / max(1, per_epoch)))
        # Dropout is a function of the update and the process too: a resumed run repeats nothing and skips nothing.
        torch.manual_seed(random.Random(f"{config.seed}/{place.step}/{world.rank}").getrandbits(48))
        _update(run, place, micros)
        average.update(place.step)
        place = Place(place.step + 1, place.epoch, place.update + 1, monitor.seconds)
        progress = run.progress(place, per_epoch)
        if place.step % config.log_every == 0:
            monitor.log(place, progress, rates)
        if place.step % config.validate_every == 0 and progress < 1.0:
            with average.used():
                figures = _validated(run, place)
                _keep(run, place, figures)
        if place.step % config.save_every == 0 or progress >= 1.0:
            _save(run, place)
    return _finish(run, place) if place.step else figures


def _update(run: _Run, place: Place, micros: Sequence[tuple[tuple[Any, ...], Batch | None]]) -> None:
    """One update of the weights from this process's micro-batches; its figures go to the monitor."""
    config, world = run.config, run.world
    names = list(world.known({name: "" for _, batch in micros if batch for name in batch.counts}))
    counts = world.total({name: float(sum(b.counts.get(name, 0) for _, b in micros if b)) for name in names})
    sums = dict.fromkeys(names, 0.0)
    seconds = 0.0
    for items, batch in micros:
        if batch is not None:
            for name, value in _backward(run, items, batch, counts, place).items():
                sums[name] += value
            seconds, run.stand_in = seconds + batch.seconds, batch
        elif world.sharded:
            if run.stand_in is None:
                raise TrainError(
                    f"update {place.step}: the first batch of process {world.rank} is empty: use smaller batches or fewer processes"
                )
            _backward(run, items, run.stand_in, counts, place, factor=0.0)
    world.sum_gradients(run.trainable)
    sums = world.total({**sums, "seconds": seconds})
    seconds = sums.pop("seconds")
    norm = float(whole(nn.utils.clip_grad_norm_(run.trainable, config.clip)))
    if not (math.isfinite(norm) and all(map(math.isfinite, sums.values()))):
        raise TrainError(_report_nan(run, place, micros, sums, norm))
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    run.monitor.add(sums, counts, norm, seconds)


def _backward(
    run: _Run, items: tuple[Any, ...], batch: Batch, counts: Mapping[str, float], place: Place, *, factor: float = 1.0
) -> dict[str, float]:
    """The sums of the losses of a micro-batch, whose gradients are added; out of memory, it is tried again in halves."""
    task, world = run.task, run.world
    counting = run.monitor.wants_flops
    try:
        with flop_counter() if counting else contextlib.nullcontext() as flops:
            with computing(world.device, run.config.precision):
                losses = task.losses(batch.on(world.device))
            total = sum(task.weight(name) * value / max(1.0, counts.get(name, 0.0)) for name, value in losses.items())
            assert isinstance(total, Tensor)
            (total * (factor * world.loss_factor)).backward()
        if counting and flops is not None:
            run.monitor.flops(flops.get_total_flops(), batch.seconds)
        return {name: float(value.detach()) for name, value in losses.items()}
    except torch.OutOfMemoryError:
        if world.sharded:
            raise TrainError(f"update {place.step}: out of memory, and shards cannot go on alone: use smaller batches") from None
    torch.cuda.empty_cache()
    ids = ", ".join(task.name_of(x) for x in items)
    if len(items) == 1:
        run.monitor.say(f"update {place.step}: out of memory, left out: {ids}")
        return {}
    run.monitor.say(f"update {place.step}: out of memory, in halves: {ids}")
    sums: dict[str, float] = {}
    for half in (items[: len(items) // 2], items[len(items) // 2 :]):
        smaller = task.load(half, place)
        for name, value in (_backward(run, half, smaller, counts, place) if smaller is not None else {}).items():
            sums[name] = sums.get(name, 0.0) + value
    return sums


def _report_nan(
    run: _Run, place: Place, micros: Sequence[tuple[tuple[Any, ...], Batch | None]], sums: Mapping[str, float], norm: float
) -> str:
    """The message for a loss that is not finite, after the update's batches were written beside the run."""
    path = run.folder / f"not-finite-{place.step}-{run.world.rank}.safetensors"
    tensors = {f"{i}.{name}": x for i, (_, batch) in enumerate(micros) if batch for name, x in batch.tensors().items()}
    ids = [run.task.name_of(x) for items, _ in micros for x in items]
    write_weights(path, tensors, note={"ids": ids, "losses": {name: repr(x) for name, x in sums.items()}})
    shown = ", ".join(f"{name} {value:g}" for name, value in sums.items())
    return (
        f"update {place.step}, epoch {place.epoch}: the losses are {shown}, the gradient norm {norm:g}: the batch is in {path}; look at "
        f"it ({', '.join(ids[:3])} ...) or lower the learning rate, then start again from the last saved state with the same command"
    )


@torch.inference_mode()
def _validated(run: _Run, place: Place, label: str = "") -> dict[str, float]:
    """The figures of the model as it is, over all processes."""
    run.task.model.eval()
    ratios = run.task.validate(run.world.rank, run.world.size)
    run.task.model.train()
    shown = run.world.known({name: r.show for name, r in ratios.items()})
    parts = {name: ratios.get(name, Ratio(0.0, 0.0)) for name in shown}
    sums = run.world.total({f"{part}/{name}": getattr(r, part) for name, r in parts.items() for part in ("sum", "count")})
    figures = {name: Ratio(sums[f"sum/{name}"], sums[f"count/{name}"], show).value for name, show in shown.items()}  # type: ignore[arg-type]
    run.monitor.figures(place, figures, label)
    return figures


def _watched(run: _Run, figures: Mapping[str, float]) -> float:
    name = run.config.watch or next(iter(figures), "")
    if name not in figures:
        raise TrainError(f"watch names {name!r}, but validation gives {', '.join(figures) or 'nothing'}: correct `watch`")
    return figures[name] if math.isfinite(figures[name]) else math.inf


def _keep(run: _Run, place: Place, figures: Mapping[str, float]) -> None:
    """Keeps the weights as they are now if they are among the best, and drops what no longer is."""
    if not run.config.keep_best or not figures:
        return
    name = f"checkpoints/step-{place.step}.safetensors"
    # Of equal ones the newer: where every WER is 100% the losses still fall.
    order = sorted({**run.best, name: _watched(run, figures)}.items(), key=lambda pair: (pair[1], -int(Path(pair[0]).stem.split("-")[1])))
    ranked = dict(order[: run.config.keep_best])
    if name in ranked:
        weights = learned_of(run.task.model)
        if run.world.first:
            write_weights(run.folder / name, weights)
    if run.world.first:
        for old in run.best.keys() - ranked.keys():
            (run.folder / old).unlink(missing_ok=True)
    run.best = ranked


def _save(run: _Run, place: Place) -> None:
    """The model to use and the state to go on from; each replaced whole, so that a kill leaves the older one."""
    with run.average.used():
        weights = weights_of(run.task.model)
    if run.world.first:
        run.task.save(run.folder / "model", weights, note=_note(place))
    save_state(run.folder / STATE, run.task.model, run.optimizer, run.average, place, run.world, note={"best": run.best})


def _finish(run: _Run, place: Place) -> dict[str, float]:
    """The figures of the best of: the last weights, the best validated ones, their mean; that one becomes the model."""
    with run.average.used():
        weights = weights_of(run.task.model)
        figures = _validated(run, place)
    paths = [run.folder / name for name in run.best]
    tries: list[tuple[str, Callable[[], dict[str, Tensor]]]] = []
    if paths and figures:
        tries.append((f"best ({paths[0].stem})", lambda: read_weights(paths[0])[0]))
    if len(paths) > 1 and figures:
        tries.append((f"mean of the {len(paths)} best", lambda: mean_weights(paths)))
    chosen, last = "last", learned_of(run.task.model) if tries else {}
    for label, make in tries:
        set_learned(run.task.model, make())
        found = _validated(run, place, label)
        if _watched(run, found) < _watched(run, figures):
            chosen, weights, figures = label, weights_of(run.task.model), found
    if tries:
        set_learned(run.task.model, last)
    if run.world.first:
        run.task.save(run.folder / "model", weights, note=f"{_note(place)}; weights: {chosen}")
        (run.folder / RESULT).write_text(json.dumps({"step": place.step, "weights": chosen, **figures}, indent=1) + "\n")
    run.world.barrier()
    return figures


def _note(place: Place) -> str:
    return f"update {place.step}, {place.seconds / 60:.0f} minutes of training"
