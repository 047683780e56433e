"""Several processes: started by torchrun, each with its share of every update; whole copies of the model, or shards of it (FSDP2).

Copies are kept equal by one sum of all gradients per update, behind the last backward pass. torch's DistributedDataParallel overlaps that
sum with the backward pass, but then every process must run the same passes: a process that halves a batch for want of memory, or has an
empty one, would block the others.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

Numbers = Literal["fp32", "bf16", "auto"]

BUCKET = 2**23
"""Gradient values that are summed over processes in one piece, 32 MiB of fp32."""


@dataclass(frozen=True)
class World:
    """The processes of this run. mode: how a model is held where there are several."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    mode: Literal["replicate", "shard"] = "replicate"

    @property
    def first(self) -> bool:
        """Whether this process writes files and progress."""
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        """Whether every process holds a part of the model only, so that all must run the same passes."""
        return self.mode == "shard" and self.size > 1

    def total(self, values: Mapping[str, float]) -> dict[str, float]:
        """The sums of numbers over all processes; each process gives the same names, in any order."""
        if self.size == 1:
            return dict(values)
        names = sorted(values)
        numbers = torch.tensor([values[name] for name in names], dtype=torch.float64, device=self.device)
        dist.all_reduce(numbers)
        return dict(zip(names, numbers.tolist(), strict=True))

    def known(self, values: Mapping[str, str]) -> dict[str, str]:
        """What all processes together know, by name: one without a batch knows less."""
        gathered: list[Any] = [dict(values)] * self.size
        if self.size > 1:
            dist.all_gather_object(gathered, dict(values))
        return {name: value for part in gathered for name, value in part.items()}

    def say(self, text: str) -> None:
        """Prints a line for people, once."""
        if self.first:
            print(text, file=sys.stderr, flush=True)

    def place(self, model: nn.Module) -> None:
        """Moves the model to this process's device: rank 0's weights for all, or sharded layer by layer."""
        model.to(self.device)
        if self.size == 1:
            return
        for tensor in [*model.parameters(), *model.buffers()]:
            dist.broadcast(tensor.data, 0)
        if self.sharded:
            from torch.distributed.fsdp import fully_shard

            stacks = [x for x in model.modules() if isinstance(x, nn.ModuleList) and len(x) > 1]
            for part in (*(layer for stack in stacks for layer in stack if _heavy(layer)), model):
                fully_shard(part)

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Makes every process's gradients the sum over all processes (shards are summed by the backward pass itself)."""
        if self.size == 1 or self.sharded:
            return
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        for bucket in _buckets(parameters):
            gradients = [p.grad for p in bucket if p.grad is not None]
            flat = torch.cat([g.flatten() for g in gradients])
            dist.all_reduce(flat)
            for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))

    @property
    def loss_factor(self) -> float:
        """What losses are multiplied by, so that gradients add up: FSDP2 takes the mean over processes."""
        return float(self.size) if self.sharded else 1.0

    def barrier(self) -> None:
        """Waits for the other processes."""
        if self.size > 1:
            dist.barrier()

    def leave(self) -> None:
        """Ends this process where there are several, behind the last of them, without the interpreter's own end.

        There gloo's threads, which may still hold a tensor of the last sum, abort the process now and then (pytorch issue 190489).
        """
        if self.size > 1:
            dist.barrier()
            dist.destroy_process_group()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)


def join(mode: Literal["replicate", "shard"] = "replicate", device: str | None = None) -> World:
    """The world of torchrun's environment, joined; this process alone without torchrun. device: None for a GPU if there is one."""
    size, rank, local = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0)))
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {kind}: torch sees no GPU here (`duolect doctor` says more): leave --device out, or use cpu")
    place = torch.device(f"cuda:{local}") if kind == "cuda" and size > 1 else torch.device(kind)
    if size > 1 and not dist.is_initialized():
        if place.type == "cuda":
            torch.cuda.set_device(place)
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo", timeout=timedelta(minutes=30))
    return World(rank, size, place, mode)


def whole(value: Tensor) -> Tensor:
    """A copy of the unsharded tensor on the CPU; every process must ask."""
    value = value.detach()
    return (value.full_tensor() if isinstance(value, DTensor) else value).to("cpu", copy=True)


def like(value: Tensor, model: Tensor) -> Tensor:
    """A whole tensor laid out over devices and processes as another is."""
    value = value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)
    if isinstance(model, DTensor):
        return distribute_tensor(value, model.device_mesh, model.placements)
    return value


def _heavy(module: nn.Module) -> bool:
    return sum(p.numel() for p in module.parameters()) > 100_000 and not isinstance(module, nn.Linear)


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterable[list[nn.Parameter]]:
    bucket: list[nn.Parameter] = []
    for p in parameters:
        if bucket and (sum(x.numel() for x in bucket) + p.numel() > BUCKET or p.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(p)
    if bucket:
        yield bucket


def computing(device: torch.device, numbers: Numbers) -> contextlib.AbstractContextManager[object]:
    """Inside, matrix products are of bf16 and weights stay as they are; `auto`: where the device has instructions for it, else fp32."""
    # A CPU without them is some ten times slower in bf16 than in fp32.
    able = device.type == "cuda" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=numbers == "bf16" or (numbers == "auto" and able))


def peak_flops(device: torch.device) -> float | None:
    """The dense bf16 peak of a known GPU in FLOP/s, None for others (vendors' data sheets)."""
    name: Any = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    known = {"H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "4090": 165e12, "A10G": 70e12}
    return next((value for key, value in known.items() if key in name), None)
