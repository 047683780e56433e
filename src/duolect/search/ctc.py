"""Time-synchronous CTC beam search over label prefixes, with any number of fused scorers.

A hypothesis is a label prefix with two scores: of the alignments that end in blank, and of those that end in its last label. That is
recombination on (labels, last frame label) by construction: a prefix fills one slot of the beam and its scorers' states exist once.
The beam is small and changes with every frame: numpy on the CPU, whose calls cost a third of torch's, wherever the scorers compute.
Legend: B utterances, K hypotheses, T frames, N of them searched, V labels, M of them tried, L longest history, R rows of a scorer's state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from duolect.scorer import Hypothesis
from duolect.search.fusion import NEG, Fused, Pending, SearchError, weighted
from duolect.vocabulary import Vocabulary

_MULTIPLIER = 6364136223846793005


class Beam(NamedTuple):
    """The hypotheses after some frame; a dead slot has both scores at -inf. All [B, K] unless said."""

    blank: np.ndarray  # log-score of alignments that end in blank
    label: np.ndarray  # ... that end in the last label
    last: np.ndarray  # last label, blank for the empty prefix
    length: np.ndarray
    history: np.ndarray  # [B, K, L]
    key: np.ndarray  # 64-bit hash of the history
    parent_key: np.ndarray  # of the history without its last label

    @property
    def alive(self) -> np.ndarray:
        return np.maximum(self.blank, self.label) > NEG


@dataclass(frozen=True)
class Frames:
    """What the search steps through: each utterance's frames that have more than blank above the floor, then empty ones.

    Frames of blank alone add its log p to every hypothesis: their sums stand in front of the next frame. M varies from frame to frame.
    """

    step: np.ndarray  # [N, B] number of the frame; T behind the end
    rests: np.ndarray  # [N, B, 1] bool: frames of blank alone come before this one
    rest: np.ndarray  # [N, B, 1] their log p
    blank: np.ndarray  # [N, B, 1]
    own: np.ndarray  # [N, B, V] log p of each label, -inf for blank and below the floor
    labels: list[np.ndarray]  # N x [B, 1 + M] labels to grow by, best first; the first column stands for none
    scores: list[np.ndarray]  # N x [B, 1 + M] their log p
    sure: list[bool]  # N: one label is all that is left, and it is not blank, in all utterances


@dataclass(frozen=True)
class Term:
    """A fused scorer inside the search: the hypotheses point to rows of its state, which is gathered only when it is asked."""

    fused: Fused
    state: Any
    row: np.ndarray  # [B, K] row of `state`
    score: np.ndarray  # [B, K] unscaled log p of the labels consumed so far
    seen: np.ndarray  # [B, K] how many labels that are
    ahead: Tensor | None  # [R, V] log p(next label), where the schedule looks ahead

    @property
    def part(self) -> np.ndarray:
        return weighted(self.fused.scale, self.score)

    def ahead_of(self, labels: np.ndarray) -> np.ndarray:
        """[B, K, 1 + M] scale * log p of the labels [B, 1 + M] behind each hypothesis."""
        assert self.ahead is not None
        found = self.ahead[torch.from_numpy(self.row)[..., None], torch.from_numpy(labels)[:, None]]
        return weighted(self.fused.scale, found).cpu().numpy()


def ctc_beam_search(
    log_probs: Tensor,
    lengths: Tensor,
    *,
    vocabulary: Vocabulary,
    beam: int,
    fused: Mapping[str, Fused] | None = None,
    recombine: Literal["sum", "max"] = "sum",
    label_floor: float | None = None,
    beam_floor: float | None = None,
) -> list[list[Hypothesis]]:
    """Up to `beam` hypotheses per utterance, best first, by log p_ctc + sum_i scale_i * log p_i.

    log_probs: [B, T, V] natural log, normalized; lengths: [B] frames. `recombine`: a prefix scores the sum of its alignments or its best
    one. Each hypothesis' parts are unscaled: `ctc` and the names in `fused`. With a beam wide enough nothing is pruned and the
    schedules make no difference; results do not depend on what else is in the batch. Two floors prune more than the beam, None for off:
    `label_floor` drops labels (and blank) so far in log p below a frame's best, `beam_floor` hypotheses so far below the best.
    """
    fused = fused or {}
    _check(log_probs, vocabulary, beam, fused, {"label": label_floor, "beam": beam_floor})
    if not len(log_probs):
        return []
    with torch.no_grad(), np.errstate(invalid="ignore"):
        # Behind one prefix at most one label repeats, and beam - 1 lead to prefixes of the beam: of 2 * beam others, beam are better.
        most = vocabulary.size if any(f.when.lookahead for f in fused.values()) else 2 * beam
        frames = _frames(log_probs, lengths, vocabulary, label_floor, most, [f.when.period for f in fused.values() if f.when.period])
        return _search(frames, vocabulary, beam, beam_floor, fused, np.logaddexp if recombine == "sum" else np.maximum)


def ctc_greedy(log_probs: Tensor, lengths: Tensor, *, vocabulary: Vocabulary) -> list[list[Hypothesis]]:
    """One hypothesis per utterance: the best label of each frame, repeats and blanks taken out; its part is that one path's log p."""
    best, path = log_probs.float().max(2)
    out = []
    for scores, labels, n in zip(best, path, lengths.tolist(), strict=True):
        kept = torch.unique_consecutive(labels[:n])
        collapsed = tuple(kept[kept != vocabulary.blank].tolist())
        out.append([Hypothesis(collapsed, vocabulary.decode(collapsed), {"ctc": float(scores[:n].sum())})])
    return out


