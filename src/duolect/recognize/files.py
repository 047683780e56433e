"""Results on disk that a killed run goes on with: hypotheses files, and transcripts as txt, json, srt, vtt, ctm."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from duolect.config import digest, to_json
from duolect.data.utterance import Utterance
from duolect.recognize.recognizer import Recognizer
from duolect.run import write_json
from duolect.scorer import Recognized, read_hypotheses, write_hypotheses
from duolect.search.align import Word

Format = Literal["txt", "json", "srt", "vtt", "ctm"]
INDEX = ".duolect.tsv"
LINE_SECONDS, LINE_LETTERS = 6.0, 84
"""A subtitle is at most so long in time and in letters."""


class ResumeError(ValueError):
    """An unfinished output belongs to another decoding."""


class Growing:
    """A hypotheses file in the making: lines are kept in `<out>.part` as they come; `<out>.part.json` says what makes them.

    Beside the finished file that stays, as `<out>.json` (`read_settings`).
    """

    def __init__(self, out: Path, settings: Mapping[str, Any]) -> None:
        self.out, self.settings, self.part = out, dict(settings), Path(f"{out}.part")

    @property
    def is_others(self) -> bool:
        """Whether an unfinished run with other settings lies there."""
        return self.part.is_file() and self.part.stat().st_size > 0 and _header(self.part) != self.settings

    def there(self) -> list[Recognized]:
        """The lines of the killed run, without a torn last one."""
        return list(read_hypotheses(self.part)) if self.part.is_file() else []

    @contextmanager
    def adding(self, kept: Sequence[Recognized]) -> Iterator[Callable[[Recognized], None]]:
        """What adds a line behind those kept of the killed run."""
        write_json(f"{self.part}.json", self.settings)
        write_hypotheses(self.part, kept)
        with open(self.part, "a", encoding="utf-8") as file:

            def add(line: Recognized) -> None:
                file.write(json.dumps(line.to_json(), ensure_ascii=False) + "\n")
                file.flush()

            yield add

    def finish(self, lines: Sequence[Recognized]) -> None:
        """Writes the finished file, of these lines."""
        write_hypotheses(self.out, lines)
        self.part.unlink()
        Path(f"{self.part}.json").replace(f"{self.out}.json")


def refuse_others(growing: Iterable[Growing]) -> None:
    """ResumeError if an unfinished run with other settings lies where one of the files shall grow."""
    if others := [g.part for g in growing if g.is_others]:
        names = ", ".join(map(str, others[:3])) + (", ..." if others[3:] else "")
        raise ResumeError(f"unfinished runs of another decoding, model or setting: {names}: delete them, or name another output")


def decode_to_files(
    recognizer: Recognizer, utterances: Sequence[Utterance], outs: Mapping[str, Path], *, progress: bool = True, keep: int | None = None
) -> dict[str, list[Recognized]]:
    """What each decoding in `outs` made of the utterances, in their order, written to its hypotheses file.

    A run that was killed continues where it was (`Growing`); ResumeError if it is one of another decoding. keep: at most so many
    hypotheses a line.
    """
    growing = {name: Growing(out, {**settings_of(recognizer, name), "keep": keep}) for name, out in outs.items()}
    refuse_others(growing.values())
    known = {name: _done(g, utterances) for name, g in growing.items()}
    rest: dict[tuple[str, ...], list[Utterance]] = {}
    for u in utterances:
        rest.setdefault(tuple(name for name in outs if u.id not in known[name]), []).append(u)
    if finished := len(rest.pop((), ())):
        recognizer.models.say(f"continuing {next(iter(growing.values())).part}: {finished} of {len(utterances)} utterances are done")
    with ExitStack() as stack:
        add = {name: stack.enter_context(g.adding(list(known[name].values()))) for name, g in growing.items()}
        for names, undone in rest.items():
            missing = replace(recognizer, decodings={name: recognizer.decodings[name] for name in names})
            for found in missing.recognize(undone, progress=progress):
                for name, line in found.items():
                    known[name][line.id] = line = replace(line, nbest=line.nbest[:keep])
                    add[name](line)
    ordered = {name: [known[name][u.id] for u in utterances] for name in outs}
    for name, g in growing.items():
        g.finish(ordered[name])
    return ordered


def decoded_once(
    recognizer: Recognizer, utterances: Sequence[Utterance], outs: Mapping[str, Path], *, progress: bool = True
) -> dict[str, list[Recognized]]:
    """As `decode_to_files`, but a finished file of these utterances is not made again. All is read from the files, where numbers are
    rounded: whoever goes on finds the same ones."""
    ids = [u.id for u in utterances]
    missing = {name: out for name, out in outs.items() if not out.is_file() or [r.id for r in read_hypotheses(out)] != ids}
    if missing:
        rest = replace(recognizer, decodings={name: recognizer.decodings[name] for name in missing})
        decode_to_files(rest, utterances, missing, progress=progress)
    return {name: list(read_hypotheses(out)) for name, out in outs.items()}


def settings_of(recognizer: Recognizer, name: str) -> dict[str, Any]:
    """All that the results of a decoding depend on beside the audio, as JSON values."""
    decoding = recognizer.decodings[name]
    models = {"acoustic": recognizer.acoustic, "precision": recognizer.models.precision, "word_times": recognizer.word_times}
    return {**models, "decoding": to_json(decoding), "digest": digest(decoding)}


def read_settings(hypotheses: Path) -> dict[str, Any]:
    """What `settings_of` said of the decoding that made a hypotheses file, and what `duolect rescore` added; empty where nobody knows."""
    found = _header(hypotheses)
    return found if isinstance(found, dict) else {}


def _header(part: Path) -> Any:
    try:
        return json.loads(Path(f"{part}.json").read_text())
    except (OSError, ValueError):
        return None


def _done(growing: Growing, utterances: Sequence[Utterance]) -> dict[str, Recognized]:
    """The lines of an unfinished file that are of these utterances, by id; what failed is tried again."""
    fields = {u.id: {k: v for k, v in u.fields.items() if v is not None and k != "duration"} for u in utterances}
    lines = growing.there()
    return {r.id: r for r in lines if r.error is None and r.id in fields and fields[r.id].items() <= r.fields.items()}


@dataclass(frozen=True)
class Transcripts:
    """A folder with a file per recording that knows of which audio and settings each is, so that no file is made twice."""

    folder: Path
    settings: Mapping[str, Any]

    @cached_property
    def made(self) -> dict[str, str]:
        """The mark of each file; a line of the index that was torn by a kill has none that fits."""
        index = self.folder / INDEX
        lines = index.read_text(encoding="utf-8").splitlines() if index.is_file() else ()
        return {name: mark for name, _, mark in (line.partition("\t") for line in lines)}

    def has(self, name: str, audio: Path) -> bool:
        """Whether the file is there, of this audio as it is now, by these settings."""
        return (self.folder / name).is_file() and self.made.get(name) == self._mark(audio)

    def write(self, name: str, audio: Path, text: str) -> None:
        """Writes the file, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / f"{name}.part"
        part.write_text(text, encoding="utf-8")
        part.replace(self.folder / name)
        with open(self.folder / INDEX, "a", encoding="utf-8") as lines:
            lines.write(f"\n{name}\t{self._mark(audio)}")

    def _mark(self, audio: Path) -> str:
        return digest({**self.settings, "audio": str(audio.absolute()), "changed": audio.stat().st_mtime_ns if audio.exists() else None})


