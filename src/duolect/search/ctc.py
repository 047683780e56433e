"""Time-synchronous CTC beam search over label prefixes, with any number of fused scorers.

A hypothesis is a label prefix with two scores: of the alignments that end in blank, and of those that end in its last label. That is
recombination on (labels, last frame label) by construction: a prefix fills one slot of the beam and its scorers' states exist once.
Legend: B utterances, K hypotheses, T frames, V labels, L longest history, C candidates = K + K*V, R rows of a scorer's state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from duolect.scorer import Hypothesis
from duolect.search.fusion import Fused, Pending, SearchError, weighted
from duolect.vocabulary import Vocabulary

NEG = float("-inf")
_MULTIPLIER = 6364136223846793005


@dataclass(frozen=True)
class Beam:
    """The hypotheses after some frame; a dead slot has both scores at -inf. All [B, K] unless said."""

    blank: Tensor  # log-score of alignments that end in blank
    label: Tensor  # ... that end in the last label
    last: Tensor  # last label, -1 for the empty prefix
    length: Tensor
    history: Tensor  # [B, K, L]
    key: Tensor  # 64-bit hash of the history
    parent_key: Tensor  # of the history without its last label

    @property
    def size(self) -> int:
        return self.blank.shape[1]

    @property
    def alive(self) -> Tensor:
        return torch.maximum(self.blank, self.label) > NEG

    def total(self, combine: Any) -> Tensor:
        return combine(self.blank, self.label)


@dataclass(frozen=True)
class Term:
    """A fused scorer inside the search: the hypotheses point to rows of its state, which is gathered only when it is asked."""

    fused: Fused
    state: Any
    row: Tensor  # [B, K] row of `state`
    score: Tensor  # [B, K] unscaled log p of the labels consumed so far
    seen: Tensor  # [B, K] how many labels that are
    ahead: Tensor | None  # [R, V] log p(next label), where the schedule looks ahead

    @property
    def part(self) -> Tensor:
        return weighted(self.fused.scale, self.score)


def ctc_beam_search(
    log_probs: Tensor,
    lengths: Tensor,
    *,
    vocabulary: Vocabulary,
    beam: int,
    fused: Mapping[str, Fused] | None = None,
    recombine: Literal["sum", "max"] = "sum",
    acoustic: str = "ctc",
) -> list[list[Hypothesis]]:
    """Up to `beam` hypotheses per utterance, best first, by log p_ctc + sum_i scale_i * log p_i.

    log_probs: [B, T, V] natural log, normalized; lengths: [B] frames. `recombine`: a prefix scores the sum of its alignments or its best
    one. Each hypothesis' parts are unscaled: `acoustic` and the names in `fused`. With a beam wide enough nothing is pruned and the
    schedules make no difference; results do not depend on what else is in the batch.
    """
    with torch.no_grad():
        return _search(log_probs, lengths, vocabulary, beam, fused or {}, recombine, acoustic)


def ctc_greedy(log_probs: Tensor, lengths: Tensor, *, vocabulary: Vocabulary, acoustic: str = "ctc") -> list[list[Hypothesis]]:
    """One hypothesis per utterance: the best label of each frame, repeats and blanks taken out; its part is that one path's log p."""
    best, path = log_probs.float().max(2)
    out = []
    for scores, labels, n in zip(best, path, lengths.tolist(), strict=True):
        kept = torch.unique_consecutive(labels[:n])
        collapsed = tuple(kept[kept != vocabulary.blank].tolist())
        out.append([Hypothesis(collapsed, vocabulary.decode(collapsed), {acoustic: float(scores[:n].sum())})])
    return out


def _search(
    log_probs: Tensor, lengths: Tensor, vocabulary: Vocabulary, beam: int, fused: Mapping[str, Fused], recombine: str, acoustic: str
) -> list[list[Hypothesis]]:
    _check(log_probs, lengths, vocabulary, beam, fused, acoustic)
    combine = torch.logaddexp if recombine == "sum" else torch.maximum
    log_probs = log_probs.float()
    terms = {name: _begin(f, len(log_probs), vocabulary.size, log_probs.device) for name, f in fused.items()}
    now = _empty(len(log_probs), log_probs.device)
    starts = torch.tensor(vocabulary.word_starts, device=log_probs.device)
    hashes = _label_hashes(vocabulary.size, log_probs.device)
    assert vocabulary.blank is not None
    for t in range(int(lengths.max()) if len(lengths) else 0):
        frame = _frame(log_probs[:, t], t < lengths, vocabulary.blank)
        now, source = _step(now, frame, terms, vocabulary.blank, beam, combine, hashes)
        terms = {name: _follow(term, source) for name, term in terms.items()}
        for name, term in terms.items():
            due = term.fused.when.due(_pending(now, term, starts, t)) & now.alive
            if bool(due.any()):
                terms[name] = _consume(term, now, due)
    return _hypotheses(now, terms, vocabulary, combine, acoustic)


