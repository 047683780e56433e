"""Word error rate with everything it needs to be compared: S/D/I, domains, bootstrap interval, significance, signature."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import add
from typing import Any, Literal

import kaldialign
import numpy as np
from numpy.typing import NDArray

from duolect.evaluate.bootstrap import DRAWS, Interval, percentiles, rate_interval, resampled_sums
from duolect.evaluate.normalize import Normalizer
from duolect.run import source
from duolect.scorer import Recognized

RUNAWAY, RUNAWAY_LEAST = 0.5, 5  # insertions of an utterance that ran away: share of the reference's words, and how many at least
_GAP = ""  # kaldialign's sign for nothing; words are never empty


class ScoreError(ValueError):
    """References and hypotheses, or two systems, cannot be compared, or lists not be tuned on; the message names the ids."""


@dataclass(frozen=True)
class Errors:
    """Word edits against a reference of `words` words; adds up."""

    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0
    words: int = 0

    @property
    def total(self) -> int:
        return self.substitutions + self.deletions + self.insertions

    @property
    def rate(self) -> float:
        """Percent of the words; without words 0 or, if there are insertions, infinite."""
        return 100.0 * self.total / self.words if self.words else math.inf if self.total else 0.0

    def __add__(self, other: Errors) -> Errors:
        return Errors(*map(add, vars(self).values(), vars(other).values()))


@dataclass(frozen=True)
class ScoredUtterance:
    """One utterance: normalized texts and their errors. group: the unit that the bootstrap draws (the speaker, or the utterance itself)."""

    id: str
    group: str
    reference: str
    hypothesis: str
    errors: Errors
    failed: bool


@dataclass(frozen=True)
class DomainScore:
    errors: Errors
    interval: Interval | None
    utterances: int


@dataclass(frozen=True)
class Score:
    """The WER of a system on a corpus.

    interval: 95%, None for fewer than two units. sentence_error_rate: percent of utterances with an error. failed: ids without a
    hypothesis, all of whose words are counted as deleted. empty_references: ids whose normalized reference has no word; the words of
    their hypotheses are insertions. seconds: of compute; audio_seconds: of the speech that was recognized.
    """

    errors: Errors
    interval: Interval | None
    sentence_error_rate: float
    domains: Mapping[str, DomainScore]
    utterances: tuple[ScoredUtterance, ...]
    failed: tuple[str, ...]
    empty_references: tuple[str, ...]
    signature: str
    seconds: float
    audio_seconds: float

    @property
    def rtf(self) -> float | None:
        """Seconds of compute per second of audio; None where either is unknown."""
        return self.seconds / self.audio_seconds if self.seconds and self.audio_seconds else None

    @property
    def runaways(self) -> int:
        """Utterances whose hypothesis ran on: insertions for half of the reference's words or more, five at least."""
        counts = ((u.errors.insertions, u.errors.words) for u in self.utterances)
        return sum(inserted >= max(RUNAWAY_LEAST, RUNAWAY * words) for inserted, words in counts)

    def __str__(self) -> str:
        e, interval = self.errors, f" {self.interval}" if self.interval else ""
        counts = f"({e.total}/{e.words} words: {e.substitutions} S, {e.deletions} D, {e.insertions} I)"
        return f"WER {e.rate:.2f}{interval} {counts} {self.signature}"


@dataclass(frozen=True)
class Comparison:
    """How much another system differs from a baseline, on the same utterances.

    difference: other minus baseline in WER points, negative where the other is better. p_value: two-sided, of a difference this far from 0.
    better: the fraction of draws in which the other has fewer errors.
    """

    difference: float
    interval: Interval | None
    p_value: float
    better: float


def count_errors(reference: str, hypothesis: str, *, merge_compounds: bool = False) -> Errors:
    """The fewest word edits that turn the reference into the hypothesis; words are what white space separates.

    merge_compounds: adjacent words of one side may together match one word of the other free of cost (`white paper`, `whitepaper`), as
    the Open ASR Leaderboard has it.
    """
    ours, theirs = reference.split(), hypothesis.split()
    if ours == theirs:
        return Errors(words=len(ours))
    edits = kaldialign.edit_distance(ours, theirs, merge_compounds=merge_compounds)
    return Errors(int(edits["sub"]), int(edits["del"]), int(edits["ins"]), len(ours))


