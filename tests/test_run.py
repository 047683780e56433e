from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from duolect import __version__
from duolect.run import RunError, RunFolder, source, write_json


@dataclass(frozen=True)
class Inner:
    dim: int = 8


@dataclass(frozen=True)
class Recipe:
    steps: int = 10
    model: Inner = Inner()


def opened(path: Path, recipe: Recipe | None = None) -> RunFolder:
    return RunFolder.open(path, recipe=recipe or Recipe(), device="cpu", seed=3, command=["duolect", "train", "a b"])


def test_a_new_folder_says_what_runs_and_with_what(tmp_path):
    run = opened(tmp_path / "run")
    assert not run.resumed
    assert json.loads((run.path / "recipe.json").read_text()) == {"type": "Recipe", "steps": 10, "model": {"type": "Inner", "dim": 8}}
    env = json.loads(run.env_path.read_text())
    assert env["recipe_digest"] == run.recipe_digest
    (start,) = env["starts"]
    assert (start["device"], start["seed"], start["command"]) == ("cpu", 3, "duolect train 'a b'")
    assert start["duolect"]["version"] == __version__
    assert start["packages"]["numpy"]
    assert set(start) == {"started", "command", "seed", "device", "duolect", "python", "platform", "cpus", "packages"}


def test_the_same_recipe_resumes(tmp_path):
    opened(tmp_path / "run").log({"step": 1, "loss": 2.5})
    again = opened(tmp_path / "run")
    assert again.resumed
    again.log({"step": 2, "loss": 2.0})
    assert list(again.metrics()) == [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.0}]
    assert len(json.loads(again.env_path.read_text())["starts"]) == 2


def test_another_recipe_is_refused_and_nothing_is_touched(tmp_path):
    run = opened(tmp_path / "run")
    before = {p.name: p.read_bytes() for p in run.path.iterdir()}
    with pytest.raises(RunError, match=r"run holds a run of another recipe \(\w+, now \w+\): steps: 10 -> 20; model.dim: 8 -> 16\."):
        opened(run.path, Recipe(20, Inner(16)))
    assert {p.name: p.read_bytes() for p in run.path.iterdir()} == before


def test_a_recipe_from_before_a_field_existed_still_resumes(tmp_path):
    run = opened(tmp_path / "run")
    write_json(run.path / "recipe.json", {"type": "Recipe", "steps": 10})
    assert opened(run.path).resumed
    write_json(run.path / "recipe.json", {"type": "Recipe", "steps": 10, "gone": 1})
    with pytest.raises(RunError, match=r"gone: 1 -> \(absent\)"):
        opened(run.path)


def test_folders_that_are_no_run(tmp_path):
    (tmp_path / "thesis.txt").write_text("dear")
    with pytest.raises(RunError, match=r"exists and is no run folder \(no recipe.json\)"):
        opened(tmp_path)
    with pytest.raises(RunError, match="is no run folder"):
        opened(tmp_path / "thesis.txt")
    run = opened(tmp_path / "run")
    (run.path / "recipe.json").write_text("{")
    with pytest.raises(RunError, match=r"recipe\.json: not JSON"):
        opened(run.path)


def test_a_torn_line_is_dropped(tmp_path):
    run = opened(tmp_path / "run")
    run.log({"step": 1})
    with open(run.metrics_path, "a") as out:
        out.write('{"step": 2, "lo')
    assert list(run.metrics()) == [{"step": 1}]
    again = opened(run.path)
    again.log({"step": 3})
    assert list(again.metrics()) == [{"step": 1}, {"step": 3}]
    run.metrics_path.write_text('{"step": 1}\nrubbish\n{"step": 2}\n')
    with pytest.raises(RunError, match=r"metrics.jsonl:2: not JSON"):
        list(run.metrics())


def test_rewind(tmp_path):
    run = opened(tmp_path / "run")
    for step in range(5):
        run.log({"step": step})
    run.rewind(step=2)
    assert [line["step"] for line in run.metrics()] == [0, 1, 2]


def test_nan_is_not_json(tmp_path):
    run = opened(tmp_path / "run")
    with pytest.raises(ValueError, match="JSON"):
        run.log({"loss": float("nan")})
    assert list(run.metrics()) == []


def test_write_json_is_whole_or_nothing(tmp_path):
    path = tmp_path / "deep" / "file.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(path.parent) == ["file.json"]


def test_source_names_the_version():
    assert source().version == __version__
    assert str(replace(source(), commit="0123456789abcdef", dirty=True)) == f"{__version__}@0123456789-dirty"
    assert str(replace(source(), commit=None)) == __version__
