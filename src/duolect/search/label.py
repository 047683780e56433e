"""Label-synchronous beam search: every hypothesis grows by one label a step. Greedy search is beam 1.

Legend: B utterances, K hypotheses each, R rows = B*K, V labels, L longest history.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from duolect.scorer import Hypothesis
from duolect.search.fusion import NEG, EveryLabel, Fused, Pending, SearchError, weighted
from duolect.vocabulary import Vocabulary

LONGEST_LOOP = 24
"""Labels of a repeated stretch that `looping` looks for: a sentence."""


@dataclass(frozen=True)
class Term:
    """A fused scorer and what it said: its state has one row per hypothesis, in order."""

    fused: Fused
    state: Any
    score: Tensor  # [B, K] unscaled log p of the labels consumed
    seen: Tensor  # [B, K] how many


@dataclass(frozen=True)
class Beam:
    """The hypotheses after some step. An ended one keeps its slot and costs nothing more."""

    score: Tensor  # [B, K] scaled sum of what entered so far
    history: Tensor  # [B, K, L]
    length: Tensor  # [B, K] labels, eos not counted
    ended: Tensor  # [B, K] bool

    def kept(self, utterances: Tensor) -> Beam:
        return Beam(*(x[utterances] for x in (self.score, self.history, self.length, self.ended)))

    def best(self, slots: Tensor) -> Beam:
        """Its hypotheses [B, N] of each utterance."""
        history = self.history.gather(1, slots[..., None].expand(-1, -1, self.history.shape[2]))
        return Beam(self.score.gather(1, slots), history, self.length.gather(1, slots), self.ended.gather(1, slots))

    def rank(self, exponent: float, step: int) -> Tensor:
        """[B, K] score / length^exponent; an ended hypothesis counts its eos, as the ones still growing count this step's label."""
        n = torch.where(self.ended, self.length + 1, step).clamp(min=1)
        return self.score / n.double().pow(exponent).to(self.score.dtype)


def label_beam_search(
    fused: Mapping[str, Fused],
    utterances: int,
    *,
    beam: int,
    max_labels: int | Tensor,
    length_exponent: float = 0.0,
    stop: Literal["best", "all"] = "best",
    ends: Literal["beam", "apart"] = "beam",
    repeats: int | None = None,
    proposals: int = 2,
    never: Tensor | None = None,
) -> list[list[Hypothesis]]:
    """Up to `beam` finished hypotheses per utterance, best first, by (sum_i scale_i * log p_i) / (labels incl. eos)^length_exponent.

    Scorers whose schedule looks ahead propose labels; of the first one's vocabulary; the others are asked when their schedule says so.
    max_labels (int or [B]): a hypothesis of that many labels can only end. stop: `best` ends an utterance once nothing still growing can
    overtake its best finished hypothesis (with phrases to win: by one of them), `all` once the whole beam has ended. ends: `beam` gives a
    finished hypothesis a slot where it wins one by what the proposing scorers say; `apart` lets every hypothesis end at every step, judged
    by all scorers in full, and keeps the best of these in a list of their own: for a scorer, such as CTC, that knows what is left to be
    said, and that would otherwise be heard too late. repeats: a hypothesis that ends in so many repetitions of the same 1 to LONGEST_LOOP
    labels can only end; None: nobody looks. proposals: so many times `beam` hypotheses are proposed at a step where other scorers that are
    due have a say in which of them stay. never: [V] bool, labels that are not proposed.
    """
    if not any(f.when.lookahead and f.scale != 0 for f in fused.values()):
        raise SearchError(
            "a label-synchronous search needs a scorer that proposes labels: one fused with EveryLabel() and a scale that is not 0"
        )
    if proposals < 1:
        raise SearchError(f"{proposals} proposals for each hypothesis of the beam leave none: give 1 or more")
    if beam < 1:
        raise SearchError(f"a beam of {beam} holds no hypothesis: give 1 or more")
    vocabulary = next(iter(fused.values())).scorer.vocabulary
    for name, f in fused.items():
        vocabulary.require_same(f.scorer.vocabulary, here="the search", there=name)
    unsaid = torch.zeros(vocabulary.size, dtype=torch.bool) if never is None else never.clone()
    unsaid[[x for x in (vocabulary.blank, vocabulary.bos) if x is not None]] = True
    unsaid[vocabulary.eos] = False
    with torch.no_grad():
        return _search(fused, utterances, vocabulary, beam, max_labels, length_exponent, stop, ends, repeats, proposals, unsaid)