def alignment_lines(reference: str, hypothesis: str, *, merge_compounds: bool = False, width: int = 120) -> list[str]:
    """Three lines (reference, hypothesis, S/D/I below each error), broken into blocks of at most `width` columns."""
    pairs = kaldialign.align(reference.split(), hypothesis.split(), _GAP, merge_compounds=merge_compounds)
    cells = []
    for ours, theirs in pairs:
        merged = merge_compounds and ours.replace(" ", "") == theirs.replace(" ", "")
        mark = "I" if ours == _GAP else "D" if theirs == _GAP else "" if ours == theirs or merged else "S"
        wide = max(len(ours), len(theirs))
        cells.append(((ours or "*" * wide).ljust(wide), (theirs or "*" * wide).ljust(wide), mark.ljust(wide)))
    blocks: list[list[tuple[str, str, str]]] = [[]]
    room = width - 5
    for cell in cells:
        if blocks[-1] and room < len(cell[0]):
            blocks.append([])
            room = width - 5
        blocks[-1].append(cell)
        room -= len(cell[0]) + 1
    heads = ("REF: ", "HYP: ", "     ")
    return [(head + " ".join(cell[row] for cell in block)).rstrip() for block in blocks for row, head in enumerate(heads)]


def score_recognized(
    recognized: Iterable[Recognized],
    *,
    normalizer: Normalizer,
    corpus: str = "",
    unit: Literal["utterance", "speaker"] = "utterance",
    merge_compounds: bool = False,
) -> Score:
    """The WER of the lines of a hypotheses file, with domain and speaker as the lines have them; failed ones count as deleted.

    unit: what the bootstrap draws; the utterances of a speaker hang together, so their interval is wider. ScoreError for an id twice, a
    line without reference or, where speakers are drawn, without speaker.
    """
    lines: dict[str, Recognized] = {}
    for line in recognized:
        if line.id in lines:
            raise ScoreError(f"id {line.id!r} stands twice in the hypotheses; a WER over it would count the utterance twice")
        lines[line.id] = line
    if without := [k for k, x in lines.items() if not isinstance(x.fields.get("text"), str)]:
        raise ScoreError(f"{len(without)} of {len(lines)} lines have no reference in their field 'text': {_some(without)}")
    if unit == "speaker" and (without := [k for k, x in lines.items() if x.fields.get("speaker") is None]):
        raise ScoreError(f"{len(without)} of {len(lines)} utterances have no speaker: {_some(without)}")
    scored, domains = [], dict[str, list[ScoredUtterance]]()
    for key, line in lines.items():
        failed = line.error is not None
        ours, theirs = normalizer(line.fields["text"]), normalizer("" if failed else line.text)
        errors = count_errors(ours, theirs, merge_compounds=merge_compounds)
        group = str(line.fields["speaker"]) if unit == "speaker" else key
        scored.append(ScoredUtterance(key, group, ours, theirs, errors, failed))
        domain = line.fields.get("domain")
        domains.setdefault("other" if domain is None else str(domain), []).append(scored[-1])
    facts = {
        "norm": normalizer,
        "align": f"kaldialign@{kaldialign.__version__}",
        "compounds": "merged" if merge_compounds else "apart",
        "corpus": corpus.replace("|", "/") or "?",
        "utts": len(scored),
        "boot": f"{DRAWS}x{unit}@0",
        "duolect": source(),
    }
    if not any(line.fields.get("domain") is not None for line in lines.values()):
        domains = {}
    return Score(
        errors=sum((x.errors for x in scored), Errors()),
        interval=_interval(scored),
        sentence_error_rate=100.0 * sum(x.errors.total > 0 or x.failed for x in scored) / max(1, len(scored)),
        domains={
            name: DomainScore(sum((x.errors for x in part), Errors()), _interval(part), len(part)) for name, part in sorted(domains.items())
        },
        utterances=tuple(scored),
        failed=tuple(x.id for x in scored if x.failed),
        empty_references=tuple(x.id for x in scored if not x.reference),
        signature="|".join(f"{name}:{value}" for name, value in facts.items()),
        seconds=sum(x.seconds for x in lines.values()),
        audio_seconds=sum(float(x.fields.get("duration") or 0.0) for x in lines.values() if x.error is None),
    )