def _frames(log_probs: Tensor, lengths: Tensor, vocabulary: Vocabulary, floor: float | None, most: int, periods: Sequence[int]) -> Frames:
    """The frames to search, at most `most` labels tried in each; those at which a schedule of these periods may ask are all kept."""
    x, blank = log_probs.float(), vocabulary.blank
    groups, frames, size = x.shape
    time, lengths = torch.arange(frames, device=x.device), lengths.to(x.device)
    if floor is not None:
        x = x.masked_fill(x < x.amax(2, keepdim=True) - floor, NEG)
    real = time < lengths[:, None]
    quiet = real & ((x > NEG).sum(2) == 1) & (x[..., blank] > NEG)
    for period in periods:
        quiet &= time % period != period - 1
    # One more than the longest has: its last frames may be of blank alone.
    step = torch.where(real & ~quiet, time, frames)
    step = torch.nn.functional.pad(step, (0, 1), value=frames).sort(1).values[:, : int((real & ~quiet).sum(1).max()) + 1]
    sums = torch.where(quiet, x[..., blank], 0.0).double().cumsum(1)
    passed = [torch.nn.functional.pad(y, (1, 0)).gather(1, step) for y in (sums, quiet.cumsum(1))]
    rest, rests = (torch.diff(y, dim=1, prepend=torch.zeros_like(y[:, :1])).T[..., None] for y in passed)
    # Behind its end an utterance emits blank for free: its beam stays as it is while longer ones go on.
    empty = x.new_full((groups, 1, size), NEG)
    empty[..., blank] = 0.0
    x = torch.cat([x, empty], 1)[torch.arange(groups, device=x.device), step.T]
    blanks, x[..., blank] = x[..., blank, None].double(), NEG
    sure = ((x > NEG).sum(2).eq(1) & blanks[..., 0].isneginf()).all(1).tolist()
    counts = (x > NEG).sum(2).amax(1).clamp(max=most)
    width = int(counts.max())
    if width < size - 1:
        scores, labels = x.topk(width, dim=2)
    else:
        scores, labels, counts = x, torch.arange(size, device=x.device).expand_as(x), torch.full_like(counts, size)
    scores, labels = (torch.nn.functional.pad(y, (1, 0), value=z).cpu().numpy() for y, z in ((scores, NEG), (labels, 0)))
    tried = [slice(0, 1 + n) for n in counts.tolist()]
    arrays = [y.cpu().numpy() for y in (step.T, rests > 0, rest, blanks, x)]
    return Frames(
        arrays[0],
        arrays[1],
        arrays[2],
        arrays[3],
        arrays[4],
        [np.ascontiguousarray(y[:, n]) for y, n in zip(labels, tried, strict=True)],
        [y[:, n] for y, n in zip(scores, tried, strict=True)],
        sure if most < size else [False] * len(sure),
    )