def _search(
    fused: Mapping[str, Fused],
    utterances: int,
    vocabulary: Vocabulary,
    beam: int,
    max_labels: int | Tensor,
    exponent: float,
    stop: str,
    ends: str,
    repeats: int | None,
    proposals: int,
    unsaid: Tensor,
) -> list[list[Hypothesis]]:
    zero, index = torch.zeros(utterances, 1), torch.zeros(utterances, 1, dtype=torch.long)
    terms = {name: Term(f, f.scorer.start(utterances), zero, index) for name, f in fused.items()}
    limit = torch.as_tensor(max_labels).expand(utterances)
    starts = torch.tensor(vocabulary.word_starts)
    now = Beam(zero, index[..., None][..., :0], index, index > 0)
    others = [name for name, f in fused.items() if not f.when.lookahead and f.scale != 0]
    wide = beam * proposals if others else beam
    apart = _no_ends(utterances, beam, terms) if ends == "apart" else None
    who = torch.arange(utterances)  # the utterances still searched; finished ones leave the batch, so that no straggler holds them
    results: list[list[Hypothesis]] = [[] for _ in range(utterances)]
    step = 0
    # Bounds hold only while every further label costs: no length normalization, no negative scale (a prior), but for one phrase's reward.
    bounded = stop == "best" and exponent == 0 and all(f.scale >= 0 for f in fused.values())
    ahead = sum(f.scale * f.scorer.reward for f in fused.values())
    while len(who):
        step += 1
        only_end = now.ended | (now.length >= limit[who, None])
        if repeats is not None:
            only_end |= looping(now.history, now.length, repeats=repeats)
        said = {n: _said(t, now, vocabulary) for n, t in terms.items() if t.fused.when.lookahead}
        if apart is not None:
            apart = _with_ends(apart, now, terms, said, vocabulary.eos, exponent)
        bounds = [_bound(terms[name], now, vocabulary) for name in others]
        now, terms, proposed = _grow(now, terms, said, bounds, only_end, unsaid, vocabulary.eos, wide, exponent, step, ending=apart is None)
        if others:
            terms |= {name: _fuse(terms[name], now, starts, step - 1) for name in others}
            now, terms = _chosen(now, terms, proposed, others, beam, exponent, step)
        terms |= {name: _fuse(term, now, starts, step - 1) for name, term in terms.items() if name not in others}
        now = _rescored(now, terms)
        done = now.ended.all(1)
        if bounded:
            finished = torch.where(now.ended, now.score, NEG).amax(1) if apart is None else apart.beam.score[:, 0]
            growing = torch.where(now.ended, NEG, now.score).amax(1)
            done |= (finished > NEG) & (finished >= growing + ahead)
        if bool(done.any()):
            found, scores = (apart.beam, apart.scores) if apart else (now, {name: term.score for name, term in terms.items()})
            for b in done.nonzero()[:, 0].tolist():
                results[int(who[b])] = _hypotheses(found, scores, b, vocabulary, exponent)
            keep = (~done).nonzero()[:, 0]
            who, now, apart = who[keep], now.kept(keep), apart and apart.kept(keep)
            terms = {name: _kept(term, keep) for name, term in terms.items()}
    return results


def looping(history: Tensor, length: Tensor, *, repeats: int) -> Tensor:
    """[...] bool: whether histories [..., L] of lengths [...] end in `repeats` >= 2 repetitions of the same 1 to LONGEST_LOOP labels."""
    found = torch.zeros_like(length, dtype=torch.bool)
    for period in range(1, LONGEST_LOOP + 1):
        back = length[..., None] - 1 - torch.arange(period * (repeats - 1))
        fits = length >= period * repeats
        if bool(fits.any()):
            same = history.gather(-1, back.clamp(min=0)) == history.gather(-1, (back - period).clamp(min=0))
            found |= fits & same.all(-1)
    return found


def _said(term: Term, now: Beam, vocabulary: Vocabulary) -> Tensor:
    """[B, K, V] log p of the next label by a term that looks ahead."""
    log_probs = term.fused.scorer.log_probs(term.state).cpu()
    return torch.nn.functional.pad(log_probs, (0, vocabulary.size - log_probs.shape[1]), value=NEG).view(*now.score.shape, -1)


def _bound(term: Term, now: Beam, vocabulary: Vocabulary) -> Tensor:
    """[B, K, V] at least what such a term will say of the next label, scaled; 0 where it is not due at once or subtracted."""
    if not isinstance(term.fused.when, EveryLabel) or term.fused.scale < 0 or (found := term.fused.scorer.bound(term.state)) is None:
        return torch.zeros(())
    found = torch.nn.functional.pad(found.cpu(), (0, vocabulary.size - found.shape[1])).view(*now.score.shape, -1)
    found[..., vocabulary.eos] = 0.0
    return torch.where(now.ended[..., None], 0.0, weighted(term.fused.scale, found))


