"""What is checked before any work is done, so that a mistake costs seconds."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

from tyro.conf import UseAppendAction, arg

PICTURES = (".png", ".pdf", ".svg")


def at_least(least: int, **options: int | None) -> None:
    """Raises ValueError for an option below `least`; None is an option that was not given."""
    for name, value in options.items():
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected {least} or more")


def writable(option: str, path: Path | None, *, folder: bool = False, inputs: Iterable[Path] = (), kinds: Sequence[str] = ()) -> None:
    """Raises ValueError unless a file (or files in a folder) can be written at the path, which is none of the inputs; makes nothing.

    kinds: the endings that the file's name may have.
    """
    if path is None:
        return
    if path.exists() and any(x.exists() and x.samefile(path) for x in inputs):
        raise ValueError(f"{option} {path}: is what is to be read: name another file")
    if path.exists() and path.is_dir() != folder:
        expected = "a folder: name a folder" if folder else "a file: name a file in it"
        raise ValueError(f"{option} {path}: is a {'file' if folder else 'folder'}, expected {expected}, existing or new")
    if path.suffixes[-2:] == [".jsonl", ".json"]:
        raise ValueError(f"{option} {path}: is where a hypotheses file keeps what made it: name another file")
    if kinds and path.suffix.lower() not in kinds:
        raise ValueError(f"{option} {path}: expected a name that ends in {', '.join(kinds)}")
    place = path if folder else path.absolute().parent
    there = next(p for p in (place, *place.absolute().parents) if p.exists())
    if not (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        raise ValueError(f"{option} {path}: {there} {'cannot be written to' if there.is_dir() else 'is no folder'}: name another place")


def is_file(option: str, name: str, *, means_one: bool) -> bool:
    """Whether a name is a file's. Raises ValueError where it is not, and looks like nothing else."""
    if not (there := Path(name).is_file()) and means_one:
        raise ValueError(f"{option} {name}: there is no such file: correct the path")
    return there


def corpus_name(data: Path) -> str:
    """What a signature calls a corpus: its folder."""
    return (data if data.is_dir() else data.absolute().parent).resolve().name


def one_of(what: str, name: str, known: Iterable[str]) -> None:
    """Raises ValueError unless a name is a known one; the message guesses which was meant."""
    names = list(known)
    if name not in names:
        near = difflib.get_close_matches(name, names, 1)
        raise ValueError(f"{what} {name!r} is unknown{f', is {near[0]} meant?' if near else ''}; known: {', '.join(names)}")


Settings = Annotated[UseAppendAction[tuple[tuple[str, ...], ...]], arg(metavar="FIELD=VALUE ...")]
"""What `--set a=1 b=2 --set c=3` gives: nothing of it is lost, however it is said."""


def pairs(settings: Iterable[Iterable[str]], *, such_as: str) -> dict[str, str]:
    """Fields and values of `field=value` texts. Raises ValueError with an example."""
    assignments = [text for group in settings for text in group]
    for text in assignments:
        if "=" not in text:
            raise ValueError(f"--set {text}: expected field=value, such as {such_as}")
    return dict(text.split("=", 1) for text in assignments)
