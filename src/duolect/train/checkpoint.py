"""What a run needs to go on to the bit, and the means of its best weights: safetensors files, each replaced whole; nothing is unpickled."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from duolect.run import write_tensors
from duolect.train.optim import Average
from duolect.train.parallel import World, like, whole
from duolect.train.task import Place

STATE = "state.safetensors"


class TrainError(RuntimeError):
    """Training cannot go on; the message is one line: where, what, next step."""


def check_room(folder: Path, model: nn.Module, *, copies: int) -> None:
    """Raises TrainError if the folder cannot be written or has no room for `copies` fp32 copies of what learns."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".probe").write_text("")
        (folder / ".probe").unlink()
    except OSError as error:
        raise TrainError(f"{folder}: cannot be written ({error.strerror or error}): name another folder with --out") from error
    numbers = [sum(p.numel() for p in model.parameters() if p.requires_grad is learns) for learns in (True, False)]
    needed = 4 * (copies * numbers[0] + 2 * (numbers[1] + sum(b.numel() for b in model.buffers())))
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise TrainError(
            f"{folder}: {free // 10**6} MB are free, checkpoints need {needed // 10**6 + 1} MB: make room or name another --out"
        )


def write_weights(path: Path, weights: Mapping[str, Tensor], *, note: Mapping[str, object] | None = None) -> None:
    """Writes tensors whole or not at all; note: JSON values, kept in the file's metadata."""
    # Tied weights are one tensor under two names, which safetensors refuses: each name gets its own copy.
    write_tensors(path, {name: x.contiguous().clone() for name, x in weights.items()}, metadata={"note": json.dumps(dict(note or {}))})


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors by name, note) of what `write_weights` wrote. Raises TrainError."""
    try:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
            return {name: file.get_tensor(name) for name in names}, json.loads((file.metadata() or {}).get("note", "{}"))
    except (OSError, SafetensorError, ValueError) as error:
        raise TrainError(f"{path}: cannot be read ({' '.join(str(error).split())[:160]}): name another checkpoint") from error


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The model's whole state dict on the CPU; every process of a sharded run must ask."""
    return {name: whole(value) for name, value in model.state_dict().items()}


def learned_of(model: nn.Module) -> dict[str, Tensor]:
    """What of the state dict a training changes, whole on the CPU: parameters with gradients, and buffers. Every process must ask."""
    return {name: whole(x) for name, x in _changing(model).items()}


def _changing(model: nn.Module) -> dict[str, Tensor]:
    resting = {name for name, x in model.state_dict(keep_vars=True).items() if isinstance(x, nn.Parameter) and not x.requires_grad}
    return {name: x for name, x in model.state_dict().items() if name not in resting}


def set_learned(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Puts back what `learned_of` gave, into a model sharded or not. Raises TrainError if names or shapes differ."""
    own = _changing(model)
    wrong = sorted(own.keys() ^ weights.keys()) or sorted(n for n, x in own.items() if x.shape != weights[n].shape)
    if wrong:
        raise TrainError(f"the weights are of another model: {', '.join(wrong[:3])} {'and others ' * (len(wrong) > 3)}differ")
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(like(weights[name], value))


def mean_weights(paths: Sequence[Path]) -> dict[str, Tensor]:
    """The mean of the floating-point tensors of several files; others are the last file's."""
    files = [read_weights(path)[0] for path in paths]
    return {
        name: torch.stack([f[name].double() for f in files]).mean(0).to(value.dtype) if value.is_floating_point() else value
        for name, value in files[-1].items()
    }


def save_state(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: Average,
    place: Place,
    world: World,
    *,
    note: Mapping[str, object],
) -> None:
    """Writes what `load_state` needs, which what rests is not; every process must call, the first one writes."""
    state = {f"model.{name}": value for name, value in learned_of(model).items()}
    names = {id(p): name for name, p in model.named_parameters()}
    for p, values in optimizer.state.items():
        state |= {f"optimizer.{names[id(p)]}:{key}": whole(x) for key, x in values.items()}
    state |= {f"average.{i}": whole(x) for i, x in enumerate(average.values)}
    if world.first:
        write_weights(path, state, note={"place": asdict(place), **note})
    world.barrier()


def load_state(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, average: Average) -> tuple[Place, dict[str, Any]]:
    """(where the run stopped, the note) after model, optimizer and average were set to what they were then. Raises TrainError."""
    state, note = read_weights(path)
    try:
        set_learned(model, {name.removeprefix("model."): x for name, x in state.items() if name.startswith("model.")})
        parameters = dict(model.named_parameters())
        for name, value in state.items():
            if name.startswith("optimizer."):
                owner, key = name.removeprefix("optimizer.").rsplit(":", 1)
                p = parameters[owner]
                optimizer.state[p][key] = like(value, p) if value.shape == p.shape and value.ndim else value
        average.values = [like(state[f"average.{i}"], x) for i, x in enumerate(average.values)]
    except (TrainError, KeyError) as error:
        raise TrainError(f"{path}: was saved by another configuration ({error}): name another run folder") from error
    return Place(**note.pop("place")), note
