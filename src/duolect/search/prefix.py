"""CTC prefix probabilities as a Scorer, for label-synchronous search: no loop over frames.

For prefix g and label c that does not repeat its last one, p(g c ...) = sum_t phi_g(t-1) p_t(c) with the same phi for every c: the
scores of the whole vocabulary are one matrix product. Only the labels chosen are advanced, in closed form by cumulative sums.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from duolect.scorer import Scorer
from duolect.search.fusion import NEG
from duolect.vocabulary import Vocabulary

FLOOR = -1e4
"""Least log-prob of a label in a frame: differences of cumulative sums stay finite."""

IMPOSSIBLE = -1e9
"""A path that does not exist; far below anything a sum of FLOORs reaches."""

FAINT, LEAST = 1e-40, 1e-25
"""Frames before which a prefix is so improbable, against its best one, add nothing to a sum over frames that is at least LEAST."""


@dataclass(frozen=True)
class PrefixState:
    """Forward scores of the prefixes. T frames; column 0 is before the first frame."""

    both: Tensor  # [R, T+1] log p of the frames so far, prefix complete
    blank: Tensor  # [R, T+1] ... last frame blank
    prefix: Tensor  # [R] log p(prefix ...)
    last: Tensor  # [R] last label, -1 before the first
    utterance: Tensor  # [R]


class CtcPrefix(Scorer[PrefixState]):
    """log p_ctc(next label | prefix) = log p(prefix label ...) - log p(prefix ...), and for eos log p(exactly prefix) - log p(prefix ...).

    log_probs: [B, T, V] of the CTC model, lengths: [B]. Sums over all alignments (Graves 2012; Hori et al. 2017). Computes in fp64 on
    a CPU; elsewhere the matrix product is fp32. Blank scores -inf.
    """

    def __init__(self, log_probs: Tensor, lengths: Tensor, *, vocabulary: Vocabulary) -> None:
        assert vocabulary.blank is not None
        self.vocabulary, self.blank = vocabulary, vocabulary.blank
        x = log_probs.double().clamp(min=FLOOR)
        past = torch.arange(x.shape[1], device=x.device)[None] >= lengths[:, None]
        x = x.masked_fill(past[..., None], IMPOSSIBLE)
        x[..., self.blank] = x[..., self.blank].masked_fill(past, 0.0)
        self.blanks = torch.nn.functional.pad(x[..., self.blank].cumsum(1), (1, 0))  # [B, T+1] log p of nothing but blank
        self.shift = x.amax(1).clamp(min=FLOOR)  # [B, V] by label, so that rare labels do not underflow
        dtype = torch.float64 if x.device.type == "cpu" else torch.float32
        self.probs = (x - self.shift[:, None]).exp().to(dtype)
        self.by_label = x.transpose(1, 2).contiguous()  # [B, V, T], where a label's frames lie together

    def start(self, rows: int) -> PrefixState:
        index = torch.arange(rows, device=self.blanks.device)
        return PrefixState(self.blanks, self.blanks, self.blanks[:, 0], torch.full_like(index, -1), index)

    def log_probs(self, state: PrefixState, labels: Tensor | None = None) -> Tensor:
        phi = state.both[:, :-1]  # [R, T] at t-1
        peak = phi.amax(1, keepdim=True)
        psi = self._product((phi - peak).exp(), state.utterance).double().log_()
        psi += self.shift[state.utterance]
        psi += possible(peak)
        at = state.last.clamp(min=0)[:, None]
        repeat = possible(torch.logsumexp(state.blank[:, :-1] + self.by_label[state.utterance, at[:, 0]], 1, keepdim=True))
        psi.scatter_(1, at, torch.where(state.last[:, None] < 0, psi.gather(1, at), repeat))
        psi -= state.prefix[:, None]
        out = psi.float()
        out[:, self.blank] = NEG
        out[:, self.vocabulary.eos] = self.finish(state)
        return out if labels is None else out.gather(1, labels.to(out.device))

    def advance(self, state: PrefixState, labels: Tensor, lengths: Tensor) -> tuple[Tensor, PrefixState]:
        begin = state.prefix
        labels, lengths = labels.to(begin.device), lengths.to(begin.device)
        for s in range(labels.shape[1]):
            state = self._one(state, labels[:, s], lengths > s)
        gained = torch.where(lengths > 0, possible(state.prefix) - begin, 0.0)
        return gained.float(), state

    def _one(self, state: PrefixState, label: Tensor, active: Tensor) -> PrefixState:
        begun = torch.where((label == state.last)[:, None], state.blank, state.both)
        both, new_blank, prefix = self.grown(begun, label, state.utterance)
        grown = PrefixState(both, new_blank, prefix, label, state.utterance)
        if bool(active.all()):
            return grown

        def chosen(new: Tensor, old: Tensor) -> Tensor:
            return torch.where(active.view(-1, *[1] * (new.dim() - 1)), new, old)

        return PrefixState(
            chosen(grown.both, state.both),
            chosen(grown.blank, state.blank),
            chosen(grown.prefix, state.prefix),
            chosen(label, state.last),
            state.utterance,
        )

    def grown(self, begun: Tensor, label: Tensor, utterance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(both, blank, prefix) of a PrefixState with one more label [R], out of begun [R, T+1]: log p of all behind which it may come."""
        x, blanks = self.by_label[utterance, label], self.blanks[utterance]  # [R, T], [R, T+1]
        grown = begun[:, :-1] + x
        # r(t) = x(t) + log(r(t-1) + phi(t-1)) solved with C = cumsum(x): r - C is a cumulative log-sum-exp.
        c = x.cumsum(1)
        new = x.new_full(blanks.shape, IMPOSSIBLE)
        torch.add(c, torch.logcumsumexp(grown - c, 1), out=new[:, 1:])
        new_blank = torch.full_like(new, IMPOSSIBLE)
        torch.add(blanks[:, 1:], torch.logcumsumexp(new[:, :-1] - blanks[:, :-1], 1), out=new_blank[:, 1:])
        new_blank.clamp_(min=IMPOSSIBLE)
        return torch.logaddexp(new, new_blank).clamp_(min=IMPOSSIBLE), new_blank, grown.logsumexp(1)

    def finish(self, state: PrefixState) -> Tensor:
        return (possible(state.both[:, -1]) - state.prefix).float()

    def select(self, state: PrefixState, rows: Tensor) -> PrefixState:
        rows = rows.to(state.prefix.device)
        return PrefixState(state.both[rows], state.blank[rows], state.prefix[rows], state.last[rows], state.utterance[rows])

    def _product(self, weights: Tensor, utterance: Tensor) -> Tensor:
        """[R, V] sum_t weights[r, t] * p_t of the row's utterance: one batched product, rows gathered by utterance."""
        (rows, frames), groups = weights.shape, len(self.probs)
        live = (weights > FAINT).any(0).nonzero()
        begin, end = (int(live[0]), int(live[-1]) + 1) if len(live) else (0, 0)
        weights, each = weights.to(self.probs.dtype), torch.arange(groups, device=utterance.device)[:, None]
        if rows % groups == 0 and bool((utterance.view(groups, rows // groups) == each).all()):
            table, place = weights.view(groups, rows // groups, frames), None
        else:
            count = torch.bincount(utterance, minlength=groups)
            order = torch.argsort(utterance, stable=True)
            rank = torch.empty_like(order)
            rank[order] = torch.arange(rows, device=order.device) - (count.cumsum(0) - count)[utterance[order]]
            table, place = weights.new_zeros(groups, int(count.max()), frames), (utterance, rank)
            table[place] = weights

        def summed(first: int, last: int) -> Tensor:
            sums = torch.bmm(table[..., first:last], self.probs[:, first:last])
            return sums.flatten(0, 1) if place is None else sums[place]

        out = summed(begin, end)
        # A label that is so rare in the frames that count may owe what it has to the others.
        return summed(0, frames) if end - begin < frames and bool((out < LEAST).any()) else out


def possible(score: Tensor) -> Tensor:
    """The score, -inf where no path leads."""
    return torch.where(score < IMPOSSIBLE / 10, NEG, score)
