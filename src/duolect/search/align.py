"""Forced alignment of labels to CTC log-probs, and from it the times and confidences of words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from duolect.search.fusion import NEG
from duolect.vocabulary import Vocabulary


@dataclass(frozen=True)
class AlignedLabel:
    """A label on frames start .. end-1, with the greatest log-probability it reaches there."""

    label: int
    start: int
    end: int
    log_prob: float


@dataclass(frozen=True)
class Word:
    """A word of a transcript: seconds from the begin of the audio, confidence in 0..1 (geometric mean of its labels' peaks)."""

    text: str
    start: float
    end: float
    confidence: float


def align(log_probs: Tensor, labels: Sequence[int], *, blank: int) -> list[AlignedLabel] | None:
    """The best CTC path of labels through log_probs [T, V] as label spans; None where there are too few frames for it."""
    if not labels:
        return []
    x = log_probs.double().cpu()
    states = [blank] + [z for y in labels for z in (y, blank)]
    emit = x[:, states]
    skip = torch.tensor([s >= 2 and s % 2 == 1 and states[s] != states[s - 2] for s in range(len(states))])
    score = torch.full((len(states),), NEG, dtype=torch.double)
    score[:2] = emit[0, :2] if len(emit) else NEG
    back: list[Tensor] = []
    pad = torch.full((2,), NEG, dtype=torch.double)
    for row in emit[1:]:
        before = torch.cat([pad, score])
        options = torch.stack([score, before[1:-1], torch.where(skip, before[:-2], NEG)])
        best, step = options.max(0)
        back.append(step)
        score = best + row
    at = len(states) - 1 if float(score[-1]) >= float(score[-2]) else len(states) - 2
    if not math.isfinite(float(score[at])):
        return None
    path = [at]
    for step in reversed(back):
        at -= int(step[at])
        path.append(at)
    path.reverse()
    return [_span(path, emit, 2 * i + 1, y) for i, y in enumerate(labels)]


def _span(path: list[int], emit: Tensor, state: int, label: int) -> AlignedLabel:
    frames = [t for t, s in enumerate(path) if s == state]
    return AlignedLabel(label, frames[0], frames[-1] + 1, float(emit[frames, state].max()))


def words(aligned: Sequence[AlignedLabel], *, vocabulary: Vocabulary, seconds_per_frame: float) -> list[Word]:
    """The words of an aligned transcript with times and confidences."""
    groups: list[list[AlignedLabel]] = []
    for item in aligned:
        if not groups or vocabulary.starts_word(item.label):
            groups.append([])
        groups[-1].append(item)
    out = []
    for group in groups:
        text = vocabulary.decode([item.label for item in group]).strip()
        if text:
            spoken = [item for item in group if vocabulary.decode([item.label]).strip()] or group
            confidence = math.exp(sum(item.log_prob for item in spoken) / len(spoken))
            out.append(Word(text, spoken[0].start * seconds_per_frame, spoken[-1].end * seconds_per_frame, min(1.0, confidence)))
    return out


def pauses(blank: Tensor, *, longest: int) -> list[tuple[int, int]]:
    """[start, end) frames that cover log p(blank) [T] once, none longer than `longest`, cut where blank is surest for a while."""
    frames = len(blank)
    if frames <= longest:
        return [(0, frames)]
    # A pause is half a second rather than one frame: every label is surrounded by short blanks.
    smooth = torch.nn.functional.avg_pool1d(blank.float().clamp(min=-20)[None, None], 13, stride=1, padding=6, count_include_pad=False)[
        0, 0
    ]
    out, start = [], 0
    while frames - start > longest:
        first = start + longest // 2
        end = first + int(smooth[first : start + longest].argmax())
        out.append((start, end))
        start = end
    return [*out, (start, frames)]