def compare(baseline: Score, other: Score, *, names: tuple[str, str] = ("the first", "the second")) -> Comparison:
    """The paired bootstrap of two systems on the same utterances (Bisani and Ney 2004): both are drawn together.

    names: of the two, for messages. ScoreError unless both were scored on the same ids with the same references.
    """
    ours, theirs = ({x.id: x for x in s.utterances} for s in (baseline, other))
    if ours.keys() != theirs.keys():
        only = [x for x in ours if x not in theirs], [x for x in theirs if x not in ours]
        raise ScoreError(
            f"{names[0]} and {names[1]} were not scored on the same utterances: {len(only[0])} only in {names[0]} ({_some(only[0])}), "
            f"{len(only[1])} only in {names[1]} ({_some(only[1])})"
        )
    if changed := [k for k, x in ours.items() if (x.reference, x.group) != (theirs[k].reference, theirs[k].group)]:
        raise ScoreError(
            f"{len(changed)} utterances have another reference or bootstrap unit in {names[1]} than in {names[0]}: {_some(changed)}"
        )
    pairs = np.array([(x.errors.total, theirs[k].errors.total, x.errors.words) for k, x in ours.items()], np.int64).reshape(-1, 3)
    changed_by, words = int(pairs[:, 1].sum() - pairs[:, 0].sum()), int(pairs[:, 2].sum())
    difference = 100.0 * changed_by / words if words else math.copysign(math.inf, changed_by) if changed_by else 0.0
    units = _by_group([x.group for x in ours.values()], pairs)
    if len(units) < 2 or not words:
        return Comparison(difference, None, 1.0, 0.5)
    sums = resampled_sums(units)
    sums = sums[sums[:, 2] > 0]
    changes = 100.0 * (sums[:, 1] - sums[:, 0]) / sums[:, 2]
    # Counted from the side of 0, with the sample itself as one more draw, so p is never 0 (Davison and Hinkley 1997, 4.2).
    tail = (min(np.count_nonzero(changes <= 0), np.count_nonzero(changes >= 0)) + 1) / (len(changes) + 1)
    better = np.count_nonzero(changes < 0) + 0.5 * np.count_nonzero(changes == 0)
    return Comparison(difference, percentiles(changes), float(min(1.0, 2 * tail)), float(better / len(changes)))


def score_json(result: Score) -> dict[str, Any]:
    """A Score as JSON values."""

    def of(e: Errors, interval: Interval | None) -> dict[str, Any]:
        return {
            "wer": e.rate if math.isfinite(e.rate) else None,
            "interval": interval and [interval.low, interval.high],
            "substitutions": e.substitutions,
            "deletions": e.deletions,
            "insertions": e.insertions,
            "words": e.words,
        }

    return {
        **of(result.errors, result.interval), "sentence_error_rate": result.sentence_error_rate, "utterances": len(result.utterances),
        "failed": list(result.failed), "empty_references": list(result.empty_references), "signature": result.signature,
        "runaways": result.runaways,
        "domains": {k: {**of(d.errors, d.interval), "utterances": d.utterances} for k, d in result.domains.items()},
        "seconds": result.seconds or None, "audio_seconds": result.audio_seconds, "rtf": result.rtf,
    }  # fmt: skip


def _interval(scored: Sequence[ScoredUtterance]) -> Interval | None:
    counts = np.array([(x.errors.total, x.errors.words) for x in scored], np.int64).reshape(-1, 2)
    units = _by_group([x.group for x in scored], counts)
    return rate_interval(units[:, 0], units[:, 1])


def _by_group(groups: Sequence[str], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """[U, C] sums of counts [N, C] over the utterances of each group."""
    # In the order of their names, so that the seed gives the same draws whatever the order of the file.
    place = {name: i for i, name in enumerate(sorted(set(groups)))}
    sums = np.zeros((len(place), counts.shape[1]), np.int64)
    np.add.at(sums, [place[name] for name in groups], counts)
    return sums


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids[:3]) + (", ..." if len(ids) > 3 else "") if ids else "none"
