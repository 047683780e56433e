"""A process of test_parallel.py: trains the Line of test_loop.py as torchrun says, and saves its weights."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from duolect.train.checkpoint import weights_of
from duolect.train.loop import train
from duolect.train.parallel import join
from duolect.train.task import Ratio
from tests.train.test_loop import CONFIG, Line

torch.set_num_threads(1)
mode, folder, accumulate, steps = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
world = join(mode, "cpu")  # type: ignore[arg-type]


class Uneven(Line):
    """The second process has nothing to validate."""

    def validate(self, rank: int, world: int) -> Mapping[str, Ratio]:
        found = super().validate(rank, world)
        return found if rank == 0 else {}


task = Uneven(dropout=0.0, room=int(sys.argv[5]) if world.rank else 8, items=28)
config = replace(CONFIG, accumulate=accumulate, steps=steps, average=0.9, keep_best=2, validate_every=3, save_every=2)
figures = train(task, config, folder, world=world)
weights = weights_of(task.model)
save_file({**weights, "error": torch.tensor(figures["error"])}, folder / f"rank-{world.rank}.safetensors")
world.leave()
