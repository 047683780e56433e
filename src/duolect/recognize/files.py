"""Results on disk that a killed run goes on with: hypotheses files, and transcripts as txt, json, srt, vtt, ctm."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from duolect.config import diff, digest, to_json
from duolect.data.utterance import Utterance
from duolect.recognize.models import state_of
from duolect.recognize.recognizer import Recognizer
from duolect.run import source, write_json
from duolect.scorer import Recognized, read_hypotheses, write_hypotheses
from duolect.search.align import Word

Format = Literal["txt", "json", "srt", "vtt", "ctm"]
INDEX = ".duolect.tsv"
ELSEWHERE = "name another --out, or delete it (decode, rescore and compare can --overwrite)"
LINE_SECONDS, LINE_LETTERS = 6.0, 84
"""A subtitle is at most so long in time and in letters."""


class ResumeError(ValueError):
    """What lies where results are to be written is not theirs to continue or to replace."""


class Growing:
    """A hypotheses file in the making: lines are kept in `<out>.part` as they come; `<out>.part.json` says what makes them.

    Beside the finished file that stays, as `<out>.json` (`read_settings`), so that the same run again finds it finished, and another one
    leaves it alone unless it may overwrite it.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any], *, overwrite: bool = False) -> None:
        self.out, self.part = out, Path(f"{out}.part")
        self.settings = {**settings, "duolect": str(source())}
        self.found = next((x for x in (self.part, out) if x.is_file() and x.stat().st_size), None)
        made = _header(self.found) if self.found else self.settings
        changes = ["nobody says what made it"] if made is None else diff(made, self.settings)
        # Another version alone does not make what is there worthless, but it is said.
        self.older = changes if changes and changes[0].startswith("duolect:") and len(changes) == 1 else []
        self.others = changes if overwrite or not self.older else []
        if self.others and overwrite:
            self.found, self.others = None, []

    @cached_property
    def there(self) -> list[Recognized]:
        """The lines of the killed or finished run, without a torn last one."""
        return list(read_hypotheses(self.found)) if self.found else []

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
    """ResumeError if results by other settings, or nobody knows which, lie where one of the files shall grow; it names what differs."""
    if others := [g for g in growing if g.others]:
        first, more = others[0], f" (and {len(others) - 1} files more)" if others[1:] else ""
        changes = "; ".join(first.others[:4]) + ("; ..." if first.others[4:] else "")
        what = "an unfinished run" if first.found == first.part else "results"
        raise ResumeError(f"{first.found}: {what} of other settings{more}: {changes}: {ELSEWHERE}")


def decode_to_files(
    recognizer: Recognizer,
    utterances: Sequence[Utterance],
    outs: Mapping[str, Path],
    *,
    progress: bool = True,
    keep: int | None = None,
    overwrite: bool = False,
) -> dict[str, list[Recognized]]:
    """What each decoding in `outs` made of the utterances, in their order, as its hypotheses file has it, which is written.

    What is there already by the same settings is not made again, be the run killed or finished (`Growing`), but failures are; ResumeError
    if it is by other ones or has other utterances, unless they may be overwritten. keep: at most so many hypotheses a line.
    """
    growing = {name: Growing(out, {**settings_of(recognizer, name), "keep": keep}, overwrite=overwrite) for name, out in outs.items()}
    refuse_others(growing.values())
    known = {name: _done(g, utterances, overwrite) for name, g in growing.items()}
    rest: dict[tuple[str, ...], list[Utterance]] = {}
    for u in utterances:
        rest.setdefault(tuple(name for name in outs if u.id not in known[name]), []).append(u)
    finished = len(rest.pop((), ()))
    if finished and outs:
        say, first = recognizer.models.say, next(iter(growing.values()))
        by = "".join(f" ({change})" for change in first.older)
        if finished < len(utterances):
            say(f"continuing {first.found}: {finished} of {len(utterances)} utterances are done{by}")
        else:
            say(f"{', '.join(map(str, outs.values()))}: finished already{by}: nothing to recognize")
        # Not made again for that: data that a cluster stages for every job is always newer.
        since, done = (
            first.found.stat().st_mtime_ns if first.found else 0,
            {u.audio for u in utterances if all(u.id in k for k in known.values())},
        )
        if newer := sum(audio.is_file() and audio.stat().st_mtime_ns > since for audio in done):
            say(f"warning: {newer} of the audio files changed after {first.found}: --overwrite, if it is other audio")
    with ExitStack() as stack:
        ids = [u.id for u in utterances]
        made = [name for name, g in growing.items() if g.found != g.out or not list(known[name]) == [r.id for r in g.there] == ids]
        add = {name: stack.enter_context(growing[name].adding(list(known[name].values()))) for name in outs if name in made}
        for names, undone in rest.items():
            missing = replace(recognizer, decodings={name: recognizer.decodings[name] for name in names})
            for found in missing.recognize(undone, progress=progress):
                for name, line in found.items():
                    known[name][line.id] = line = replace(line, nbest=line.nbest[:keep])
                    add[name](line)
    for name in made:
        growing[name].finish([known[name][u.id] for u in utterances])
    # As the files have it, where numbers are rounded: whoever goes on finds the same ones.
    return {name: list(read_hypotheses(out)) for name, out in outs.items()}


