"""The floors of the house: imports run downwards, torch and transformers stay where they belong."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "src" / "duolect"
FLOOR = {
    **dict.fromkeys(("vocabulary", "scorer", "config", "run"), 0),
    **dict.fromkeys(("audio", "data", "models", "search", "evaluate"), 1),
    **dict.fromkeys(("train", "recognize"), 2),
    **dict.fromkeys(("recipes", "study"), 3),
    **dict.fromkeys(("cli", "serve"), 4),
    "__main__": 5,
}
SIDEWAYS = {("models", "audio"), ("data", "audio"), ("models", "data"), ("study", "recipes")}
"""Arrows that are allowed between rooms of one floor."""


def unit(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Rooms of duolect that a file imports, wherever in it, type checking aside."""
    tree = ast.parse(path.read_text())
    hidden = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    names: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative imports hide which floor they go to"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "duolect" else {node.module}
    return {name.split(".")[1] for name in names if name.startswith("duolect.")} - {"__version__"}


FILES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_downwards(path):
    mine = unit(path)
    if mine == "__init__":
        return
    for other in imported(path) - {mine}:
        allowed = FLOOR[other] < FLOOR[mine] or (mine, other) in SIDEWAYS or FLOOR[other] == FLOOR[mine] == 0
        assert allowed, f"{path.relative_to(ROOT)} ({mine}, floor {FLOOR[mine]}) imports {other} (floor {FLOOR[other]})"


def test_every_room_has_a_floor():
    assert {unit(p) for p in FILES} - {"__init__"} <= set(FLOOR)


@pytest.mark.parametrize(
    "module",
    ["duolect.cli", "duolect.cli.recognition", "duolect.cli.evaluation", "duolect.evaluate.tune", "duolect.scorer", "duolect.config"],
)
def test_light_modules_do_not_import_torch(module):
    code = f"import {module}, sys; sys.exit(any(x in sys.modules for x in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