def _step(now: Beam, frame: Tensor, terms: Mapping[str, Term], blank: int, beam: int, combine: Any, hashes: Tensor) -> tuple[Beam, Tensor]:
    """(the beam after one more frame, [B, K'] the slot each hypothesis came from)."""
    k, v = now.size, frame.shape[1]
    known = sum((term.part for term in terms.values()), torch.zeros_like(now.blank))
    total, last = now.total(combine), now.last.clamp(min=0)
    own = frame.gather(1, last).masked_fill(now.last < 0, NEG)
    stay_blank = total + frame[:, blank, None]
    # A repeated label needs a blank in between, so it extends only the alignments that end in blank.
    grow = total[..., None] + frame[:, None]
    grow.scatter_(2, last[..., None], torch.where(now.last < 0, grow.gather(2, last[..., None])[..., 0], now.blank + own)[..., None])
    grow[..., blank] = NEG
    stay_label, grow = _merge(now, now.label + own, grow, last, combine)
    ahead = sum((weighted(t.fused.scale, t.ahead[t.row]) for t in terms.values() if t.ahead is not None), torch.zeros(()))
    ranked = torch.cat([combine(stay_blank, stay_label) + known, (grow + known[..., None] + ahead).flatten(1)], 1)
    ranked = torch.nan_to_num(ranked, nan=NEG, neginf=NEG, posinf=NEG)
    best, chosen = ranked.topk(min(beam, ranked.shape[1]), dim=1)
    stays = chosen < k
    source = torch.where(stays, chosen, (chosen - k).clamp(min=0) // v)
    label = torch.where(stays, 0, (chosen - k).clamp(min=0) % v)
    dead = best == NEG
    grown = grow.flatten(1).gather(1, source * v + label)
    return _moved(
        now,
        source,
        label,
        stays,
        hashes,
        blank=torch.where(stays, stay_blank.gather(1, source), NEG).masked_fill(dead, NEG),
        score=torch.where(stays, stay_label.gather(1, source), grown).masked_fill(dead, NEG),
    ), source


def _merge(now: Beam, stay_label: Tensor, grow: Tensor, last: Tensor, combine: Any) -> tuple[Tensor, Tensor]:
    """Moves what one prefix would grow into another that is already in the beam to that one, before anything is pruned."""
    same = (now.key[:, None, :] == now.parent_key[:, :, None]) & (now.length[:, None, :] + 1 == now.length[:, :, None])
    same = same & now.alive[:, None, :] & now.alive[:, :, None]
    child, (has, parent) = last, (same.any(2), same.int().argmax(2))
    b = torch.arange(len(grow), device=grow.device)[:, None].expand_as(parent)
    incoming = torch.where(has, grow[b, parent, child], NEG)
    stay_label = combine(stay_label, incoming)
    b, parent, child = b[has], parent[has], child[has]
    grow[b, parent, child] = NEG
    return stay_label, grow


def _moved(now: Beam, source: Tensor, label: Tensor, stays: Tensor, hashes: Tensor, *, blank: Tensor, score: Tensor) -> Beam:
    length = now.length.gather(1, source)
    history = now.history.gather(1, source[..., None].expand(-1, -1, now.history.shape[2]))
    room = int(torch.where(stays, length, length + 1).max())
    if room > history.shape[2]:
        history = torch.nn.functional.pad(history, (0, max(room, 2 * history.shape[2], 16) - history.shape[2]))
    b, k = (~stays).nonzero(as_tuple=True)
    history[b, k, length[b, k]] = label[b, k]
    key = now.key.gather(1, source)
    return Beam(
        blank,
        score,
        torch.where(stays, now.last.gather(1, source), label),
        torch.where(stays, length, length + 1),
        history,
        torch.where(stays, key, key * _MULTIPLIER + hashes[label]),
        torch.where(stays, now.parent_key.gather(1, source), key),
    )


def _begin(fused: Fused, groups: int, labels: int, device: torch.device) -> Term:
    state = fused.scorer.start(groups)
    ahead = _look_ahead(fused, state, labels, device) if fused.when.lookahead else None
    zero = torch.zeros(groups, 1, device=device)
    return Term(fused, state, torch.arange(groups, device=device)[:, None], zero, zero.long(), ahead)


def _look_ahead(fused: Fused, state: Any, labels: int, device: torch.device) -> Tensor:
    # A language model has no blank: where blank is the last label its log-probs are one column short.
    ahead = fused.scorer.log_probs(state).to(device)
    return torch.nn.functional.pad(ahead, (0, labels - ahead.shape[1]), value=NEG)


def _follow(term: Term, source: Tensor) -> Term:
    return replace(term, row=term.row.gather(1, source), score=term.score.gather(1, source), seen=term.seen.gather(1, source))


def _pending(now: Beam, term: Term, starts: Tensor, step: int) -> Pending:
    count = now.length - term.seen
    place = torch.arange(now.history.shape[2], device=count.device)
    # The label at `seen` itself only begins the pending word; one behind it ends that word.
    inside = (place > term.seen[..., None]) & (place < now.length[..., None])
    word_ends = (starts[now.history] & inside).any(2)
    return Pending(step, count, word_ends & now.alive, now.alive)


def _consume(term: Term, now: Beam, due: Tensor) -> Term:
    """The term with the due hypotheses' pending labels scored; its state then has one row per live slot."""
    scorer, alive = term.fused.scorer, now.alive
    slots = alive.flatten().nonzero()[:, 0]
    lengths = torch.where(due, now.length - term.seen, 0).flatten()[slots]
    seen = term.seen.flatten()[slots]
    width = int(lengths.max())
    index = (seen[:, None] + torch.arange(width, device=seen.device)).clamp(max=now.history.shape[2] - 1)
    labels = now.history.flatten(0, 1)[slots].gather(1, index)
    old = term.row.flatten()[slots]
    gained, state = scorer.advance(scorer.select(term.state, old), labels, lengths)
    score = term.score.flatten().index_add(0, slots, gained.to(slots.device)).view_as(term.score)
    row = torch.zeros_like(term.row).flatten().scatter(0, slots, torch.arange(len(slots), device=slots.device)).view_as(term.row)
    ahead = None
    if term.ahead is not None:
        ahead = term.ahead[old]
        changed = (lengths > 0).nonzero()[:, 0]
        ahead[changed] = _look_ahead(term.fused, scorer.select(state, changed), ahead.shape[1], ahead.device)
    return replace(term, state=state, row=row, score=score, seen=torch.where(due, now.length, term.seen), ahead=ahead)


def _hypotheses(now: Beam, terms: Mapping[str, Term], vocabulary: Vocabulary, combine: Any, acoustic: str) -> list[list[Hypothesis]]:
    parts = {acoustic: now.total(combine)}
    score = parts[acoustic]
    for name, term in terms.items():
        term = _consume(term, now, now.alive) if bool((now.alive & (now.length > term.seen)).any()) else term
        slots = now.alive.flatten().nonzero()[:, 0]
        ends = term.fused.scorer.finish(term.fused.scorer.select(term.state, term.row.flatten()[slots]))
        parts[name] = term.score.flatten().index_add(0, slots, ends.to(slots.device)).view_as(term.score)
        score = score + weighted(term.fused.scale, parts[name])
    score = torch.where(now.alive, torch.nan_to_num(score, nan=NEG, neginf=NEG), NEG)
    # Where some scorer rules out every hypothesis of an utterance, what was heard still stands, in the order of the acoustic model.
    silenced = (score == NEG).all(1, keepdim=True)
    score = torch.where(silenced & now.alive, parts[acoustic], score)
    order = score.argsort(dim=1, descending=True, stable=True).tolist()
    alive, length, history = (score > NEG).tolist(), now.length.tolist(), now.history.tolist()
    table = {name: values.tolist() for name, values in parts.items()}
    out: list[list[Hypothesis]] = []
    for b, slots in enumerate(order):
        labels = {k: tuple(history[b][k][: length[b][k]]) for k in slots if alive[b][k]}
        out.append([Hypothesis(y, vocabulary.decode(y), {name: values[b][k] for name, values in table.items()}) for k, y in labels.items()])
    return out


def _frame(log_probs: Tensor, active: Tensor, blank: int) -> Tensor:
    # Behind its end an utterance emits blank for free: its beam stays as it is while longer ones go on.
    rest = torch.full_like(log_probs, NEG)
    rest[:, blank] = 0.0
    return torch.where(active[:, None], log_probs, rest)


def _empty(groups: int, device: torch.device) -> Beam:
    zero = torch.zeros(groups, 1, device=device)
    index = torch.zeros(groups, 1, dtype=torch.long, device=device)
    return Beam(zero, zero + NEG, index - 1, index, index[..., None][..., :0], index + 1, index)


def _label_hashes(size: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(20260315)
    return torch.randint(-(2**62), 2**62, (size,), generator=generator).to(device) | 1


def _check(log_probs: Tensor, lengths: Tensor, vocabulary: Vocabulary, beam: int, fused: Mapping[str, Fused], acoustic: str) -> None:
    if beam < 1:
        raise SearchError(f"a beam of {beam} holds no hypothesis: give 1 or more")
    if vocabulary.blank is None or log_probs.shape[2] != vocabulary.size:
        raise SearchError(
            f"log_probs have {log_probs.shape[2]} labels, the vocabulary {vocabulary.size} and blank {vocabulary.blank}: not its CTC model"
        )
    if len(lengths) != len(log_probs) or (len(lengths) and int(lengths.max()) > log_probs.shape[1]):
        raise SearchError(f"lengths {tuple(lengths.shape)} do not fit log_probs {tuple(log_probs.shape)}")
    if acoustic in fused:
        raise SearchError(f"{acoustic!r} is the acoustic part's own name: call the fused scorer otherwise")
    for name, f in fused.items():
        vocabulary.require_same(f.scorer.vocabulary, here="the acoustic model", there=name)
