"""What of a corpus can be learned from, and why the rest cannot."""

from __future__ import annotations

import json
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from duolect.audio.io import SAMPLE_RATE, AudioError, duration_of
from duolect.data.utterance import Utterance, load_audio
from duolect.vocabulary import Vocabulary

Case = Literal["lower", "upper", "keep"]
Reason = Literal["corrupt", "no text", "characters outside the vocabulary", "too long", "too short", "fewer frames than labels"]


class DataError(ValueError):
    """Too much of the data cannot be used; one line: counts by reason, an example, the next step."""


@dataclass(frozen=True, slots=True)
class Labelled:
    """An utterance to learn from, whose seconds are known, and the labels of its text, which fit into its frames."""

    utterance: Utterance
    labels: tuple[int, ...]

    @property
    def seconds(self) -> float:
        return self.utterance.seconds or 0.0


@dataclass(frozen=True, slots=True)
class Skipped:
    """An utterance that was left out; cause: what is wrong with this one."""

    id: str
    audio_filepath: str
    reason: str
    cause: str


@dataclass(frozen=True)
class Usable:
    """What can be learned from, in the corpus' order, and what was left out."""

    items: tuple[Labelled, ...]
    skipped: tuple[Skipped, ...]


class _Unusable(Exception):
    def __init__(self, reason: Reason, cause: str) -> None:
        self.reason, self.cause = reason, cause


def usable(
    utterances: Iterable[Utterance],
    vocabulary: Vocabulary,
    *,
    seconds_per_frame: float,
    max_seconds: float = 19.5,
    min_seconds: float = 0.1,
    case: Case = "lower",
    max_share_lost: float = 0.2,
    skipped: Path | None = None,
) -> Usable:
    """The utterances that a CTC model of these labels can learn from; the others with reasons, also as JSONL in the file `skipped`.

    seconds_per_frame: of the encoder's output; times the fastest speed of augmentation. case: what is made of a text before encoding.
    Corrupt files are found by header and size. Raises DataError where more than max_share_lost of the utterances, or all, are left out.
    """
    numbers = list(range(vocabulary.size))  # one object a label: a large corpus has a billion of them
    items: list[Labelled] = []
    lost: list[Skipped] = []
    for utterance in utterances:
        try:
            labels = _labels(utterance, vocabulary, case)
            utterance = _measured(utterance)
            _require_fit(utterance.seconds or 0.0, labels, seconds_per_frame, min_seconds, max_seconds)
        except _Unusable as error:
            lost.append(Skipped(utterance.id, str(utterance.audio), error.reason, error.cause))
        else:
            items.append(Labelled(utterance, tuple(numbers[x] for x in labels)))
    if skipped is not None:
        write_lines(skipped, [asdict(x) for x in lost])
    mend = "mend the data, choose units and limits for it, or accept a larger share (max_share_lost)"
    require_share(lost, of=len(items) + len(lost), most=max_share_lost, listed=skipped, mend=mend)
    return Usable(tuple(items), tuple(lost))


def require_share(lost: Sequence[Skipped], *, of: int, most: float, listed: Path | None, mend: str) -> None:
    """Raises DataError where more than the share `most` of so many utterances, or all of them, are lost; mend: the next step."""
    if lost and (len(lost) == of or len(lost) > most * of):
        counts = Counter(x.reason for x in lost).most_common()
        example = next(x for x in lost if x.reason == counts[0][0])
        reasons = ", ".join(f"{reason}: {count}" for reason, count in counts)
        raise DataError(
            f"{len(lost)} of {of} utterances cannot be used ({reasons}), such as {example.id} ({example.cause}); "
            f"{'that is all of them' if len(lost) == of else f'more than {most:.0%} is not accepted'}: {mend}"
            f"{f'; {listed} lists them' if listed else ''}"
        )


def write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Writes a JSONL file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    with open(part, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def with_case(text: str, case: Case) -> str:
    """The text in lower or upper case, or as it is."""
    return text.lower() if case == "lower" else text.upper() if case == "upper" else text


def _labels(utterance: Utterance, vocabulary: Vocabulary, case: Case) -> list[int]:
    text = " ".join(with_case(utterance.text or "", case).split())
    if not text:
        raise _Unusable("no text", "has no transcript")
    labels = vocabulary.encode(text)
    if _letters(said := vocabulary.decode(labels)) != _letters(text):
        strange = "".join(sorted(set(_letters(text)) - set(_letters(said)))) or text
        raise _Unusable("characters outside the vocabulary", f"{strange[:60]!r} cannot be written in labels")
    return labels


def _letters(text: str) -> str:
    """What ways of writing a text have in common: SentencePiece changes compatibility forms, character vocabularies the case."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())


def _measured(utterance: Utterance) -> Utterance:
    """The utterance with its seconds. Raises _Unusable where there is no audio for it."""
    try:
        if utterance.seconds is None:
            whole = utterance.span is None
            return replace(utterance, seconds=duration_of(utterance.audio) if whole else len(load_audio(utterance)) / SAMPLE_RATE)
        there = os.stat(utterance.audio).st_size
    except (AudioError, OSError) as error:
        raise _Unusable("corrupt", str(error)) from error
    offset, size = utterance.span or (0, 1)
    if offset + size > there:
        raise _Unusable("corrupt", f"{utterance.audio} ends at byte {there}, before it")
    return utterance


def _require_fit(seconds: float, labels: Sequence[int], seconds_per_frame: float, least: float, most: float) -> None:
    if seconds > most:
        raise _Unusable("too long", f"{seconds:.2f} s, more than {most:g}")
    if seconds < least:
        raise _Unusable("too short", f"{seconds:.2f} s, less than {least:g}")
    frames, repeats = int(seconds / seconds_per_frame), sum(a == b for a, b in pairwise(labels))
    if frames < len(labels) + repeats:  # CTC needs a blank between equal labels
        raise _Unusable("fewer frames than labels", f"{seconds:.2f} s are {frames} frames for {len(labels)} labels with {repeats} repeats")