def _search(
    frames: Frames, vocabulary: Vocabulary, beam: int, floor: float | None, fused: Mapping[str, Fused], combine: Any
) -> list[list[Hypothesis]]:
    groups = frames.own.shape[1]
    terms = {name: _begin(f, groups, vocabulary.size) for name, f in fused.items()}
    assert vocabulary.blank is not None
    now, starts = _empty(groups, vocabulary.blank), np.array(vocabulary.word_starts)
    hashes = np.random.default_rng(20260315).integers(-(2**62), 2**62, vocabulary.size) | 1
    for i, rested in enumerate(np.any(frames.rests, axis=(1, 2)).tolist()):
        if rested:
            rests = frames.rests[i]
            total = combine(now.blank, now.label) + frames.rest[i]
            now = now._replace(blank=np.where(rests, total, now.blank), label=np.where(rests, NEG, now.label))
        if i == len(frames.step) - 1:
            break
        if frames.sure[i] and (after := _sure(now, frames.labels[i][:, 1:], frames.scores[i][:, 1:], combine, hashes)):
            now = after
        else:
            now, source = _step(now, frames, i, terms, beam, floor, combine, hashes)
            terms = {name: _follow(term, source) for name, term in terms.items()}
        for name, term in terms.items():
            due = term.fused.when.due(_pending(now, term, starts, frames.step[i])).numpy() & now.alive
            if due.any():
                terms[name] = _consume(term, now, due)
    return _hypotheses(now, terms, vocabulary, combine)


def _sure(now: Beam, label: np.ndarray, score: np.ndarray, combine: Any, hashes: np.ndarray) -> Beam | None:
    """The beam after a frame of one label [B, 1] alone, where all hypotheses grow by it or all go on in it: none is ranked."""
    repeats = now.last == label
    if not repeats.any():
        total, nothing = combine(now.blank, now.label) + score, np.full_like(now.blank, NEG)
        history = _with_room(now.history, int(now.length.max()) + 1)
        np.put_along_axis(history, now.length[..., None], label[..., None], 2)
        last, key = np.broadcast_to(label, now.last.shape), now.key * _MULTIPLIER + hashes.take(label)
        return Beam(nothing, total, last, now.length + 1, history, key, now.key)
    if repeats.all() and now.blank.max() == NEG:
        return now._replace(label=now.label + score)
    return None


def _with_room(history: np.ndarray, room: int) -> np.ndarray:
    if room <= history.shape[2]:
        return history
    return np.pad(history, ((0, 0), (0, 0), (0, max(room, 2 * history.shape[2], 16) - history.shape[2])))


def _step(
    now: Beam, frames: Frames, i: int, terms: Mapping[str, Term], beam: int, floor: float | None, combine: Any, hashes: np.ndarray
) -> tuple[Beam, np.ndarray]:
    """(the beam after one more frame, [B, K'] the slot each hypothesis came from)."""
    labels, own = frames.labels[i], frames.own[i]
    (groups, k), m = now.blank.shape, labels.shape[1]
    total = combine(now.blank, now.label)
    # A repeated label needs a blank in between, so it extends only the alignments that end in blank.
    repeats = now.last[..., None] == labels[:, None]
    scores = np.where(repeats, now.blank[..., None], total[..., None]) + frames.scores[i][:, None]
    stay_blank = total + frames.blank[i]
    stay_label = _merged(now, total, scores, repeats, combine) + own.take(now.last + _begins(groups, own.shape[1]))
    # From here on the first column of a hypothesis stands for itself with no label more.
    scores[..., 0] = stay_label
    ranked = scores.copy()
    ranked[..., 0] = combine(stay_blank, stay_label)
    for term in terms.values():
        ranked += term.part[..., None]
        if term.ahead is not None:
            ranked[..., 1:] += term.ahead_of(labels)[..., 1:]
    chosen, best = _best(ranked.reshape(groups, k * m), beam, floor)
    source, column = np.divmod(chosen, m)
    at, grows = source + _begins(groups, k), column > 0
    label = scores.take(chosen + _begins(groups, k * m))
    blank = np.where(grows, NEG, stay_blank.take(at))
    dead = best == NEG if best[:, -1].min() == NEG else None
    return _moved(now, at, labels.take(column + _begins(groups, m)), grows, dead, hashes, blank=blank, label=label), source