def settings_of(recognizer: Recognizer, name: str) -> dict[str, Any]:
    """All that the results of a decoding depend on beside the audio, as JSON values."""
    decoding = recognizer.decodings[name]
    of = to_json(decoding)
    models = sorted({recognizer.acoustic, *_models_in(of)})
    said = {"acoustic": recognizer.acoustic, "precision": recognizer.models.precision, "word_times": recognizer.word_times}
    return {**said, "models": {name: state_of(name) for name in models}, "decoding": of}


def _models_in(value: Any) -> Iterator[str]:
    """The models that a decoding's JSON names."""
    for key, inner in value.items() if isinstance(value, Mapping) else ():
        if key == "model" and isinstance(inner, str):
            yield inner
        else:
            yield from _models_in(inner)


def read_settings(hypotheses: Path) -> dict[str, Any]:
    """What `settings_of` said of the decoding that made a hypotheses file, and what `duolect rescore` added; empty where nobody knows."""
    found = _header(hypotheses)
    return found if isinstance(found, dict) else {}


def _header(part: Path) -> Any:
    try:
        return json.loads(Path(f"{part}.json").read_text())
    except (OSError, ValueError):
        return None


def _done(growing: Growing, utterances: Sequence[Utterance], overwrite: bool) -> dict[str, Recognized]:
    """The lines there are of these utterances, by id; what failed is tried again."""
    fields = {u.id: {k: v for k, v in u.fields.items() if v is not None and k != "duration"} for u in utterances}
    lines = growing.there
    if growing.found == growing.out and not overwrite and (lost := [r.id for r in lines if r.id not in fields]):
        raise ResumeError(
            f"{growing.out}: is finished and has {len(lost)} utterances that are not asked for now, such as {lost[0]}: {ELSEWHERE}"
        )
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

    def is_others(self, name: str) -> bool:
        """Whether a file of that name is there that this folder does not know: a reference beside its audio, perhaps."""
        return (self.folder / name).is_file() and name not in self.made

    def write(self, name: str, audio: Path, text: str) -> None:
        """Writes the file, whole or not at all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / f"{name}.part"
        part.write_text(text, encoding="utf-8")
        self._note(name, "")  # a kill behind this leaves a file that is known as ours, and made again
        part.replace(self.folder / name)
        self._note(name, self._mark(audio))

    def _note(self, name: str, mark: str) -> None:
        with open(self.folder / INDEX, "a", encoding="utf-8") as lines:
            lines.write(f"\n{name}\t{mark}")

    def _mark(self, audio: Path) -> str:
        return digest({**self.settings, "audio": str(audio.absolute()), "changed": audio.stat().st_mtime_ns if audio.exists() else None})


def written(recognized: Recognized, form: Format) -> str:
    """The transcript in one of the formats; all but txt need a recognizer with word_times."""
    if form == "txt":
        return recognized.text + "\n"
    if form == "json":
        return json.dumps(recognized.to_json(), ensure_ascii=False) + "\n"
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
