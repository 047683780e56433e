"""Where utterances come from: manifests, folders, LibriSpeech trees, single files."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from sys import intern
from typing import Any

from duolect.audio.io import AudioError, duration_of
from duolect.data.utterance import Problem, Utterance

AUDIO_SUFFIXES = frozenset(
    (".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".aif", ".aiff", ".au", ".caf", ".m4a", ".mp4", ".aac", ".webm", ".wma")
)
MANIFEST = "manifest.jsonl"
EXPECTED = "a manifest (JSON lines with audio_filepath), an audio file, a LibriSpeech tree or a folder of audio"


class SourceError(ValueError):
    """Nothing usable lies where a source was named; the message is one line: where, what was expected, next step."""


@dataclass(frozen=True)
class Source:
    """The usable utterances of a source in its order, and what had to be left out."""

    utterances: tuple[Utterance, ...]
    problems: tuple[Problem, ...]


def open_source(path: str | Path) -> Source:
    """The utterances of a manifest, an audio file, a folder with a manifest.jsonl, a LibriSpeech tree or a folder, whichever it is."""
    path = Path(path)
    if path.is_dir():
        if (path / MANIFEST).is_file():
            return read_manifest(path / MANIFEST)
        return read_librispeech(path) if _transcripts(path) else read_folder(path)
    if not path.is_file():
        raise SourceError(f"{path}: no such file or folder: expected {EXPECTED}; check the path")
    if path.suffix.lower() in AUDIO_SUFFIXES:
        return _collected([path], path.parent)
    if path.suffix.lower() in (".jsonl", ".json") or _looks_like_manifest(path):
        return read_manifest(path)
    try:
        duration_of(path)
    except AudioError:
        raise SourceError(f"{path}: is neither a manifest nor audio: expected {EXPECTED}; name another file") from None
    return _collected([path], path.parent)


def named(sources: Sequence[str]) -> dict[str, str]:
    """Sources by short names, of a manifest that of its folder, or by their whole paths where these are the same."""
    paths = [Path(os.path.abspath(x)) for x in sources]  # a manifest or folder in the current folder has a name, too
    short = [(p.parent.name if p.name == MANIFEST else p.name if p.is_dir() else p.stem) or str(p) for p in paths]
    return {name if short.count(name) == 1 else str(x): str(x) for name, x in zip(short, sources, strict=True)}


def read_manifest(path: str | Path) -> Source:
    """The utterances of a JSONL manifest {"id"?, "audio_filepath", "duration"? (seconds), "text"?, ...}; unknown fields are kept.

    "audio_bytes"? [offset, size]: the audio file lies there inside of audio_filepath, which may be any container (a tar, a zip). Relative
    paths start at the manifest's folder and must not leave it, absolute ones are taken as they are. A missing id is the file's name
    without suffix, or its path where that name occurs twice. Raises SourceError if no line is usable.
    """
    path = Path(path)
    folder = path.parent.resolve()
    problems: list[Problem] = []
    lines: list[tuple[str, dict[str, Any]]] = []
    for where, line in _numbered_lines(path):
        try:
            lines.append((where, _checked(line, folder)))
        except ValueError as error:
            problems.append(Problem(where, str(error)))
    stems = Counter(Path(line["audio_filepath"]).stem for _, line in lines if line.get("id") is None)
    utterances: dict[str, Utterance] = {}
    places: dict[str, str] = {}
    files: dict[str, Path] = {}
    for where, line in lines:
        name = line["audio_filepath"]
        audio = files.get(name) or files.setdefault(name, path.parent / name)
        span = line.get("audio_bytes")
        if line.get("id") is None:
            name = Path(name)
            unique = name.stem if stems[name.stem] == 1 else name.with_suffix("").as_posix()
            line = {**line, "id": unique if span is None else f"{unique}:{span[0]}"}
        id = str(line["id"])
        if id in utterances:
            problems.append(Problem(where, f"id {id!r} was used before, in {places[id]}: give each line an id of its own"))
            continue
        places[id] = where
        utterances[id] = Utterance(id, audio, line.get("duration"), line.get("text"), line, span and (span[0], span[1]))
    if not utterances:
        example = '{"audio_filepath": "a.wav", "text": "..."}'
        raise SourceError(f"{path}: no usable line: expected one JSON object a line, such as {example}{_first(problems)}")
    return Source(tuple(utterances.values()), tuple(problems))


def read_folder(path: str | Path) -> Source:
    """The audio files below a folder, sorted; a .txt beside a file is its text. Raises SourceError if there is none."""
    path = Path(path)
    files = [file for file in _files_below(path) if file.suffix.lower() in AUDIO_SUFFIXES]
    if not files:
        raise SourceError(f"{path}: no audio file in it: expected {', '.join(sorted(AUDIO_SUFFIXES))}, a {MANIFEST} or a LibriSpeech tree")
    return _collected(files, path)


def read_librispeech(path: str | Path) -> Source:
    """The utterances below a LibriSpeech tree (speaker/chapter/*.flac and *.trans.txt), lower-cased, in the transcripts' order."""
    path = Path(path)
    transcripts = _transcripts(path)
    utterances: list[Utterance] = []
    problems: list[Problem] = []
    places: dict[str, str] = {}
    for transcript in transcripts:
        spoken: set[str] = set()
        for where, line in _numbered_lines(transcript):
            id, _, text = line.strip().partition(" ")
            spoken.add(id)
            audio = transcript.parent / f"{id}.flac"
            if not text.strip():
                problems.append(Problem(where, "no text behind the id: expected `id WORDS ...`; correct or remove the line"))
            elif not audio.is_file():
                problems.append(Problem(where, f"{audio.name} is not beside it: fetch the audio again or remove the line"))
            elif places.setdefault(id, where) != where:
                problems.append(Problem(where, f"id {id!r} was used before, in {places[id]}: remove one of the two"))
            else:
                utterances.append(_utterance(id, audio, path, text=text.lower().strip(), speaker=id.split("-")[0]))
        for audio in sorted(transcript.parent.glob("*.flac")):
            if audio.stem not in spoken:
                problems.append(Problem(str(audio), f"has no line in {transcript.name}: fetch the transcript again or remove the file"))
    if not utterances:
        raise SourceError(f"{path}: no LibriSpeech utterance: expected speaker/chapter/*.flac with *.trans.txt beside{_first(problems)}")
    return Source(tuple(utterances), tuple(problems))


def _numbered_lines(path: Path) -> Iterator[tuple[str, str]]:
    """(file:line, line) of the lines that are not blank; a line that is no UTF-8 comes with U+FFFD."""
    try:
        with open(path, encoding="utf-8-sig", errors="replace", newline="\n") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{path}:{number}", line
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror or error}): check its path and permissions") from error


def _checked(line: str, folder: Path) -> dict[str, Any]:
    """The fields of a manifest line. Raises ValueError with cause and next step."""
    if "\ufffd" in line:
        raise ValueError("is not UTF-8: save the manifest as UTF-8")
    try:
        fields = _DECODER.decode(line)
        if "\\u" in line:
            json.dumps(fields, ensure_ascii=False).encode()  # "\\ud800" alone can be read and could never be written again
    except (ValueError, RecursionError) as error:
        raise ValueError(f"broken JSON ({error}): expected one JSON object on the line; correct or remove it") from None
    if not isinstance(fields, dict):
        raise ValueError(f"got a JSON {type(fields).__name__}, expected an object with audio_filepath: correct or remove the line")
    audio = fields.get("audio_filepath")
    if audio is None:
        raise ValueError("audio_filepath is missing: name the audio file, or remove the line")
    if not isinstance(audio, str):
        raise ValueError(f"audio_filepath is {_shown(audio)}, expected the path of a file: correct it")
    if problem := _path_problem(audio, folder):
        raise ValueError(problem)
    _check_values(fields)
    return fields


@lru_cache(maxsize=4096)  # the lines of a shard follow each other, and asking the file system takes 50 times as long as reading a line
def _path_problem(audio: str, folder: Path) -> str | None:
    """What is wrong with a manifest's audio_filepath, None if nothing is."""
    if not audio.strip() or "\0" in audio or Path(audio).name in ("", ".."):
        return f"audio_filepath is {_shown(audio)}, expected the path of a file: correct it"
    if not os.path.isabs(audio) and not Path(os.path.realpath(folder / audio)).is_relative_to(folder):
        return f"audio_filepath {_shown(audio)} leaves {folder}, the manifest's folder: move it there, or write an absolute path"
    return None


# The keys are the same strings in every line: a third of a large manifest's memory.
_DECODER = json.JSONDecoder(object_pairs_hook=lambda pairs: {intern(key): value for key, value in pairs})


def _check_values(fields: dict[str, Any]) -> None:
    id, text, seconds, span, offset = (fields.get(key) for key in ("id", "text", "duration", "audio_bytes", "offset"))
    if id is not None and (type(id) not in (str, int) or id == ""):  # a bool is an int to isinstance
        raise ValueError(f"id is {_shown(id)}, expected a string: correct it, or leave it out to have one made from the file's name")
    if text is not None and not isinstance(text, str):
        raise ValueError(f"text is {_shown(text)}, expected a string: correct it, or leave it out if there is no transcript")
    if seconds is not None and not (type(seconds) in (int, float) and 0 < seconds < math.inf):
        raise ValueError(f"duration is {_shown(seconds)}, expected seconds > 0: correct it, or leave it out")
    if span is not None and not (isinstance(span, list) and [type(x) for x in span] == [int, int] and span[0] >= 0 and span[1] > 0):
        raise ValueError(f"audio_bytes is {_shown(span)}, expected [offset, size] in bytes: correct it, or leave it out for a whole file")
    if offset is not None and offset != 0:
        raise ValueError(f"offset is {_shown(offset)}, and segments of files are not supported: cut it into a file of its own")


def _first(problems: list[Problem]) -> str:
    return f"; first problem: {problems[0]}" if problems else ""


def _shown(value: object) -> str:
    return text if len(text := repr(value)) <= 80 else text[:77] + "..."


def _files_below(path: Path) -> list[Path]:
    """Files of all depths, sorted by path; hidden ones (.DS_Store, ._a.wav) left out."""
    found = []
    for folder, folders, names in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(found)


def _transcripts(path: Path) -> list[Path]:
    return [file for file in _files_below(path) if file.name.endswith(".trans.txt")]


def _looks_like_manifest(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"{"


def _collected(files: list[Path], folder: Path) -> Source:
    """Audio files with the text beside each; the id is the path below the folder, without suffix where that is clear."""
    names = Counter(file.with_suffix("") for file in files)
    utterances, problems = [], []
    for file in files:
        name = (file.with_suffix("") if names[file.with_suffix("")] == 1 else file).relative_to(folder).as_posix()
        beside = file.with_suffix(".txt")
        try:
            text = " ".join(beside.read_text(encoding="utf-8-sig").split()) if beside.is_file() else None
        except (OSError, UnicodeDecodeError) as error:
            problems.append(Problem(str(beside), f"cannot be read ({type(error).__name__}): save it as UTF-8, or remove it"))
            continue
        utterances.append(_utterance(name, file, folder, text=text))
    if not utterances:
        raise SourceError(f"{folder}: no usable audio file{_first(problems)}")
    return Source(tuple(utterances), tuple(problems))


def _utterance(id: str, audio: Path, folder: Path, *, text: str | None, speaker: str | None = None) -> Utterance:
    try:
        seconds = duration_of(audio)
    except AudioError:
        seconds = None  # reading it will say why, for this utterance alone
    duration = None if seconds is None else round(seconds, 4)
    known = {"id": id, "audio_filepath": audio.relative_to(folder).as_posix(), "duration": duration, "text": text, "speaker": speaker}
    return Utterance(id, audio, seconds, text, {key: value for key, value in known.items() if value is not None})
