"""Results on disk: a hypotheses file that a killed run goes on with, and transcripts as txt, json, srt, vtt, ctm."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from duolect.config import digest, to_json
from duolect.data.utterance import Utterance
from duolect.recognize.recognizer import Recognizer
from duolect.run import write_json
from duolect.scorer import Recognized, read_hypotheses, write_hypotheses
from duolect.search.align import Word

Format = Literal["txt", "json", "srt", "vtt", "ctm"]
LINE_SECONDS, LINE_LETTERS = 6.0, 84
"""A subtitle is at most so long in time and in letters."""


class ResumeError(ValueError):
    """An unfinished output belongs to another decoding."""


def decode_to_file(
    recognizer: Recognizer, name: str, utterances: Sequence[Utterance], out: Path, *, progress: bool = True, keep: int | None = None
) -> list[Recognized]:
    """Recognizes with one decoding into a hypotheses file, in the source's order; a run that was killed continues where it was.

    Lines are kept in `<out>.part` as they come; `<out>.part.json` says of which decoding, and ResumeError if it is another one.
    keep: at most so many hypotheses a line.
    """
    part, header = Path(f"{out}.part"), Path(f"{out}.part.json")
    out.parent.mkdir(parents=True, exist_ok=True)
    decoding = recognizer.decodings[name]
    settings = {"precision": recognizer.models.precision, "word_times": recognizer.word_times, "keep": keep}
    wanted = {"acoustic": recognizer.acoustic, "decoding": to_json(decoding), "digest": digest(decoding), **settings}
    ids = {u.id for u in utterances}
    known = {r.id: r for r in _done(part, header, wanted) if r.id in ids and r.error is None}  # what failed is tried again
    write_json(header, wanted)
    if known:
        recognizer.models.say(f"continuing {part}: {len(known)} of {len(utterances)} utterances are done")
    write_hypotheses(part, list(known.values()))  # also drops a torn last line
    with open(part, "a", encoding="utf-8") as lines:
        for found in recognizer.recognize([u for u in utterances if u.id not in known], progress=progress):
            line = found[name]
            line = replace(line, nbest=line.nbest[:keep]) if keep else line
            known[line.id] = line
            lines.write(json.dumps(line.to_json(), ensure_ascii=False) + "\n")
            lines.flush()
    ordered = [known[u.id] for u in utterances]
    write_hypotheses(out, ordered)
    part.unlink()
    header.unlink()
    return ordered


def _done(part: Path, header: Path, wanted: Mapping[str, Any]) -> list[Recognized]:
    if not part.is_file() or part.stat().st_size == 0:
        return []
    try:
        stored = json.loads(header.read_text())
    except (OSError, ValueError):
        stored = None
    if stored != json.loads(json.dumps(wanted)):
        raise ResumeError(f"{part} is an unfinished run of another decoding, model or setting: delete it, or name another output")
    return list(read_hypotheses(part))


def written(recognized: Recognized, form: Format) -> str:
    """The transcript in one of the formats; all but txt need a recognizer with word_times."""
    words = [Word(**w) for w in recognized.extra.get("words", ())]
    return {"txt": _txt, "json": _json, "srt": _srt, "vtt": _vtt, "ctm": _ctm}[form](recognized, words)


def _txt(recognized: Recognized, words: Sequence[Word]) -> str:
    return recognized.text + "\n"


def _json(recognized: Recognized, words: Sequence[Word]) -> str:
    return json.dumps(recognized.to_json(), ensure_ascii=False, indent=1) + "\n"


def _srt(recognized: Recognized, words: Sequence[Word]) -> str:
    return "\n".join(f"{i}\n{_span(line, ',')}\n{_text(line)}\n" for i, line in enumerate(_subtitles(words), start=1))


def _vtt(recognized: Recognized, words: Sequence[Word]) -> str:
    return "\n".join(["WEBVTT\n", *(f"{_span(line, '.')}\n{_text(line)}\n" for line in _subtitles(words))])


def _ctm(recognized: Recognized, words: Sequence[Word]) -> str:
    name = recognized.id.replace(" ", "_")
    return "".join(f"{name} 1 {w.start:.2f} {w.end - w.start:.2f} {w.text} {w.confidence:.3f}\n" for w in words)


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
        if (
            not lines
            or word.start - lines[-1][-1].end > 0.8
            or word.end - lines[-1][0].start > LINE_SECONDS
            or len(_text([*lines[-1], word])) > LINE_LETTERS
        ):
            lines.append([])
        lines[-1].append(word)
    return lines