def _grow(
    now: Beam, terms: Mapping[str, Term], said: Mapping[str, Tensor], bounds: Sequence[Tensor], only_end: Tensor, unsaid: Tensor, eos: int,
    beam: int, exponent: float, step: int, *, ending: bool,
) -> tuple[Beam, dict[str, Term], Tensor]:  # fmt: skip
    """The `beam` best hypotheses one label longer, by what was said of it and will at most be said; their terms; [B, K] what the terms
    that said it give them."""
    groups, k = now.score.shape
    v = len(unsaid)
    step_scores = torch.zeros(groups, k, v)
    for name, log_probs in said.items():
        step_scores = step_scores + weighted(terms[name].fused.scale, log_probs)
    step_scores[..., unsaid] = NEG
    others = torch.arange(v) != eos
    step_scores = step_scores.masked_fill(only_end[..., None] & others, NEG)
    step_scores[..., eos] = torch.where(now.ended, 0.0, step_scores[..., eos] if ending else NEG)
    total = torch.nan_to_num(now.score[..., None] + step_scores, nan=NEG, neginf=NEG, posinf=NEG)
    own = sum((weighted(terms[name].fused.scale, terms[name].score) for name in said), torch.zeros(groups, k))
    # Ended hypotheses compete at their own length, growing ones at this step's.
    scale = torch.where(now.ended, (now.length + 1).double() / step, 1.0).pow(-exponent).to(total.dtype)
    hopes = sum(bounds, total)
    chosen = (hopes * scale[..., None]).flatten(1).topk(min(beam, k * v), dim=1).indices
    source, label = chosen // v, chosen % v
    ended_before = now.ended.gather(1, source)
    score = total.flatten(1).gather(1, chosen)
    length, ends = now.length.gather(1, source), label == eos
    history = now.history.gather(1, source[..., None].expand(-1, -1, now.history.shape[2]))
    if int(length.max()) >= history.shape[2]:
        history = torch.nn.functional.pad(history, (0, max(16, history.shape[2])))
    history = history.scatter(2, length[..., None], torch.where(ends, 0, label)[..., None])
    rows = (source + torch.arange(groups)[:, None] * k).flatten()
    grown = Beam(score, history, torch.where(ends, length, length + 1), ends | (score == NEG))
    moved = {name: _moved(term, source, rows, grown, ends & ~ended_before) for name, term in terms.items()}
    return grown, moved, (own[..., None] + step_scores).flatten(1).gather(1, chosen)


def _chosen(
    now: Beam, terms: Mapping[str, Term], proposed: Tensor, others: Sequence[str], beam: int, exponent: float, step: int
) -> tuple[Beam, dict[str, Term]]:  # fmt: skip
    """The `beam` best of the hypotheses that were proposed, by what the other terms have said since."""
    score = sum((weighted(terms[name].fused.scale, terms[name].score) for name in others), proposed)
    score = torch.where(now.score == NEG, NEG, torch.nan_to_num(score, nan=NEG, neginf=NEG))
    now = replace(now, score=score)
    slots = now.rank(exponent, step).topk(min(beam, score.shape[1]), dim=1).indices
    rows = (slots + torch.arange(len(slots))[:, None] * score.shape[1]).flatten()
    return now.best(slots), {
        name: Term(t.fused, t.fused.scorer.select(t.state, rows), t.score.gather(1, slots), t.seen.gather(1, slots))
        for name, t in terms.items()
    }


@dataclass(frozen=True)
class Ends:
    """The best finished hypotheses so far, best first, in a list of their own: they take no slot of the beam."""

    beam: Beam
    scores: Mapping[str, Tensor]  # [B, K] by term

    def kept(self, keep: Tensor) -> Ends:
        return Ends(self.beam.kept(keep), {name: score[keep] for name, score in self.scores.items()})


def _no_ends(utterances: int, beam: int, terms: Mapping[str, Term]) -> Ends:
    none = torch.full((utterances, beam), NEG)
    length = torch.zeros(utterances, beam, dtype=torch.long)
    return Ends(Beam(none, length[..., None][..., :0], length, length == 0), dict.fromkeys(terms, none))


