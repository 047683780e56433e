"""Run folders: what was run (recipe.json) and with what (env.json)."""

from __future__ import annotations

import functools
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from duolect import __version__
from duolect.config import ConfigError, diff, digest, from_json, to_json

if TYPE_CHECKING:
    from torch import Tensor

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


def write_tensors(path: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file whole or not at all, as `write_json` does."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.part")
    save_file(dict(tensors), temporary, metadata=dict(metadata))
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    mask = os.umask(0)  # safetensors makes files that others cannot read
    os.umask(mask)
    temporary.chmod(0o666 & ~mask)
    temporary.replace(path)


def progress_bar(items: Iterable[Any] | None = None, **options: Any) -> tqdm[Any]:
    """A bar (of tqdm's options) on standard error: on a terminal at once, in a log a line every half minute of what takes longer."""
    terminal = sys.stderr.isatty()
    when = {"mininterval": 0.5, "smoothing": 0.05} if terminal else {"mininterval": 30.0, "delay": 15.0, "smoothing": 0.05}
    return tqdm(items, **{**when, **options})


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keeps other processes that ask for it out of a folder, which is made, and not left empty; the system lets go when this one ends.

    RunError where another is at work.
    """
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows has no such locks
        yield
        return
    place = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(place)
        raise RunError(f"{folder}: another process is at work in it: wait for it, end it, or name another folder") from error
    except OSError:
        pass  # a file system without locks
    try:
        yield
    finally:
        os.close(place)
        if new and not any(folder.iterdir()):
            folder.rmdir()


def environment(*, device: str, seed: int) -> dict[str, Any]:
    """What a run ran in, as JSON values: duolect and its commit, Python, platform, packages, device, seed, command line."""
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join(sys.argv),
        "seed": seed,
        "device": device,
        "duolect": asdict(source()),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def open_run(path: str | Path, *, recipe: Any, device: str, seed: int) -> None:
    """Makes the folder of this recipe, or takes it up again; every start is added to env.json. One process (the first) may call it.

    RunError if the folder belongs to another recipe (the message lists the fields), or holds other things and no recipe.
    """
    path = Path(path)
    wanted, recipe_path, env_path = to_json(recipe), path / "recipe.json", path / "env.json"
    resumed = recipe_path.is_file()
    if resumed:
        require_same_recipe(path, recipe)
    elif path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise RunError(f"{path} exists and is no run folder (no recipe.json); give a new folder, or remove this one")
    starts = _read_json(env_path)["starts"] if env_path.is_file() else []
    write_json(env_path, {"recipe_digest": digest(wanted), "starts": [*starts, environment(device=device, seed=seed)]})
    if not resumed:  # the recipe last: a folder with a recipe has all the rest
        write_json(recipe_path, wanted)


def require_same_recipe(folder: Path, recipe: Any) -> None:
    """RunError, with the fields that differ, unless the folder's run is of this recipe."""
    stored, wanted = _read_json(folder / "recipe.json"), to_json(recipe)
    try:
        # A recipe written before a field existed had that field's default.
        stored_now = to_json(from_json(stored))
    except ConfigError:
        stored_now = stored
    if digest(stored_now) != digest(wanted):
        changes = diff(stored_now, wanted)
        shown = "; ".join(changes[:8]) + (f"; and {len(changes) - 8} more" if len(changes) > 8 else "")
        raise RunError(
            f"{folder} holds a run of another recipe ({digest(stored_now)}, now {digest(wanted)}): {shown}. "
            "Give another folder, or the old values to resume"
        )


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RunError(f"{path}: not JSON ({error}); restore it or remove the folder") from error


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
