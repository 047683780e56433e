"""Training: an update against a bare loop over its matrix products, the data pipeline, padding; on a GPU the MFU of `base` in bf16.

The update is the trainer's own (`duolect.train.loop.train`), on one batch again and again. Where the loop asks for the next batch, the
matrix products of the first update are run by themselves, on random tensors of the same sizes, strides and types: both in turn.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import harness
import torch
from harness import Spent, Unavailable
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import conv_flop_count, flop_registry

from duolect.data.batching import batches_by_seconds, shuffled_batches
from duolect.data.filter import Labelled, usable
from duolect.data.pieces import PiecesError, sentences, train_pieces
from duolect.data.sources import open_source
from duolect.models.aed import AedModel
from duolect.models.attention_decoder import DecoderDims
from duolect.models.conformer import PRESETS, ConformerEncoder
from duolect.models.ctc import CtcModel
from duolect.recipes.asr import DEMO, AsrExperiment, loquacious_aed, mini
from duolect.train.asr import AsrTask
from duolect.train.checkpoint import TrainError
from duolect.train.loader import updates
from duolect.train.loop import train
from duolect.train.parallel import World, peak_flops
from duolect.train.task import Place
from duolect.vocabulary import SentencePieceVocabulary

NEVER, EPOCHS, CPU = 10**9, 5, torch.device("cpu")


class Enough(Exception):
    """Ends a run of the trainer between two updates, before it saves anything."""


class Products(TorchDispatchMode):
    """Notes each matrix product, convolution and fused attention that runs inside: all that torch's FLOP counter has a formula for.

    Their stand-ins of the same size, stride and type are shared by calls of equal ones, which favours the bare loop: caches know them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], Any, Any]] = []
        self.flops = self.torch_flops = 0
        self._made: dict[Any, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out, name = func(*args, **kwargs), func._overloadpacket
        if name in flop_registry:
            count = flop_registry[name](*args, **kwargs, out_val=out)
            self.torch_flops += count
            if name is torch.ops.aten.convolution_backward:
                # torch counts a group's weight gradient as if it met all channels (a depthwise one: `channels` times too much); each of
                # both gradients is as many products as the forward pass.
                count = sum(args[10][:2]) * conv_flop_count(args[1].shape, args[2].shape, args[0].shape, args[7])
            self.flops += count
            place = itertools.count()  # two operands of a call are never one tensor
            self.calls.append((func, *tree_map_only(Tensor, lambda x: self._stand_in(x, next(place)), (args, kwargs))))
        elif "attention" in str(name):
            raise SystemExit(f"error: torch's FLOP counter does not know {name}; nothing was timed")
        return out

    def _stand_in(self, x: Tensor, place: int) -> Tensor:
        key = (x.shape, x.stride(), x.dtype, place)
        if key not in self._made:
            span = 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
            values = torch.randn(span, device=x.device) if x.is_floating_point() else torch.zeros(span, device=x.device)
            self._made[key] = values.to(x.dtype).as_strided(x.shape, x.stride())
        return self._made[key]

    @torch.no_grad()
    def alone(self) -> None:
        """Runs all of them in their order, and nothing else."""
        for func, args, kwargs in self.calls:
            func(*args, **kwargs)


@dataclass(frozen=True)
class Given:
    """A task whose every epoch is these updates, loaded by `load`; in all else the task itself."""

    task: AsrTask
    epoch: Sequence[Sequence[tuple[Any, ...]]]
    load: Callable[..., Any]

    def plan(self, epoch: int, parts: int) -> Sequence[Sequence[tuple[Any, ...]]]:
        return self.epoch

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)


@dataclass(frozen=True)
class Setup:
    """What is trained: an experiment's model with all its heads, and the utterances it can learn from."""

    experiment: AsrExperiment
    model: AedModel
    items: Sequence[Labelled]

    @classmethod
    def of(cls, experiment: AsrExperiment, data: Path) -> Setup:
        """The experiment's model, made anew, and what it can learn from in a manifest."""
        vocabulary, corpus = units(data, experiment.units.size), experiment.corpora[0]
        torch.manual_seed(0)
        ctc = CtcModel(ConformerEncoder(experiment.encoder), vocabulary, aux=dict.fromkeys(experiment.heads, vocabulary))
        frame = ctc.seconds_per_frame * max(1.0, *corpus.augment.speeds)
        found = usable(open_source(data).utterances, vocabulary, seconds_per_frame=frame, max_seconds=experiment.max_seconds)
        return cls(experiment, AedModel(ctc, experiment.decoder), found.items)

    def task(self, batch_seconds: float) -> AsrTask:
        """Batches of so many seconds; utterances come again where all of them are too few for one."""
        items = [*self.items] * math.ceil(batch_seconds / sum(x.seconds for x in self.items) + 0.1)
        learning = replace(self.experiment.learning, batch_seconds=batch_seconds)
        return AsrTask(self.model, learning, [(self.experiment.corpora[0], items)], {}, seed=0)