def _with_ends(ends: Ends, now: Beam, terms: Mapping[str, Term], said: Mapping[str, Tensor], eos: int, exponent: float) -> Ends:
    """The list with what the hypotheses of the beam are if they end here, by all terms: what a term held back is scored too."""
    alive = ~now.ended & (now.score > NEG)
    scores = {}
    for name, term in terms.items():
        if name in said and bool((term.seen == now.length)[alive].all()):
            gained = said[name][..., eos]  # what `finish` would say
        else:
            labels, lengths = _unseen(now, term.seen, alive)
            gained, state = term.fused.scorer.advance(term.state, labels, lengths)
            gained = (gained.cpu() + term.fused.scorer.finish(state).cpu()).view_as(now.score)
        scores[name] = torch.cat([ends.scores[name], term.score + gained], 1)
    new = sum((weighted(terms[name].fused.scale, score[:, -now.score.shape[1] :]) for name, score in scores.items()), torch.zeros(()))
    longest = max(now.history.shape[2], ends.beam.history.shape[2])
    histories = [torch.nn.functional.pad(x.history, (0, longest - x.history.shape[2])) for x in (ends.beam, now)]
    new = torch.where(alive, torch.nan_to_num(new, nan=NEG, neginf=NEG), NEG)
    score, length = torch.cat([ends.beam.score, new], 1), torch.cat([ends.beam.length, now.length], 1)
    both = Beam(score, torch.cat(histories, 1), length, torch.ones_like(length, dtype=torch.bool))
    best = both.rank(exponent, 1).topk(ends.beam.score.shape[1], dim=1).indices
    return Ends(both.best(best), {name: score.gather(1, best) for name, score in scores.items()})


def _moved(term: Term, source: Tensor, rows: Tensor, grown: Beam, ending: Tensor) -> Term:
    """The term behind the chosen hypotheses; what ends now is finished: pending labels and eos are scored."""
    scorer = term.fused.scorer
    state = scorer.select(term.state, rows)
    score, seen = term.score.gather(1, source), term.seen.gather(1, source)
    if bool(ending.any()):
        slots = ending.flatten().nonzero()[:, 0]
        part = scorer.select(state, slots)
        labels, lengths = _unseen(grown, seen, ending)
        gained, part = scorer.advance(part, labels[slots], lengths[slots])
        score = score.flatten().index_add(0, slots, gained.cpu() + scorer.finish(part).cpu()).view_as(score)
        seen = torch.where(ending, grown.length, seen)
    return Term(term.fused, state, score, seen)


def _unseen(now: Beam, seen: Tensor, due: Tensor) -> tuple[Tensor, Tensor]:
    lengths = torch.where(due, now.length - seen, 0).flatten()
    index = (seen.flatten()[:, None] + torch.arange(int(lengths.max()))).clamp(max=now.history.shape[2] - 1)
    return now.history.flatten(0, 1).gather(1, index), lengths


def _fuse(term: Term, now: Beam, starts: Tensor, step: int) -> Term:
    alive = ~now.ended
    place = torch.arange(now.history.shape[2])
    inside = (place > term.seen[..., None]) & (place < now.length[..., None])
    count = torch.where(alive, now.length - term.seen, 0)
    pending = Pending(step, count, (starts[now.history] & inside).any(2) & alive, alive)
    due = term.fused.when.due(pending) & alive
    if not bool(due.any()):
        return term
    labels, lengths = _unseen(now, term.seen, due)
    gained, state = term.fused.scorer.advance(term.state, labels, lengths)
    return replace(term, state=state, score=term.score + gained.cpu().view_as(term.score), seen=torch.where(due, now.length, term.seen))


def _rescored(now: Beam, terms: Mapping[str, Term]) -> Beam:
    # The sum of the parts, rather than what entered before pruning: a delayed term has spoken meanwhile.
    score = sum((weighted(t.fused.scale, t.score) for t in terms.values()), torch.zeros_like(now.score))
    return replace(now, score=torch.where(now.score == NEG, NEG, torch.nan_to_num(score, nan=NEG, neginf=NEG)))


def _kept(term: Term, keep: Tensor) -> Term:
    k = term.score.shape[1]
    rows = (keep[:, None] * k + torch.arange(k)).flatten()
    return Term(term.fused, term.fused.scorer.select(term.state, rows), term.score[keep], term.seen[keep])


def _hypotheses(now: Beam, scores: Mapping[str, Tensor], b: int, vocabulary: Vocabulary, exponent: float) -> list[Hypothesis]:
    rank = now.rank(exponent, 1)[b]
    out = []
    for k in rank.argsort(dim=0, descending=True, stable=True).tolist():
        if bool(now.ended[b, k]) and float(rank[k]) > NEG:
            labels = tuple(now.history[b, k, : int(now.length[b, k])].tolist())
            out.append(Hypothesis(labels, vocabulary.decode(labels), {name: float(score[b, k]) for name, score in scores.items()}))
    return out