def _merged(now: Beam, total: np.ndarray, scores: np.ndarray, repeats: np.ndarray, combine: Any) -> np.ndarray:
    """[B, K] label scores with what other prefixes would grow into these, which is taken out of scores: before anything is pruned."""
    parent = (now.key[:, None] == now.parent_key[..., None]).argmax(2)
    at = parent + _begins(*parent.shape)
    has = now.key.take(at) == now.parent_key
    incoming = np.where(now.last.take(at) == now.last, now.blank.take(at), total.take(at))
    b, child, m = (repeats & has[..., None]).nonzero()
    scores[b, parent[b, child], m] = NEG
    return combine(now.label, np.where(has, incoming, NEG))


@lru_cache
def _begins(rows: int, columns: int) -> np.ndarray:
    """[rows, 1] where each row of an array begins, counted through all of it."""
    return np.arange(0, rows * columns, columns)[:, None]


def _best(ranked: np.ndarray, beam: int, floor: float | None) -> tuple[np.ndarray, np.ndarray]:
    """([B, K'] indices of the greatest of ranked [B, C], best first, [B, K'] those scores, -inf below the floor)."""
    begin = _begins(*ranked.shape)
    if ranked.shape[1] > 4 * beam:
        chosen = ranked.argpartition(-beam, axis=1)[:, -beam:]
        chosen = chosen.take((-ranked.take(chosen + begin)).argsort(axis=1) + _begins(len(chosen), beam))
    else:
        chosen = (-ranked).argsort(axis=1)[:, :beam]
    best = ranked.take(chosen + begin)
    if floor is not None:
        best[best < best[:, :1] - floor] = NEG
    width = max(int(np.count_nonzero((best > NEG).any(0))), 1)
    return chosen[:, :width], best[:, :width]


def _moved(
    now: Beam, at: np.ndarray, grown: np.ndarray, grows: np.ndarray, dead: np.ndarray | None, hashes: np.ndarray, **score: np.ndarray
) -> Beam:
    """The beam of the slots `at` (counted through the batch), each longer by the label `grown` where it grows."""
    key, length = now.key.take(at), now.length.take(at)
    history = _with_room(now.history.reshape(-1, now.history.shape[2])[at], int(length.max()) + 1)
    # Behind the end of one that does not grow stands a 0 then, which nobody reads.
    history.reshape(-1)[length + _begins(at.size, history.shape[2]).reshape(at.shape)] = grown
    parent_key = np.where(grows, key, now.parent_key.take(at))
    key = np.where(grows, key * _MULTIPLIER + hashes.take(grown), key)
    if dead is not None:
        key[dead], parent_key[dead], score["blank"][dead], score["label"][dead] = -1, 0, NEG, NEG
    last = np.where(grows, grown, now.last.take(at))
    return Beam(score["blank"], score["label"], last, length + grows, history, key, parent_key)


def _begin(fused: Fused, groups: int, labels: int) -> Term:
    state = fused.scorer.start(groups)
    ahead = _look_ahead(fused, state, labels) if fused.when.lookahead else None
    return Term(fused, state, np.arange(groups)[:, None], np.zeros((groups, 1)), np.zeros((groups, 1), dtype=np.int64), ahead)


def _look_ahead(fused: Fused, state: Any, labels: int) -> Tensor:
    # A language model has no blank: where blank is the last label its log-probs are one column short.
    ahead = fused.scorer.log_probs(state)
    return torch.nn.functional.pad(ahead, (0, labels - ahead.shape[1]), value=NEG)


def _follow(term: Term, source: np.ndarray) -> Term:
    group = np.arange(len(source))[:, None]
    return replace(term, row=term.row[group, source], score=term.score[group, source], seen=term.seen[group, source])


def _pending(now: Beam, term: Term, starts: np.ndarray, step: np.ndarray) -> Pending:
    place, seen, alive = np.arange(now.history.shape[2]), term.seen[..., None], now.alive
    # The label at `seen` itself only begins the pending word; one behind it ends that word.
    inside = (place > seen) & (place < now.length[..., None])
    word_ends = (starts[now.history] & inside).any(2)
    count, ends, live = (torch.from_numpy(y) for y in (now.length - term.seen, word_ends & alive, alive))
    return Pending(torch.from_numpy(step)[:, None], count, ends, live)


