from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from duolect import __version__
from duolect.config import digest, registered
from duolect.run import RunError, alone, open_run, source, write_json


@dataclass(frozen=True)
class Inner:
    dim: int = 8


@registered
@dataclass(frozen=True)
class Recipe:
    steps: int = 10
    model: Inner = Inner()


def opened(path: Path, recipe: Recipe | None = None) -> Path:
    open_run(path, recipe=recipe or Recipe(), device="cpu", seed=3)
    return path


def starts_of(run: Path) -> list[dict[str, Any]]:
    return json.loads((run / "env.json").read_text())["starts"]


def test_a_folder_is_held_by_one(tmp_path: Path) -> None:
    with alone(tmp_path / "run"), pytest.raises(RunError, match="run: another process is at work in it"), alone(tmp_path / "run"):
        pass
    with alone(tmp_path / "run"):
        assert list((tmp_path / "run").iterdir()) == [], "nothing that a new run folder may not have"
    assert not (tmp_path / "run").exists()


def test_a_new_folder_says_what_runs_and_with_what(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["duolect", "train", "a b"])
    run = opened(tmp_path / "run")
    assert json.loads((run / "recipe.json").read_text()) == {"type": "Recipe", "steps": 10, "model": {"type": "Inner", "dim": 8}}
    assert json.loads((run / "env.json").read_text())["recipe_digest"] == digest(Recipe())
    (start,) = starts_of(run)
    assert (start["device"], start["seed"], start["command"]) == ("cpu", 3, "duolect train 'a b'")
    assert start["duolect"] == {"version": __version__, "commit": source().commit, "dirty": source().dirty}
    assert start["packages"]["numpy"]
    assert set(start) == {"started", "command", "seed", "device", "duolect", "python", "platform", "cpus", "packages"}


def test_the_same_recipe_resumes(tmp_path):
    recipe = (opened(tmp_path / "run") / "recipe.json").read_bytes()
    assert len(starts_of(opened(tmp_path / "run"))) == 2
    assert (tmp_path / "run" / "recipe.json").read_bytes() == recipe


def test_another_recipe_is_refused_and_nothing_is_touched(tmp_path):
    run = opened(tmp_path / "run")
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    with pytest.raises(RunError, match=r"run holds a run of another recipe \(\w+, now \w+\): steps: 10 -> 20; model.dim: 8 -> 16\."):
        opened(run, Recipe(20, Inner(16)))
    assert {p.name: p.read_bytes() for p in run.iterdir()} == before


def test_a_recipe_from_before_a_field_existed_still_resumes(tmp_path):
    run = opened(tmp_path / "run")
    write_json(run / "recipe.json", {"type": "Recipe", "steps": 10})
    assert len(starts_of(opened(run))) == 2
    write_json(run / "recipe.json", {"type": "Recipe", "steps": 10, "gone": 1})
    with pytest.raises(RunError, match=r"gone: 1 -> \(absent\)"):
        opened(run)


def test_folders_that_are_no_run(tmp_path):
    (tmp_path / "thesis.txt").write_text("dear")
    with pytest.raises(RunError, match=r"exists and is no run folder \(no recipe.json\)"):
        opened(tmp_path)
    with pytest.raises(RunError, match="is no run folder"):
        opened(tmp_path / "thesis.txt")
    run = opened(tmp_path / "run")
    (run / "recipe.json").write_text("{")
    with pytest.raises(RunError, match=r"recipe\.json: not JSON"):
        opened(run)


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
