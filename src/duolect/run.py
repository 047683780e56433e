"""Run folders: what was run (recipe.json), with what (env.json) and how it went (metrics.jsonl)."""

from __future__ import annotations

import functools
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from duolect import __version__
from duolect.config import ConfigError, diff, digest, from_json, to_json

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "sentencepiece",
    "soundfile",
    "soxr",
    "kaldialign",
    "whisper-normalizer",
)


class RunError(ValueError):
    """A run folder cannot be used as asked; the message names the folder and what differs."""


@dataclass(frozen=True)
class Source:
    """Which duolect this is. commit: of the checkout the package is imported from, None when it is installed without one."""

    version: str
    commit: str | None
    dirty: bool

    def __str__(self) -> str:
        return self.version + (f"@{self.commit[:10]}{'-dirty' if self.dirty else ''}" if self.commit else "")


@functools.cache
def source() -> Source:
    """The version and, in a git checkout, the commit of the code that runs."""
    folder = Path(__file__).resolve().parent
    # A virtual environment often lies inside somebody else's checkout: only a commit that tracks this very file speaks of this code.
    if _git(folder, "ls-files", "--error-unmatch", "run.py") is None:
        return Source(__version__, None, False)
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", ".")
    return Source(__version__, _git(folder, "rev-parse", "HEAD"), bool(changed))


def write_json(path: str | Path, data: Any) -> None:
    """Writes a JSON file whole or not at all: by way of a temporary file beside it, flushed to disk and renamed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "w", encoding="utf-8") as out:
            json.dump(data, out, indent=1, ensure_ascii=False, allow_nan=False)
            out.write("\n")
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def readable(path: Path) -> None:
    """Gives a file the rights that `open` would have given it: safetensors makes files that others cannot read."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def environment(*, device: str, seed: int, command: Sequence[str] | None = None) -> dict[str, Any]:
    """What a run ran in, as JSON values: duolect and its commit, Python, platform, packages, device, seed, command line."""
    here = source()
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join(command if command is not None else sys.argv),
        "seed": seed,
        "device": device,
        "duolect": {"version": here.version, "commit": here.commit, "dirty": here.dirty},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


class RunFolder:
    """One run on disk. It has identity: open it once per process, and let one process (rank 0) write."""

    def __init__(self, path: Path, *, recipe_digest: str, resumed: bool) -> None:
        self.path, self.recipe_digest, self.resumed = path, recipe_digest, resumed

    @classmethod
    def open(cls, path: str | Path, *, recipe: Any, device: str, seed: int, command: Sequence[str] | None = None) -> RunFolder:
        """The folder of this recipe, made or (`resumed`) taken up again; every start is added to env.json.

        RunError if the folder belongs to another recipe (the message lists the fields), or holds other things and no recipe.
        """
        path = Path(path)
        wanted, recipe_path = to_json(recipe), path / "recipe.json"
        resumed = recipe_path.is_file()
        if resumed:
            _require_same_recipe(recipe_path, recipe, wanted)
        elif path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise RunError(f"{path} exists and is no run folder (no recipe.json); give a new folder, or remove this one")
        run = cls(path, recipe_digest=digest(wanted), resumed=resumed)
        starts = _read_json(run.env_path)["starts"] if run.env_path.is_file() else []
        starts.append(environment(device=device, seed=seed, command=command))
        write_json(run.env_path, {"recipe_digest": run.recipe_digest, "starts": starts})
        if not resumed:  # the recipe last: a folder with a recipe has all the rest
            write_json(recipe_path, wanted)
        run._repair_metrics()
        return run

    @property
    def env_path(self) -> Path:
        return self.path / "env.json"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def decoded(self, *, decoding: str, corpus: str) -> Path:
        """Where the hypotheses of a decoding of a corpus belong."""
        return self.path / "decode" / decoding / f"{corpus}.jsonl"

    def log(self, values: Mapping[str, Any]) -> None:
        """Appends one line to metrics.jsonl, flushed; ValueError for a value JSON does not know (NaN included: stop, or log it as text)."""
        line = json.dumps(dict(values), ensure_ascii=False, allow_nan=False)
        with open(self.metrics_path, "a", encoding="utf-8") as out:
            out.write(line + "\n")

    def metrics(self) -> Iterator[dict[str, Any]]:
        """The logged lines in order; a torn last line (a killed run) is left out."""
        if not self.metrics_path.is_file():
            return
        with open(self.metrics_path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    if not line.endswith("\n"):
                        return
                    raise RunError(f"{self.metrics_path}:{number}: not JSON ({error})") from error

    def rewind(self, *, step: int) -> None:
        """Drops logged lines whose "step" is beyond `step`: a resumed run repeats them."""
        kept = [line for line in self.metrics() if line.get("step", step) <= step]
        _replace_text(self.metrics_path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))

    def _repair_metrics(self) -> None:
        # A line torn by a kill would swallow the next one that is appended.
        if self.metrics_path.is_file():
            data = self.metrics_path.read_bytes()
            if data and not data.endswith(b"\n"):
                _replace_text(self.metrics_path, data[: data.rfind(b"\n") + 1].decode("utf-8"))


def _require_same_recipe(path: Path, recipe: Any, wanted: Mapping[str, Any]) -> None:
    stored = _read_json(path)
    try:
        # A recipe written before a field existed had that field's default.
        stored_now = to_json(from_json(stored, known=_classes(recipe), where=str(path)))
    except ConfigError:
        stored_now = stored
    if digest(stored_now) != digest(wanted):
        changes = diff(stored_now, wanted)
        shown = "; ".join(changes[:8]) + (f"; and {len(changes) - 8} more" if len(changes) > 8 else "")
        raise RunError(
            f"{path.parent} holds a run of another recipe ({digest(stored_now)}, now {digest(wanted)}): {shown}. "
            "Give another folder, or the old values to resume"
        )


def _classes(value: Any) -> list[type]:
    """Every class of a config and of the configs inside it."""
    if isinstance(value, (tuple, list)):
        return [cls for inner in value for cls in _classes(inner)]
    if isinstance(value, Mapping):
        return _classes(list(value.values()))
    if not hasattr(value, "__dataclass_fields__"):
        return []
    return [type(value), *_classes([getattr(value, name) for name in value.__dataclass_fields__])]


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RunError(f"{path}: not JSON ({error}); restore it or remove the folder") from error


def _replace_text(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git(folder: Path, *arguments: str) -> str | None:
    """Output of a git command in a folder, None where it fails or git is not there; takes no lock, so it disturbs nobody."""
    environ = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, env=environ, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