def _consume(term: Term, now: Beam, due: np.ndarray) -> Term:
    """The term with the due hypotheses' pending labels scored; its state then has one row per live slot."""
    scorer, slots = term.fused.scorer, now.alive.ravel().nonzero()[0]
    lengths = np.where(due, now.length - term.seen, 0).take(slots)
    index = (term.seen.take(slots)[:, None] + np.arange(int(lengths.max()))).clip(max=now.history.shape[2] - 1)
    labels = np.take_along_axis(now.history.reshape(due.size, -1)[slots], index, 1).astype(np.int64)
    old = torch.from_numpy(term.row.take(slots))
    gained, state = scorer.advance(scorer.select(term.state, old), torch.from_numpy(labels), torch.from_numpy(lengths))
    score, row = term.score.copy(), np.zeros_like(term.row)
    score.reshape(-1)[slots] += gained.double().cpu().numpy()
    row.reshape(-1)[slots] = np.arange(len(slots))
    ahead = None
    if term.ahead is not None:
        ahead = term.ahead[old]
        changed = torch.from_numpy(lengths.nonzero()[0])
        ahead[changed] = _look_ahead(term.fused, scorer.select(state, changed), ahead.shape[1])
    return replace(term, state=state, row=row, score=score, seen=np.where(due, now.length, term.seen), ahead=ahead)


def _hypotheses(now: Beam, terms: Mapping[str, Term], vocabulary: Vocabulary, combine: Any) -> list[list[Hypothesis]]:
    parts = {"ctc": combine(now.blank, now.label)}
    score, slots = parts["ctc"], now.alive.ravel().nonzero()[0]
    for name, term in terms.items():
        term = _consume(term, now, now.alive) if (now.alive & (now.length > term.seen)).any() else term
        ends = term.fused.scorer.finish(term.fused.scorer.select(term.state, torch.from_numpy(term.row.take(slots))))
        parts[name] = term.score.copy()
        parts[name].reshape(-1)[slots] += ends.double().cpu().numpy()
        score = score + weighted(term.fused.scale, parts[name])
    score = np.where(now.alive, np.nan_to_num(score, nan=NEG, posinf=np.inf, neginf=NEG), NEG)
    # Where some scorer rules out every hypothesis of an utterance, what was heard still stands, in the order of the acoustic model.
    silenced = (score == NEG).all(1, keepdims=True)
    score = np.where(silenced & now.alive, parts["ctc"], score)
    order = (-score).argsort(axis=1, kind="stable").tolist()
    alive, length, history = (score > NEG).tolist(), now.length.tolist(), now.history.tolist()
    table = {name: values.tolist() for name, values in parts.items()}
    out: list[list[Hypothesis]] = []
    for b, slots in enumerate(order):
        labels = {k: tuple(history[b][k][: length[b][k]]) for k in slots if alive[b][k]}
        out.append([Hypothesis(y, vocabulary.decode(y), {name: values[b][k] for name, values in table.items()}) for k, y in labels.items()])
    return out


def _empty(groups: int, blank: int) -> Beam:
    zero, index = np.zeros((groups, 1)), np.zeros((groups, 1), dtype=np.int64)
    return Beam(zero, zero + NEG, index + blank, index, index[..., None].astype(np.int32), index + 1, index)


def _check(log_probs: Tensor, vocabulary: Vocabulary, beam: int, fused: Mapping[str, Fused], floors: Mapping[str, float | None]) -> None:
    if beam < 1:
        raise SearchError(f"a beam of {beam} holds no hypothesis: give 1 or more")
    if wrong := [f"{name}_floor {value}" for name, value in floors.items() if value is not None and not value >= 0]:
        raise SearchError(f"{', '.join(wrong)}: a floor is a distance below the best in log p: give 0 or more, or None for no floor")
    if vocabulary.blank is None or log_probs.shape[2] != vocabulary.size:
        raise SearchError(
            f"log_probs have {log_probs.shape[2]} labels, the vocabulary {vocabulary.size} and blank {vocabulary.blank}: not its CTC model"
        )
    if "ctc" in fused:
        raise SearchError("'ctc' is the acoustic part's own name: call the fused scorer otherwise")
    for name, f in fused.items():
        vocabulary.require_same(f.scorer.vocabulary, here="the acoustic model", there=name)
