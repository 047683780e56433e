"""Two processes learn what one learns: copies, shards, accumulation, an uneven last batch, resuming, one process short of memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from duolect.train.task import shares
from duolect.vocabulary import load_vocabulary
from tests.conftest import sentence_pieces
from tests.recognize.conftest import zoo

__all__ = ["zoo"]

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


def trained(folder: Path, figure: str, *words: str) -> dict[str, float]:
    """A figure of what `duolect <words>` made, as a user starts it: one process, two with copies, two with shards."""
    found = {}
    for name, processes, options in (("one", 1, []), ("copies", 2, []), ("shards", 2, ["--shard"])):
        launch = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--no-python"]
        launch += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
        start = [sys.executable, *launch, sys.executable] if processes > 1 else [sys.executable]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
        command = [*start, "-c", "from duolect.cli import main; main()", *words, "--out", name, "--device", "cpu", *options]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=folder)
        assert done.returncode == 0, done.stderr[-3000:]
        found[name] = json.loads((folder / name / "result.json").read_text())[figure]
    return found


@pytest.mark.slow
def test_a_language_model_learns_the_same_in_copies_and_in_shards(tmp_path: Path) -> None:
    """Five validation sentences in batches of 16 leave the second process with none of its own."""
    (tmp_path / "text.txt").write_text("ab abba\nba ab\nbab ab ab\nab\nabba ba bab\n" * 4)
    (tmp_path / "check.txt").write_text("ab ba\nbab\nabba ab\n")
    sentence_pieces(["ab abba ba bab"] * 9, size=12).save(tmp_path / "units")
    options = ["training.precision=fp32", "training.epochs=null", "training.steps=6", "model.dim=128", "model.heads=1"]
    data = ["--text", "text.txt", "--check", "check.txt", "--units", "units"]
    found = trained(tmp_path, "check word PPL", "lm", "train", *data, "--set", *options, "learning.batch_labels=40")
    assert found["copies"] == pytest.approx(found["one"], rel=1e-4) and found["shards"] == pytest.approx(found["one"], rel=1e-4), found


@pytest.mark.slow
@pytest.mark.parametrize("learns", ["all", "lora"])
def test_a_speech_llm_learns_the_same_in_copies_and_in_shards(zoo: dict[str, Path], tmp_path: Path, learns: str) -> None:
    """Layers of the language model are big enough to be sharded one by one; the encoder learns, too."""
    vocabulary = load_vocabulary(zoo["llm"])
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    torch.manual_seed(3)
    LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary.size, **shape)).save_pretrained(tmp_path / "llm")
    vocabulary.save(tmp_path / "llm")
    data = ["--train", str(zoo["corpus"]), "--dev", str(zoo["corpus"])]
    options = [f"encoder.model={zoo['am']}", f"units.folder={zoo['am']}", f"llm.model={tmp_path / 'llm'}", f"llm.dims.learns={learns}"]
    options += ["llm.dims.adapter.kind=concat", "llm.dims.adapter.labels=false"]
    options += ["llm.dims.encoder=learn", "llm.dims.before=ab", "llm.dims.after=", "llm.dims.begin="]
    options += ["llm.dims.lora.dropout=0", "training.precision=fp32", "training.seconds=null", "training.steps=6", "held_out=0"]
    options += ["max_share_lost=0.9", "learning.kept_versions=0", "learning.batch_seconds=20", "learning.decoder_check=0"]
    options += ["training.learning_rates.encoder=1e-3", "training.learning_rates.top=1e-3", "corpora.0.augment.noise_chance=0"]
    found = trained(tmp_path, "corpus ce", "train", "speech_llm", *data, "--set", *options)
    assert found["copies"] == pytest.approx(found["one"], rel=1e-4) and found["shards"] == pytest.approx(found["one"], rel=1e-4), found


@pytest.mark.parametrize(("items", "world"), [(0, 2), (1, 2), (5, 2), (6, 3), (2, 4)])
def test_shares_are_as_many_for_each_process_and_every_item_counts_once(items: int, world: int) -> None:
    found = [shares(range(items), rank, world) for rank in range(world)]
    assert len({len(share) for share in found}) == 1
    assert sorted(item for share in found for item, counts in share if counts) == list(range(items))
