"""Two processes learn what one learns: copies, shards, accumulation, an uneven last batch, resuming, one process short of memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("parallel_worker.py")


def run(processes: int, mode: str, folder: Path, *, accumulate: int, steps: int = 8, room: int = 8) -> dict[str, torch.Tensor]:
    """The weights and the figure of every process, which must be equal."""
    launch = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--master-port=0", "--rdzv-backend=c10d"]
    launch = [*launch, "--rdzv-endpoint=localhost:0"] if processes > 1 else []
    command = [sys.executable, *launch, str(WORKER), mode, str(folder), str(accumulate), str(steps), str(room)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [load_file(folder / f"rank-{rank}.safetensors") for rank in range(processes)]
    for other in ranks[1:]:
        assert all(torch.equal(other[name], value) for name, value in ranks[0].items())
    return ranks[0]


@pytest.mark.slow
def test_two_processes_are_one(tmp_path: Path) -> None:
    expected = run(1, "replicate", tmp_path / "one", accumulate=1)
    found = {
        "copies": run(2, "replicate", tmp_path / "copies", accumulate=1),
        "shards": run(2, "shard", tmp_path / "shards", accumulate=1),
        "copies, accumulated": run(2, "replicate", tmp_path / "both", accumulate=2),
        "one short of memory": run(2, "replicate", tmp_path / "short", accumulate=1, room=3),
    }
    for name, weights in found.items():
        for key, value in expected.items():
            torch.testing.assert_close(weights[key], value, atol=2e-6, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["replicate", "shard"])
def test_a_finished_run_comes_back_whole(tmp_path: Path, mode: str) -> None:
    """Weights, the optimizer's state and the average go to one file and back onto two processes."""
    first = run(2, mode, tmp_path, accumulate=1)
    again = run(2, mode, tmp_path, accumulate=1)
    longer = run(2, mode, tmp_path, accumulate=1, steps=9)
    assert all(torch.equal(again[name], value) for name, value in first.items())
    assert any(not torch.equal(longer[name], value) for name, value in first.items())
