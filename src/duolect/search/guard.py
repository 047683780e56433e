"""The hallucination guard: what a CTC model, which cannot invent fluent text, says of each word of any system's transcript.

Costs are in nats: words that are not in the audio are dear, words that a weak model merely misheard are cheap. Legend: T frames, V labels.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from duolect.search.align import AlignedLabel, align
from duolect.search.fusion import NEG, SearchError
from duolect.search.prefix import FLOOR, IMPOSSIBLE, CtcPrefix
from duolect.vocabulary import Vocabulary

MOST_CELLS = 30_000_000  # frames x labels, and frames x words, looked at together: half a gigabyte, four minutes of anything
Policy = Literal["off", "warn", "truncate", "rejoint", "ctc"]
Cause = Literal["silence", "tail", "loop", "words", "unexplained"]
WHY = {"silence": "no speech", "tail": "end not heard", "loop": "not heard so often", "words": "not heard", "unexplained": "left out"}


@dataclass(frozen=True, kw_only=True)
class Guard:
    """Thresholds, chosen such that a CTC model of 35% WER believes the references of all of 97 recordings."""

    nats_per_label: float = 5.0  # what a label may cost; those of right transcripts cost 0 to 2 on average, of invented ones 7 to 20
    nats: float = 16.0  # a run of words is suspect that costs so much more than its labels may
    unexplained_seconds: float = 0.4  # speech without words, in all, that is suspect; right transcripts leave none
    pause_seconds: float = 0.5  # frames of speech at most so far apart are one stretch; three at least, fewer are misheard endings
    peak_nats: float = 2.3  # a frame is of speech if its best label is so much likelier than blank
    blind_repeats: int = 20  # passes of words which CTC cannot spell (digits) that are taken for a loop without evidence
    condemned: float = 0.5  # the share of suspect words, or of speech without words, that condemns the whole transcript


@dataclass(frozen=True)
class Evidence:
    """A word as it was written, what CTC heard of it, and why it is suspect (None: it is not). Times in seconds.

    log_ratio: log p of its frames under the best alignment less that of the best path there, per label, <= 0. None: CTC cannot spell the
    word, or no alignment has room for it.
    """

    text: str
    start: float
    end: float
    labels: int = 0
    log_ratio: float | None = None
    cause: Cause | None = None


class Loop(NamedTuple):
    """words[start : start + period * repeats] are the same `period` words `repeats` times; all 0 where nothing repeats."""

    start: int = 0
    period: int = 0
    repeats: int = 0


@dataclass(frozen=True)
class Verdict:
    """What CTC says of a transcript. unexplained: (start, end) seconds of speech without words; fits: there are frames for all labels.

    causes: why it is suspect, by Cause; empty where it is not. condemned: so much is wrong that the rest is not worth keeping.
    """

    words: tuple[Evidence, ...]
    unexplained: tuple[tuple[float, float], ...]
    loop: Loop
    fits: bool
    causes: Mapping[str, str]
    condemned: bool


class Guarded(NamedTuple):
    """A transcript after a policy, and what the policy did."""

    text: str
    action: Literal["none", "warned", "truncated", "rejoint", "replaced"]


def judge(words: Sequence[str], log_probs: Tensor, *, vocabulary: Vocabulary, seconds_per_frame: float, guard: Guard = Guard()) -> Verdict:
    """The verdict on a transcript of any spelling (white-space words) from the utterance's CTC log_probs [T, V]; T may be 0.

    SearchError where a recording is too long (MOST_CELLS).
    """
    plain, everything = [_plain(word) for word in words], range(len(words))
    case = _Case(words, plain, _spelled(plain, vocabulary), log_probs.double().cpu().clamp(min=FLOOR), vocabulary, seconds_per_frame, guard)
    kept, cause = case.supported() if len(log_probs) * len(words) <= MOST_CELLS else (list(everything), dict[int, Cause]())
    aligned = case.aligned(kept)
    if aligned is None:
        seconds = len(log_probs) * seconds_per_frame
        raise SearchError(f"{seconds:.0f} s of audio and {len(kept)} words are too much to judge at once: cut the recording into parts")
    evidence, spans = case.evidence(aligned), case.unexplained(aligned)
    cause |= {kept[i]: "words" for run in case.dear([evidence[i] for i in kept]) for i in run}
    causes = {c: f"{WHY[c]}: {' '.join(words[i] for i in sorted(cause) if cause[i] == c)[:80]}" for c in dict.fromkeys(cause.values())}
    left, told = sum(b - a for a, b in spans), sum(e.end - e.start for i, e in evidence.items() if i not in cause)
    if late := spans != [] and left >= guard.unexplained_seconds:
        causes["unexplained"] = f"{WHY['unexplained']}: {', '.join(f'{a:.2f}-{b:.2f} s' for a, b in spans)}"
    condemned = max(len(cause) / max(1, len(words)), late * left / max(left + told, 1e-9)) >= guard.condemned
    # Words that are not heard: where they would have to be, or else where the word before them ends.
    would = case.evidence(case.aligned(everything) or {}) if len(kept) < len(words) else {}
    found = list[Evidence]()
    for i, word in enumerate(words):
        end = found[-1].end if found else 0.0
        found.append(replace(evidence.get(i) or would.get(i) or Evidence(word, end, end), cause=cause.get(i)))
    return Verdict(tuple(found), tuple(spans), longest_loop(plain), case.fits(everything), causes, condemned)


def guarded(
    transcript: str, verdict: Verdict, *, policy: Policy, ctc: Callable[[], str] | None = None, rejoint: Callable[[], str] | None = None
) -> Guarded:
    """The transcript that the verdict is of, after the policy.

    warn changes nothing. truncate takes out the passes of a loop that are not heard, and the suspect words at the end. ctc: what `ctc()`
    gives, the CTC model's own transcript, where the verdict condemns it. rejoint: what `rejoint()` gives, recognized jointly with CTC,
    where anything is suspect; without the callable the action only says that it is to be done.
    """
    if policy == "off" or not verdict.causes:
        return Guarded(transcript, "none")
    if policy == "rejoint":
        return Guarded(rejoint() if rejoint else transcript, "rejoint")
    if policy == "ctc" and ctc and verdict.condemned:
        return Guarded(ctc(), "replaced")
    kept = [word for word in verdict.words if word.cause != "loop"]
    while kept and kept[-1].cause:
        kept.pop()
    if policy == "truncate" and len(kept) < len(verdict.words):
        return Guarded(" ".join(word.text for word in kept), "truncated")
    return Guarded(transcript, "warned")


def longest_loop(words: Sequence[str]) -> Loop:
    """The run in which most words repeat those of the pass before; of equals the one of the shortest period, then the first."""
    known: dict[str, int] = {}
    ids, best = np.array([known.setdefault(word, len(known)) for word in words]), Loop()
    for period in range(1, len(ids) // 2 + 1):
        same = np.concatenate([[False], ids[period:] == ids[:-period], [False]])
        edges = np.flatnonzero(same[1:] != same[:-1]).tolist()
        runs = (Loop(a, period, (b - a) // period + 1) for a, b in zip(edges[::2], edges[1::2], strict=True))
        best = max([best, *runs], key=lambda loop: loop.period * max(0, loop.repeats - 1))
    return best


def _plain(word: str) -> str:
    """The word in lower case; all but letters, their marks, digits and apostrophes inside is a space: "Two-nine." is "two nine"."""
    kept = (c if unicodedata.category(c)[0] in "LMN" or c == "'" else " " for c in unicodedata.normalize("NFC", word).replace("’", "'"))
    return " ".join(filter(None, (part.strip("'") for part in "".join(kept).lower().split())))


def _spelled(plain: Sequence[str], vocabulary: Vocabulary) -> list[list[int]]:
    """The labels of each word; none where the vocabulary lacks one of its letters, and nothing can be said of it."""
    out: list[list[int]] = []
    for word in plain:
        labels: list[int] = []
        for part in word.split():
            labels += vocabulary.encode_word(part, first=not labels and not any(out))
        out.append(labels if vocabulary.decode(labels).lower().split() == word.split() else [])
    return out


@dataclass(frozen=True)
class _Case:
    """A transcript and what CTC says of the audio, x [T, V]. Words go by their numbers."""

    words: Sequence[str]
    plain: Sequence[str]
    spelled: Sequence[list[int]]
    x: Tensor
    vocabulary: Vocabulary
    seconds: float
    guard: Guard

    def supported(self) -> tuple[list[int], dict[int, Cause]]:
        """The words left when runs are taken out without which the audio is likelier, and why the others are not among them."""
        kept, cause = list(range(len(self.words))), dict[int, Cause]()
        if not bool((self.x > self.x[:, self.vocabulary.blank, None]).any()):
            return [], dict.fromkeys(kept, "silence")
        while kept:
            spelled, loop = [self.spelled[i] for i in kept], longest_loop([self.plain[i] for i in kept])
            passes = run = range(loop.start + loop.period, loop.start + loop.period * loop.repeats)
            if loop.repeats < self.guard.blind_repeats or any(spelled[i] for i in passes):
                before, behind = self.scores(spelled)
                run, gain = self.worst(before, behind, spelled)
                if gain <= self.guard.nats:
                    break
                if loop.repeats and 2 * len(range(max(run.start, passes.start), min(run.stop, passes.stop))) > len(run):
                    # A loop loses its good name: its passes stay as long as the audio is the likelier for each.
                    heard = (before[passes.start :: loop.period] + behind[passes.stop]).max(1)[: loop.repeats]
                    run = range(passes.start + loop.period * int(heard.argmax()), passes.stop) or run
            looped = passes.start <= run.start < run.stop == passes.stop
            cause |= {kept[i]: "loop" if looped else "tail" if run.stop == len(kept) else "words" for i in run}
            kept = kept[: run.start] + kept[run.stop :]
        return kept, cause

    def scores(self, spelled: Sequence[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        """[words + 1, T + 1] log p of exactly the words before one in the frames before one, and of those from it on in the others."""
        backwards = self.forward(self.x.flip(0), [word[::-1] for word in spelled[::-1]])
        return self.forward(self.x, spelled), backwards[::-1, ::-1]

    def worst(self, before: np.ndarray, behind: np.ndarray, spelled: Sequence[list[int]]) -> tuple[range, float]:
        """The run whose removal makes the audio likelier most, and by how much beyond what its labels may cost; inf: it has no room."""
        bonus, n = self.guard.nats_per_label * np.cumsum([0, *map(len, spelled)]), len(spelled)
        best, run = NEG, range(n)
        for i in np.flatnonzero(before[:-1, -1] > NEG).tolist():
            score = (before[i] + behind[i + 1 :]).max(1) + bonus[i] - bonus[i + 1 :]
            j = int(score.argmax())
            if score[j] > NEG and score[j] >= best - 1e-6:  # of equals, the words furthest back: the first pass of a loop stays
                best, run = float(score[j]), range(i, i + 1 + j)
        return run if any(spelled[run.stop :]) else range(run.start, n), best - float(before[n, -1])

    def forward(self, x: Tensor, spelled: Sequence[list[int]]) -> np.ndarray:
        """[words + 1, T + 1] log p(exactly the first k words in the first t frames), -inf where they do not fit."""
        out = np.full((len(spelled) + 1, len(x) + 1), NEG)
        out[0] = [0.0, *x[:, self.vocabulary.blank].cumsum(0).tolist()]
        if not len(x):
            return out
        scorer = CtcPrefix(x[None], torch.tensor([len(x)]), vocabulary=self.vocabulary)
        state = scorer.start(1)
        for k, word in enumerate(spelled, start=1):
            if word:
                _, state = scorer.advance(state, torch.tensor([word]), torch.tensor([len(word)]))
            out[k] = state.both[0]
            if out[k, -1] < IMPOSSIBLE / 10:  # nor does anything longer fit
                break
        return np.where(out < IMPOSSIBLE / 10, NEG, out)

    def fits(self, kept: Sequence[int]) -> bool:
        """Whether these words have an alignment: a frame for each label, and a blank between equal ones."""
        labels = [y for i in kept for y in self.spelled[i]]
        return len(labels) + sum(a == b for a, b in pairwise(labels)) <= len(self.x)

    def aligned(self, kept: Sequence[int]) -> dict[int, list[AlignedLabel]] | None:
        """The labels of these words in the best alignment; None where there is none, or it would be too large."""
        labels = [y for i in kept for y in self.spelled[i]]
        if not self.fits(kept) or max(len(labels), len(kept)) * len(self.x) > MOST_CELLS:
            return None
        assert self.vocabulary.blank is not None
        found = iter(align(self.x, labels, blank=self.vocabulary.blank) or [])
        return {i: [next(found) for _ in self.spelled[i]] for i in kept}

    def evidence(self, aligned: Mapping[int, Sequence[AlignedLabel]]) -> dict[int, Evidence]:
        """The evidence of aligned words, separators left out; a word that CTC cannot spell is where the one before it ends."""
        out, end = dict[int, Evidence](), 0.0
        for i, items in aligned.items():
            out[i] = Evidence(self.words[i], end, end)
            if spoken := [item for item in items if self.vocabulary.decode([item.label]).strip()]:
                ratio = sum(float(self.x[t, item.label] - self.x[t].max()) for item in spoken for t in range(item.start, item.end))
                start, end = spoken[0].start * self.seconds, spoken[-1].end * self.seconds
                out[i] = Evidence(self.words[i], start, end, len(spoken), ratio / len(spoken))
        return out

    def dear(self, words: Sequence[Evidence]) -> list[range]:
        """Runs of words that cost more than guard.nats beyond what their labels may, each to where it is dearest (a CUSUM test)."""
        runs, begin, end, total, peak = list[range](), 0, 0, 0.0, 0.0
        for i, word in enumerate(words):
            total -= 0.0 if word.log_ratio is None else (word.log_ratio + self.guard.nats_per_label) * word.labels
            if total > peak:
                peak, end = total, i + 1
            if total <= 0.0 or i + 1 == len(words):
                runs += [range(begin, end)] if peak > self.guard.nats else []
                begin, total, peak = i + 1, 0.0, 0.0
        return runs

    def unexplained(self, aligned: Mapping[int, Sequence[AlignedLabel]]) -> list[tuple[float, float]]:
        """Seconds of stretches in which labels are heard where the transcript has none; none beside words that CTC cannot spell."""
        loud = (self.x - self.x[:, self.vocabulary.blank, None] > self.guard.peak_nats).any(1)
        odd = [bool(self.plain[i]) and not items for i, items in aligned.items()]
        end, spans = 0, list[list[int]]([[]])
        for k, items in enumerate([*aligned.values(), [AlignedLabel(-1, len(self.x), len(self.x), 0.0)]]):
            for item in items:
                beside = any(odd[max(0, k - 1) : k + 2])
                for t in [] if beside else (end + torch.nonzero(loud[end : item.start])[:, 0]).tolist():
                    if spans[-1] and (t - spans[-1][-1]) * self.seconds > self.guard.pause_seconds:
                        spans.append([])
                    spans[-1].append(t)
                spans.append([])
                end = item.end
        return [(span[0] * self.seconds, (span[-1] + 1) * self.seconds) for span in spans if len(span) >= 3]
