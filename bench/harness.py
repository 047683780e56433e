"""What the benchmarks share: interleaved timing, one table, JSON beside it, and other people's code from the registry."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

RESULTS = Path(__file__).parent / "results"
THROWAWAY = Path(os.environ.get("DUOLECT_BENCH_CACHE") or Path.home() / ".cache" / "duolect" / "bench")
"""Where other people's packages are unpacked; may be deleted at any time."""


class Unavailable(RuntimeError):
    """Something to compare with cannot be had here; the message is one line."""


class Spent(NamedTuple):
    """Seconds of one call: on the clock, and of the processor (this process, all its threads), which other processes hardly touch."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class Timing:
    """Seconds of one thing, over the repetitions."""

    median: float
    least: float
    cpu: float  # the least
    count: int


def timing(spent: Sequence[Spent]) -> Timing:
    """Median and minimum on the clock, minimum of the processor."""
    wall = [s.wall for s in spent]
    return Timing(statistics.median(wall), min(wall), min(s.cpu for s in spent), len(spent))


def seconds_of(call: Callable[[], Any]) -> tuple[Spent, Any]:
    """(seconds the call took, what it gave)."""
    begin, cpu = time.perf_counter(), time.process_time()
    result = call()
    return Spent(time.perf_counter() - begin, time.process_time() - cpu), result


def interleaved(calls: Mapping[str, Callable[[], Spent]], *, repetitions: int, seconds: float) -> dict[str, Timing]:
    """Timings of calls that give their own seconds, one of each in turn, so that a busy moment hits all of them.

    No new round is begun after `seconds`, but one is always made.
    """
    begin = time.perf_counter()
    taken: dict[str, list[Spent]] = {name: [] for name in calls}
    for round_ in range(max(repetitions, 1)):
        if round_ and time.perf_counter() - begin > seconds:
            break
        for name, call in calls.items():
            taken[name].append(call())
    return {name: timing(values) for name, values in taken.items()}


def use_threads(threads: int) -> None:
    """Sets torch's threads; every benchmark compares at the same number on both sides."""
    torch.set_num_threads(threads)


def machine() -> dict[str, Any]:
    """What a number must be read with: processor, threads, load, versions, commit."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True)
    named = [line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "processor": (named or [platform.processor()])[0],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit.stdout.strip() or "unknown",
    }


def print_table(rows: Sequence[Mapping[str, Any]], *, title: str) -> None:
    """Prints rows of equal keys as one aligned table; floats with three significant digits."""
    if not rows:
        print(f"{title}: nothing was measured")
        return
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([_shown(row.get(name, "-")) for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    print(f"\n{title}")
    for i, line in enumerate(cells):
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        if i == 0:
            print("  ".join("-" * width for width in widths))


def save(name: str, rows: Sequence[Mapping[str, Any]], *, settings: Mapping[str, Any], notes: Sequence[str], quick: bool) -> Path:
    """Writes bench/results/<name>.json (<name>-quick.json for a quick run) and prints the notes and where it lies."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}{'-quick' if quick else ''}.json"
    about = machine()
    said = {"benchmark": name, "machine": about, "settings": dict(settings), "notes": list(notes), "rows": list(rows)}
    text = json.dumps(said, indent=1, ensure_ascii=False, default=str)
    path.write_text(re.sub(r"(?<![\w.])(/[\w.-]+)+/", "", text) + "\n")  # where things lie on this machine is nobody's business
    for note in notes:
        print(f"note: {note}")
    if about["load"] > (about["cores"] or 1) / 2 + about["threads"]:
        print(f"note: the machine is busy (load {about['load']}, {about['cores']} cores): read ratios of processor time (`x cpu`) first")
    print(f"written: {path}")
    return path


_refused: dict[str, str] = {}


def wheel(package: str) -> Path:
    """The wheel of `name==version`, fetched once by pip into the throwaway folder, not installed. Raises Unavailable."""
    if package in _refused:
        raise Unavailable(_refused[package])
    folder = THROWAWAY / "wheels"
    folder.mkdir(parents=True, exist_ok=True)
    name, version = package.split("==")
    if not (found := list(folder.glob(f"{name}-{version}-*.whl"))):
        print(f"fetching {package} from the package registry ...", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "--dest", str(folder), package]
        done = subprocess.run(command, capture_output=True, text=True)
        found = list(folder.glob(f"{name}-{version}-*.whl"))
        if done.returncode or not found:
            _refused[package] = f"{package} could not be fetched ({_last_line(done)}): is there a network, a package index?"
            raise Unavailable(_refused[package])
    return found[0]


def module_of(package: str, path: str) -> ModuleType:
    """One module file of a package's wheel, imported on its own. Raises Unavailable."""
    target = THROWAWAY / package / path
    if not target.is_file():
        with zipfile.ZipFile(wheel(package)) as archive:
            archive.extract(path, THROWAWAY / package)
    spec = importlib.util.spec_from_file_location("bench_of_" + path.removesuffix(".py").replace("/", "_"), target)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise Unavailable(f"{path} of {package} does not import on its own: {error}") from error
    return module


def stand_in(name: str, **members: Any) -> None:
    """Puts a module of that name, and empty parents of it, where an import will find them."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        sys.modules.setdefault(".".join(parts[:i]), ModuleType(".".join(parts[:i])))
    vars(sys.modules[name]).update(members)


def existing(path: str) -> Path:
    """A path that is there, as an argument's type."""
    if not Path(path).exists():
        raise argparse.ArgumentTypeError(f"{path} is not there")
    return Path(path)


def environment(name: str, packages: Sequence[str]) -> Path:
    """The Python of a virtual environment of its own with these packages, made once in the throwaway folder. Raises Unavailable."""
    folder = THROWAWAY / name
    python = folder / "bin" / "python"
    done = folder / ".complete"
    if not done.is_file() or done.read_text() != " ".join(packages):
        print(f"making {folder} with {', '.join(packages)} (once) ...", file=sys.stderr, flush=True)
        for command in ([sys.executable, "-m", "venv", "--clear", str(folder)], [str(python), "-m", "pip", "install", "-q", *packages]):
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode:
                raise Unavailable(f"no environment with {' '.join(packages)} ({_last_line(result)}): is there a network, a package index?")
        done.write_text(" ".join(packages))
    return python


def milliseconds(seconds: float) -> float:
    """Milliseconds with four significant digits, for tables and JSON."""
    return float(f"{seconds * 1e3:.4g}")


def measures(found: Timing) -> dict[str, float]:
    """Everything about a timing, for JSON."""
    named = {"median_ms": found.median, "min_ms": found.least, "min_cpu_ms": found.cpu}
    return {**{name: milliseconds(seconds) for name, seconds in named.items()}, "count": found.count}


def times(slow: Timing, fast: Timing, *, by: Literal["median", "least", "cpu"] = "median") -> float:
    """How many times as long the slow one takes."""
    return float(f"{getattr(slow, by) / getattr(fast, by):.3g}")


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 1000 else f"{value:.0f}" if isinstance(value, float) else str(value)


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    said = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip() and "notice" not in line]
    errors = [line for line in said if line.startswith("ERROR")]
    return (errors or said or [f"exit status {done.returncode}"])[-1][:160]


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