def written(recognized: Recognized, form: Format) -> str:
    """The transcript in one of the formats; all but txt need a recognizer with word_times."""
    if form == "txt":
        return recognized.text + "\n"
    if form == "json":
        return json.dumps(recognized.to_json(), ensure_ascii=False, indent=1) + "\n"
    words = [Word(**w) for w in recognized.extra.get("words", ())]
    if form == "ctm":
        name = recognized.id.replace(" ", "_")
        return "".join(f"{name} 1 {w.start:.2f} {w.end - w.start:.2f} {w.text} {w.confidence:.3f}\n" for w in words)
    lines = _subtitles(words)
    if form == "srt":
        return "\n".join(f"{i}\n{_span(line, ',')}\n{_text(line)}\n" for i, line in enumerate(lines, start=1))
    return "\n".join(["WEBVTT\n", *(f"{_span(line, '.')}\n{_text(line)}\n" for line in lines)])


def _text(words: Sequence[Word]) -> str:
    return " ".join(w.text for w in words)


def _span(words: Sequence[Word], comma: str) -> str:
    return f"{_clock(words[0].start, comma)} --> {_clock(words[-1].end, comma)}"


def _clock(seconds: float, comma: str) -> str:
    whole, milliseconds = divmod(round(seconds * 1000), 1000)
    return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}{comma}{milliseconds:03d}"


def _subtitles(words: Sequence[Word]) -> list[list[Word]]:
    """Words in subtitles: a new one after a pause, when it gets too long, or has too many letters."""
    lines: list[list[Word]] = []
    for word in words:
        line = lines[-1] if lines else []
        late = bool(line) and (word.start - line[-1].end > 0.8 or word.end - line[0].start > LINE_SECONDS)
        if not line or late or len(_text([*line, word])) > LINE_LETTERS:
            lines.append([])
        lines[-1].append(word)
    return lines