def units(data: Path, count: int) -> SentencePieceVocabulary:
    """Units of the data's texts; where these are too few for so many, of made-up words too: the products depend on their number."""
    texts, draw = list(sentences(data)), random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "units.txt"
        file.write_text("\n".join(texts))
        try:
            return train_pieces(file, pieces=count)
        except PiecesError:
            made_up = ["".join(draw.choices("etaoinshrdlu", k=8)) for _ in range(4 * count)]
            file.write_text("\n".join([*texts, *made_up]))
            return train_pieces(file, pieces=count)


def clock(device: torch.device = CPU) -> Spent:
    """The time when all that was asked of the device is done, and processor time, ended worker processes included."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return Spent(time.perf_counter(), time.process_time() + sum(os.times()[2:4]))


def since(begin: Spent, device: torch.device = CPU) -> Spent:
    """What was spent since `begin`."""
    return Spent(*(b - a for a, b in zip(begin, clock(device), strict=True)))


def quartiles(values: Sequence[float]) -> str:
    """The first and the third one."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3
    return f"{low:.3g}..{high:.3g}"


def update_row(setup: Setup, batch_seconds: float, *, device: torch.device, repetitions: int, seconds: float) -> dict[str, Any]:
    """An update of the trainer and its products alone, in turn. Raises Unavailable where the batch does not fit into the memory."""
    task, products = setup.task(batch_seconds), Products()
    batches = sorted((update[0] for update in task.plan(0, 1)), key=lambda batch: sum(x.item.seconds for x in batch))
    items = batches[len(batches) // 2]
    batch: Any = task.load(items, Place())
    taken: dict[str, list[Spent]] = {"products": [], "update": []}

    def between() -> Iterator[None]:
        with products:
            yield  # the first update is written down; it makes the optimizer's state, too
        products.alone()
        yield  # the second one warms up
        until = time.perf_counter() + seconds
        while len(taken["update"]) < 2 or (len(taken["update"]) < repetitions and time.perf_counter() < until):
            begin = clock(device)
            products.alone()
            taken["products"].append(since(begin, device))
            begin = clock(device)
            yield
            taken["update"].append(since(begin, device))
        raise Enough

    turns: Any = between()

    def load(wanted: Sequence[Any], place: Place) -> Any:
        if len(wanted) != len(items):  # out of memory, the loop tries halves
            raise Unavailable(f"{batch_seconds:g} s do not fit into the memory")
        next(turns)
        return batch

    quiet = {"log_every": NEVER, "validate_every": NEVER, "save_every": NEVER, "keep_best": 0}
    config = replace(setup.experiment.training, epochs=1.0, workers=0, **quiet)
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(turns), contextlib.suppress(Enough):
        train(Given(task, [[items]] * 10_000, load), config, folder, world=World(device=device))  # type: ignore[arg-type]
    update, alone, peak = harness.timing(taken["update"]), harness.timing(taken["products"]), peak_flops(device)
    encoder, decoder = setup.model.ctc.encoder.dims, setup.model.decoder.dims
    row: dict[str, Any] = {
        "model": f"{encoder.layers} x {encoder.dim} + {decoder.layers} x {decoder.dim}",
        "labels": setup.model.ctc.vocabulary.size,
        "precision": config.precision,
        "audio s": round(batch.seconds, 1),
        "update s": update.median,
        "quartiles": quartiles([s.wall for s in taken["update"]]),
        "products s": alone.median,
        "their quartiles": quartiles([s.wall for s in taken["products"]]),
        "x": harness.times(update, alone),
        "x cpu": harness.times(update, alone, by="cpu"),
        "GFLOP": products.flops / 1e9,
        "torch's count": products.torch_flops / 1e9,
        "GFLOP/s": products.flops / update.median / 1e9,
        "products' GFLOP/s": products.flops / alone.median / 1e9,
        "audio s/s": batch.seconds / update.median,
    }
    if peak is not None and config.precision == "bf16":  # of which the peaks are
        row |= {"MFU %": 100 * products.flops / update.median / peak, "products' MFU %": 100 * products.flops / alone.median / peak}
    spent = Spent(update.median / batch.seconds, update.cpu / batch.seconds)
    row["details"] = {"calls": len(products.calls), "utterances": len(items), "a second of audio": spent, **taken}
    return row


def pipeline_rows(setup: Setup, most_seconds: float, *, device: torch.device, update: Spent, repetitions: int) -> list[dict[str, Any]]:
    """Seconds of audio that arrive in a second while nothing is trained; update: what one spends on a second of audio."""
    batch_seconds, taken, waits = setup.experiment.learning.batch_seconds, dict[str, list[Spent]](), dict[str, list[float]]()
    plan = setup.task(batch_seconds).plan(0, 1)[: max(1, round(most_seconds / batch_seconds))]
    audio = sum(x.item.seconds for update in plan for x in update[0])
    for _ in range(repetitions):
        arrived: list[Any] = []
        for workers, epoch in itertools.product((0, 2), ("first epoch", "again")):
            if epoch == "first epoch":  # `again` has the same updates of the same task, which may hold their audio
                task = setup.task(batch_seconds)
            name, arrived, begin = f"load, {workers} workers, {epoch}", [], clock()
            batches = updates(Given(task, plan, task.load), Place(), rank=0, world=1, accumulate=1, workers=workers)  # type: ignore[arg-type]
            for _, _, ((_, batch),) in itertools.islice(batches, len(plan)):
                arrived.append(batch)
                if len(arrived) == 1:
                    waits.setdefault(name, []).append(since(begin).wall)
            batches.close()  # ends the workers
            taken.setdefault(name, []).append(since(begin))
        there, begin = [batch.on(device) for batch in arrived], clock(device)
        for x, n in ((x, n) for batch in there for x, n in zip(batch.sound, batch.sizes.tolist(), strict=True)):
            setup.model.ctc.encoder.features(x[:n])
        taken.setdefault("features, in the update", []).append(since(begin, device))
    return [
        {
            "pipeline": name,
            "audio s": round(audio, 1),
            "audio s/s": audio / harness.timing(spent).median,
            "quartiles": quartiles([audio / s.wall for s in spent]),
            "audio s/cpu s": audio / harness.timing(spent).cpu,
            "first batch after s": statistics.median(waits[name]) if name in waits else "-",
            "% of the update": 100 * harness.timing(spent).median / audio / update.wall,
            "% cpu": 100 * harness.timing(spent).cpu / audio / update.cpu,
            "details": spent,
        }
        for name, spent in taken.items()
    ]


def padding_row(seconds: Sequence[float], batch_seconds: float, speeds: Sequence[float]) -> dict[str, Any]:
    """The share of padding, in percent, of what is heard in epochs: in the trainer's order, in that of lengths before speeds were drawn, in
    others."""
    row: dict[str, Any] = {
        "batch s": batch_seconds,
        "batches": len(shuffled_batches(seconds, batch_seconds=batch_seconds, seed=0, epoch=0)),
    }
    shares: dict[str, list[float]] = {}
    for epoch in range(EPOCHS):
        draw = random.Random(epoch)
        heard, order = [x / draw.choice(speeds) for x in seconds], draw.sample(range(len(seconds)), len(seconds))
        orders = {
            "laplace (trainer)": shuffled_batches(heard, batch_seconds=batch_seconds, seed=0, epoch=epoch),
            "laplace, speed unknown": shuffled_batches(seconds, batch_seconds=batch_seconds, seed=0, epoch=epoch),
            "random": cut(order, heard, batch_seconds),
            "sorted": batches_by_seconds(heard, batch_seconds=batch_seconds),
        }
        for name, batches in orders.items():
            shares.setdefault(f"{name} %", []).append(100 * padding_share(heard, batches=batches))
    return row | {name: statistics.mean(x) for name, x in shares.items()} | {"details": shares}


def padding_share(seconds: Sequence[float], *, batches: Sequence[Sequence[int]]) -> float:
    """The share, 0 .. 1, of the padded seconds of all batches that is padding."""
    padded = sum(max(seconds[i] for i in batch) * len(batch) for batch in batches)
    return 1 - sum(seconds[i] for batch in batches for i in batch) / padded


def cut(order: Sequence[int], seconds: Sequence[float], batch_seconds: float) -> list[list[int]]:
    """Batches of an order as it is, of at most so many padded seconds."""
    batches: list[list[int]] = [[]]
    for i in order:
        if batches[-1] and max(seconds[j] for j in [*batches[-1], i]) * (len(batches[-1]) + 1) > batch_seconds:
            batches.append([])
        batches[-1].append(i)
    return batches


def mfu_rows(args: argparse.Namespace, notes: list[str], **limits: Any) -> list[dict[str, Any]]:
    """Updates of the paper's largest AED, or of the same with other dims, in bf16 at several sizes of a batch."""
    paper, dims = loquacious_aed([str(args.data)], [], ""), PRESETS[args.dims]
    heads, decoder = tuple(n for n in paper.heads if n < dims.layers), DecoderDims.of(layers=6, dim=dims.dim)
    setup = Setup.of(replace(paper, encoder=dims, heads=heads, decoder=decoder), args.data)
    rows: list[dict[str, Any]] = []
    for batch_seconds in args.mfu_seconds:
        try:
            rows.append(update_row(setup, batch_seconds, **limits))
        except (Unavailable, TrainError, torch.OutOfMemoryError) as error:
            notes.append(f"MFU at {batch_seconds:g} s is left out: {error}")
    return rows


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small batches, two repetitions: does it run")
    parser.add_argument("--data", type=harness.existing, default=DEMO, help="a manifest; else the recordings that come with duolect")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dims", choices=[*PRESETS], help="of the MFU; `base` on a GPU, on a CPU only where it is given")
    parser.add_argument("--mfu-seconds", type=float, nargs="+", default=[100.0, 200.0, 500.0, 1000.0], help="sizes of its batches")
    parser.add_argument("--pipeline-seconds", type=float, default=1000.0, help="of audio, at most about, in a pass of the pipeline")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch, for both sides")
    parser.add_argument("--repetitions", type=int, default=5, help="of an update and its products")
    parser.add_argument("--seconds", type=float, default=60.0, help="no new repetition after so long (two are always made)")
    args = parser.parse_args()
    harness.use_threads(args.threads)
    device = torch.device(args.device)
    experiment = mini([str(args.data)], [], "")
    if args.quick:
        experiment = replace(experiment, learning=replace(experiment.learning, batch_seconds=20.0))
        args.repetitions, args.pipeline_seconds, args.mfu_seconds = 2, 60.0, [20.0]
    args.dims = args.dims or ("base" if device.type == "cuda" else None)
    limits = {"device": device, "repetitions": args.repetitions, "seconds": args.seconds}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(", ".join(f"{key} {value}" for key, value in {**harness.machine(), "device": name}.items()), flush=True)
    notes = [
        f"trained on {name}; data: {args.data}",
        "update: all that the trainer's loop does for a batch; products: its matrix products, convolutions and fused attention alone, in "
        "turn with it; x: update / products, by medians, x cpu: by least processor time",
        "GFLOP: padding included, also in MFU; torch's count, which the trainer corrects, is too high for gradients of grouped "
        "convolutions",
        "load: decoding, augmentation, padding, of the first batches of an epoch, with start and end of the workers; % of the update: of "
        "the first table, for as much audio, by medians; % cpu: by least processor time",
        f"padding: share of the padded seconds, mean of {EPOCHS} epochs; at the random speeds of the recipe",
    ]
    setup = Setup.of(experiment, args.data)
    parts = {"update": [update_row(setup, experiment.learning.batch_seconds, **limits)]}
    harness.print_table(shown(parts["update"]), title="an update of `mini` against its matrix products alone")
    spent = parts["update"][0]["details"]["a second of audio"]
    parts["pipeline"] = pipeline_rows(setup, args.pipeline_seconds, device=device, update=spent, repetitions=min(args.repetitions, 3))
    harness.print_table(shown(parts["pipeline"]), title="data pipeline of `mini`, seconds of audio per second")
    lengths, speeds = [x.seconds for x in setup.items], experiment.corpora[0].augment.speeds
    parts["padding"] = [padding_row(lengths, batch_seconds, speeds) for batch_seconds in (60.0, 120.0, 1000.0)]
    harness.print_table(shown(parts["padding"]), title=f"padding of {len(lengths)} utterances, {sum(lengths) / 3600:.2f} h")
    if args.dims is None:
        notes.append("MFU of `base` in bf16 is left out: no GPU here")
    else:
        parts["mfu"] = mfu_rows(args, notes, **limits)
        harness.print_table(shown(parts["mfu"]), title=f"updates of `{args.dims}` with a decoder")
        if "MFU %" not in {name for row in parts["mfu"] for name in row}:
            notes.append(f"no MFU: the peak of {device} in {loquacious_aed([], [], '').training.precision} is not known")
    rows = [{"part": part, **row} for part, found in parts.items() for row in found]
    harness.save("train" if args.data == DEMO else "train-data", rows, settings=vars(args), notes=notes, quick=args.quick)


def shown(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the table has of rows."""
    return [{name: x for name, x in row.items() if name != "details"} for row in rows]


if __name__ == "__main__":
    main()
