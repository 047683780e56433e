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


@dataclass(frozen=True)
class PrefixState:
    """Forward scores of the prefixes. T frames; column 0 is before the first frame."""

    label: Tensor  # [R, T+1] log p of the frames so far, prefix complete, last frame its last label
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
        self.log_probs_ = x
        self.product_dtype = torch.float64 if x.device.type == "cpu" else torch.float32
        self.shift = x.amax(1).clamp(min=FLOOR)  # [B, V] by label, so that rare labels do not underflow
        self.probs = (x - self.shift[:, None]).exp().to(self.product_dtype)

    def start(self, rows: int) -> PrefixState:
        x = self.log_probs_
        zero = x.new_zeros(rows, 1)
        label = x.new_full((rows, x.shape[1] + 1), IMPOSSIBLE)
        index = torch.arange(rows, device=x.device)
        return PrefixState(label, torch.cat([zero, x[..., self.blank].cumsum(1)], 1), zero[:, 0], torch.full_like(index, -1), index)

    def log_probs(self, state: PrefixState, labels: Tensor | None = None) -> Tensor:
        phi = torch.logaddexp(state.label, state.blank)[:, :-1]  # [R, T] at t-1
        peak = phi.amax(1, keepdim=True)
        summed = self._product((phi - peak).exp(), state.utterance)
        at = state.last.clamp(min=0)[:, None]
        shift = self.shift[state.utterance]
        repeat = ((state.blank[:, :-1] - peak).exp() * self.probs[state.utterance, :, at[:, 0]]).sum(1, keepdim=True)
        summed = summed.scatter(1, at, torch.where(state.last[:, None] < 0, summed.gather(1, at), repeat.to(summed.dtype)))
        psi = summed.double().log() + shift + peak
        out = _possible(psi) - state.prefix[:, None]
        out[:, self.blank] = NEG
        out[:, self.vocabulary.eos] = self.finish(state).double()
        return (out if labels is None else out.gather(1, labels.to(out.device))).float()

    def advance(self, state: PrefixState, labels: Tensor, lengths: Tensor) -> tuple[Tensor, PrefixState]:
        begin = state.prefix
        labels, lengths = labels.to(begin.device), lengths.to(begin.device)
        for s in range(labels.shape[1]):
            state = self._one(state, labels[:, s], lengths > s)
        gained = torch.where(lengths > 0, _possible(state.prefix) - begin, 0.0)
        return gained.float(), state

    def _one(self, state: PrefixState, label: Tensor, active: Tensor) -> PrefixState:
        x = self.log_probs_[state.utterance, :, label]  # [R, T]
        b = self.log_probs_[state.utterance, :, self.blank]
        both = torch.logaddexp(state.label, state.blank)
        phi = torch.where((label == state.last)[:, None], state.blank, both)[:, :-1]
        none = x.new_full((len(x), 1), IMPOSSIBLE)
        # r(t) = x(t) + log(r(t-1) + phi(t-1)) solved with C = cumsum(x): r - C is a cumulative log-sum-exp.
        c, d = x.cumsum(1), b.cumsum(1)
        new_label = torch.cat([none, c + torch.logcumsumexp(phi - c + x, 1)], 1)
        new_blank = torch.cat([none, d + torch.logcumsumexp(new_label[:, :-1] - d + b, 1)], 1)
        prefix = torch.logsumexp(phi + x, 1)

        def chosen(new: Tensor, old: Tensor) -> Tensor:
            return torch.where(active.view(-1, *[1] * (new.dim() - 1)), new, old)

        return PrefixState(
            chosen(new_label.clamp(min=IMPOSSIBLE), state.label),
            chosen(new_blank.clamp(min=IMPOSSIBLE), state.blank),
            chosen(prefix, state.prefix),
            chosen(label, state.last),
            state.utterance,
        )

    def finish(self, state: PrefixState) -> Tensor:
        return (_possible(torch.logaddexp(state.label[:, -1], state.blank[:, -1])) - state.prefix).float()

    def select(self, state: PrefixState, rows: Tensor) -> PrefixState:
        rows = rows.to(state.prefix.device)
        return PrefixState(state.label[rows], state.blank[rows], state.prefix[rows], state.last[rows], state.utterance[rows])

    def _product(self, weights: Tensor, utterance: Tensor) -> Tensor:
        """[R, V] sum_t weights[r, t] * p_t of the row's utterance: one batched product, rows gathered by utterance."""
        count = torch.bincount(utterance, minlength=len(self.probs))
        order = torch.argsort(utterance, stable=True)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order), device=order.device) - (count.cumsum(0) - count)[utterance[order]]
        table = weights.new_zeros(len(self.probs), int(count.max()), weights.shape[1]).to(self.product_dtype)
        table[utterance, rank] = weights.to(self.product_dtype)
        return torch.bmm(table, self.probs)[utterance, rank]


def _possible(score: Tensor) -> Tensor:
    return torch.where(score < IMPOSSIBLE / 10, NEG, score)
