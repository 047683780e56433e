"""CTC prefix scores of the whole vocabulary, and the chosen labels advanced: duolect against the loop over frames.

One step of a label-synchronous search: log p(next label | prefix) for every label and every row, then each row's state behind the label
that the beam chose. Legend: B utterances, R rows, T frames, V labels.
"""

from __future__ import annotations

import argparse
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import harness
import torch
from harness import Spent, Timing, Unavailable, milliseconds, seconds_of, timing
from synthetic import MadeUp, ctc_log_probs
from torch import Tensor

from duolect.search.prefix import CtcPrefix, PrefixState

NEG = -1e10
BLANK, EOS = 0, 1
ESPNET, SPEECHBRAIN = "espnet==202511", "speechbrain==1.1.2"
COMPARED = -60.0
"""Scores above this are compared; far below, fp32 sums in log space have no digits left."""

TOLERANCE = 5e-3
"""Greatest difference of a compared score: what fp32 recursions over 500 frames leave."""


@dataclass(frozen=True)
class Size:
    """rows = utterances x beam."""

    frames: int
    labels: int
    rows: int
    utterances: int


@dataclass(frozen=True)
class Move:
    """What the beam did at one step: row r goes on from row parent[r] with label[r], which is among candidates [R, C] of its parent."""

    parent: Tensor
    label: Tensor
    candidates: Tensor


class Contender(ABC):
    """One implementation of the step. `scores` of a step: [R, V] log p(next | prefix), eos included."""

    name: str

    def __init__(self, log_probs: Tensor, lengths: Tensor, rows: int) -> None:
        self.rows, self.utterances = rows, len(log_probs)
        self.beam = rows // len(log_probs)

    @abstractmethod
    def start(self) -> Any:
        """The state of R empty prefixes."""

    @abstractmethod
    def step(self, state: Any, move: Move) -> tuple[Tensor, Any]:
        """(scores [R, V], the state behind the move)."""


class Duolect(Contender):
    """`CtcPrefix`: one matrix product for all labels, cumulative sums for the chosen ones."""

    name = "duolect"

    def __init__(self, log_probs: Tensor, lengths: Tensor, rows: int) -> None:
        super().__init__(log_probs, lengths, rows)
        vocabulary = MadeUp([str(i) for i in range(log_probs.shape[2])], blank=BLANK)
        vocabulary.eos = EOS
        self.scorer = CtcPrefix(log_probs, lengths, vocabulary=vocabulary)
        self.one = torch.ones(rows, dtype=torch.long)

    def start(self) -> PrefixState:
        return self.scorer.select(self.scorer.start(self.utterances), torch.arange(self.utterances).repeat_interleave(self.beam))

    def step(self, state: PrefixState, move: Move) -> tuple[Tensor, PrefixState]:
        scores = self.scorer.log_probs(state)
        return scores, self.scorer.advance(self.scorer.select(state, move.parent), move.label[:, None], self.one)[1]


@dataclass(frozen=True)
class LoopState:
    """Forward scores [T+1, R] that end in the last label, in blank; column 0 is before the first frame."""

    label: Tensor
    blank: Tensor
    prefix: Tensor  # [R]
    last: Tensor  # [R]


class Loop(Contender):
    """The textbook recursion (Watanabe et al. 2017, algorithm 2) for all rows and labels at once, frame after frame, fp32."""

    name = "loop"

    def __init__(self, log_probs: Tensor, lengths: Tensor, rows: int, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(log_probs, lengths, rows)
        past = torch.arange(log_probs.shape[1])[:, None] >= lengths[None]
        x = log_probs.to(dtype).transpose(0, 1).masked_fill(past[..., None], NEG)  # [T, B, V]
        x[..., BLANK] = x[..., BLANK].masked_fill(past, 0.0)
        self.x, self.utterance = x.contiguous(), torch.arange(self.utterances).repeat_interleave(self.beam)
        self.row = torch.arange(rows)

    def start(self) -> LoopState:
        frames = len(self.x)
        blank = torch.cat([self.x.new_zeros(1, self.rows), self.x[:, self.utterance, BLANK].cumsum(0)])
        return LoopState(self.x.new_full((frames + 1, self.rows), NEG), blank, self.x.new_zeros(self.rows), torch.full((self.rows,), -1))

    def step(self, state: LoopState, move: Move) -> tuple[Tensor, LoopState]:
        frames, labels = len(self.x), self.x.shape[2]
        label = self.x.new_full((frames + 1, self.rows, labels), NEG)
        blank = label.clone()
        psi = label[0].clone()
        either = torch.logaddexp(state.label, state.blank)
        repeats = self.row[state.last >= 0], state.last[state.last >= 0]
        for t in range(1, frames + 1):
            x = self.x[t - 1, self.utterance]  # [R, V]
            phi = either[t - 1, :, None].repeat(1, labels)
            phi[repeats] = state.blank[t - 1, repeats[0]]
            label[t] = torch.logaddexp(label[t - 1], phi) + x
            blank[t] = torch.logaddexp(blank[t - 1], label[t - 1]) + x[:, BLANK, None]
            psi = torch.logaddexp(psi, phi + x)
        scores = psi - state.prefix[:, None]
        scores[:, EOS] = either[-1] - state.prefix
        p, y = move.parent, move.label
        return scores, LoopState(label[:, p, y], blank[:, p, y], psi[p, y], y)


class Espnet(Contender):
    """ESPnet's CTCPrefixScoreTH over the whole vocabulary."""

    name = "espnet"

    def __init__(self, log_probs: Tensor, lengths: Tensor, rows: int) -> None:
        super().__init__(log_probs, lengths, rows)
        theirs = harness.module_of(ESPNET, "espnet/nets/ctc_prefix_score.py").CTCPrefixScoreTH
        self.labels, self.scorer = log_probs.shape[2], theirs(log_probs, lengths, BLANK, EOS)

    def start(self) -> Any:
        return [[EOS] for _ in range(self.rows)], None

    def step(self, state: Any, move: Move) -> tuple[Tensor, Any]:
        prefixes, inner = state
        scores, inner = self.scorer(prefixes, inner, self._scored(move))
        chosen = ((move.parent % self.beam) * self.labels + move.label).view(self.utterances, self.beam)
        grown = [[*prefixes[p], y] for p, y in zip(move.parent.tolist(), move.label.tolist(), strict=True)]
        return scores, (grown, self.scorer.index_select_state(inner, chosen))

    def _scored(self, move: Move) -> Tensor | None:
        return None


class EspnetCandidates(Espnet):
    """The same as ESPnet's searches use it: only 1.5 x beam candidates a row are scored, which another model must have chosen."""

    name = "espnet 1.5 beam"

    def _scored(self, move: Move) -> Tensor | None:
        return move.candidates


class Speechbrain(Contender):
    """SpeechBrain's CTCPrefixScore over the whole vocabulary."""

    name = "speechbrain"

    def __init__(self, log_probs: Tensor, lengths: Tensor, rows: int) -> None:
        super().__init__(log_probs, lengths, rows)
        harness.stand_in("speechbrain.dataio.dataio", length_to_mask=lambda n: (torch.arange(int(n.max()))[None] < n[:, None]).to(n.dtype))
        harness.stand_in("speechbrain.utils.logger", get_logger=lambda name: None)
        theirs = harness.module_of(SPEECHBRAIN, "speechbrain/decoders/ctc.py").CTCPrefixScore
        self.labels, self.scorer = log_probs.shape[2], theirs(log_probs, lengths, BLANK, EOS)

    def start(self) -> Any:
        self.scorer.prefix_length = -1
        return torch.full((self.rows,), EOS), None

    def step(self, state: Any, move: Move) -> tuple[Tensor, Any]:
        last, inner = state
        scores, inner = self.scorer.forward_step(last, inner)
        chosen = ((move.parent % self.beam) * self.labels + move.label).view(self.utterances, self.beam)
        return scores, (move.label, self.scorer.permute_mem(inner, chosen))


CONTENDERS: tuple[type[Contender], ...] = (Duolect, Loop, Espnet, EspnetCandidates, Speechbrain)


def moves_of(size: Size, ours: Duolect, *, steps: int) -> list[Move]:
    """What a beam search by these scores alone would do, from the empty prefix on."""
    groups, beam, state = size.utterances, size.rows // size.utterances, ours.start()
    total = torch.full((groups, beam), -math.inf)
    total[:, 0] = 0.0
    moves = []
    for _ in range(steps):
        scores = ours.scorer.log_probs(state)
        scores[:, [BLANK, EOS]] = -math.inf
        top = scores.topk(int(1.5 * beam), dim=1)
        ranked = (total.view(-1, 1) + top.values).view(groups, -1)
        total, chosen = ranked.topk(beam, dim=1)
        width = top.indices.shape[1]
        parent = (chosen // width + torch.arange(groups)[:, None] * beam).flatten()
        label = top.indices[parent, (chosen % width).flatten()]
        moves.append(Move(parent, label, top.indices))
        state = ours.step(state, moves[-1])[1]
    return moves


def replayed(contender: Contender, moves: Sequence[Move]) -> tuple[list[Tensor], list[Spent]]:
    """(scores of each step, seconds of each step)."""
    state, scores, taken = contender.start(), [], []
    for move in moves:
        seconds, (found, state) = seconds_of(lambda state=state, move=move: contender.step(state, move))
        scores.append(found)
        taken.append(seconds)
    return scores, taken


def difference(wanted: Sequence[Tensor], got: Sequence[Tensor], moves: Sequence[Move], *, only_candidates: bool) -> float:
    """Greatest difference of a score worth comparing, over steps, rows and labels (blank aside)."""
    worst = 0.0
    for a, b, move in zip(wanted, got, moves, strict=True):
        a, b = a.double(), b.double()
        worth = a > COMPARED
        worth[:, BLANK] = False
        if only_candidates:
            worth &= torch.zeros_like(worth).scatter(1, move.candidates, True)
        worst = max(worst, float((a - b)[worth].abs().max()))
    return worst


def prepared(size: Size, kinds: Sequence[type[Contender]], absent: dict[str, str]) -> tuple[list[Contender], dict[str, float]]:
    """(the contenders over the same log-probs of utterances of falling length, seconds of the processor each took to get ready)."""
    vocabulary = MadeUp([str(i) for i in range(size.labels)], blank=BLANK)
    log_probs = ctc_log_probs(vocabulary, utterances=size.utterances, frames=size.frames, seed=size.frames + size.labels)
    lengths = torch.tensor([size.frames - b * size.frames // 10 for b in range(size.utterances)])
    ready: list[Contender] = []
    setup: dict[str, float] = {}
    for kind in kinds:
        own = log_probs.clone()  # ESPnet's and SpeechBrain's write into it
        try:
            spent, contender = seconds_of(lambda kind=kind, own=own: kind(own, lengths, size.rows))
            setup[kind.name] = spent.cpu
            ready.append(contender)
        except Unavailable as error:
            absent[kind.name] = str(error)
    return ready, setup


def measured(
    size: Size, *, kinds: Sequence[type[Contender]], repetitions: int, steps: int, seconds: float, absent: dict[str, str]
) -> dict[str, Any]:
    """One line of the table. Raises SystemExit where a contender gives other scores."""
    ready, setup = prepared(size, kinds, absent)
    ours = ready[0]
    assert isinstance(ours, Duolect)
    moves = moves_of(size, ours, steps=steps)
    wanted = replayed(ours, moves)[0]
    differences = {
        c.name: difference(wanted, replayed(c, moves)[0], moves, only_candidates=isinstance(c, EspnetCandidates)) for c in ready[1:]
    }
    if wrong := {name: d for name, d in differences.items() if not d <= TOLERANCE}:
        sys.exit(f"error: scores differ at {size}: {wrong}; nothing was timed")
    taken: dict[str, list[Spent]] = {c.name: [] for c in ready}

    def once(contender: Contender) -> Spent:
        taken[contender.name] += replayed(contender, moves)[1]
        return taken[contender.name][-1]

    harness.interleaved({c.name: lambda c=c: once(c) for c in ready}, repetitions=repetitions, seconds=seconds)
    return _row(size, {name: timing(values) for name, values in taken.items()}, setup, differences)


def _row(size: Size, step: dict[str, Timing], setup: dict[str, float], differences: dict[str, float]) -> dict[str, Any]:
    row: dict[str, Any] = {"T": size.frames, "V": size.labels, "rows": size.rows, "B": size.utterances}
    for name, found in step.items():
        row[f"{name} ms"] = milliseconds(found.median)
    for name in step:
        if name != "duolect":
            row[f"x {name}"] = harness.times(step[name], step["duolect"])
            row[f"x cpu {name}"] = harness.times(step[name], step["duolect"], by="cpu")
    row["details"] = {
        name: {
            **harness.measures(t),
            "setup_ms": milliseconds(setup[name]),
            "max_difference": differences.get(name, 0.0),
        }
        for name, t in step.items()
    }
    return row


def sizes(quick: bool) -> list[Size]:
    """All sizes, or two small ones."""
    if quick:
        return [Size(50, 256, 8, 1), Size(50, 256, 8, 2)]
    return [Size(t, v, rows, b) for t in (200, 500) for v in (256, 1024, 10000) for rows, b in ((8, 1), (16, 1), (16, 4))]


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two tiny sizes: does it run, are the scores equal")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch, for every side")
    parser.add_argument("--repetitions", type=int, default=5, help="rounds over all contenders")
    names = [kind.name for kind in CONTENDERS]
    parser.add_argument("--without", nargs="*", default=[], choices=names[1:], help="leave these out")
    parser.add_argument("--steps", type=int, default=3, help="steps of the beam in a round, each timed")
    parser.add_argument("--seconds", type=float, default=30.0, help="no new round of a size after so long (one is always made)")
    args = parser.parse_args()
    harness.use_threads(args.threads)
    absent: dict[str, str] = {}
    kinds = [kind for kind in CONTENDERS if kind.name not in args.without]
    rows = []
    with torch.inference_mode():
        for size in sizes(args.quick):
            print(f"{size} ...", file=sys.stderr, flush=True)
            rows.append(measured(size, kinds=kinds, repetitions=args.repetitions, steps=args.steps, seconds=args.seconds, absent=absent))
    notes = [f"{name} is left out: {why}" for name, why in absent.items()]
    worst = max(d["max_difference"] for row in rows for d in row["details"].values())
    notes.append(f"scores of every contender equal duolect's within {worst:.1e} at every step, for every label above log p {COMPARED:.0f}")
    setup = max(rows, key=lambda row: row["details"]["duolect"]["setup_ms"])
    notes.append(
        "once per batch of utterances, not in the table: "
        + ", ".join(f"{name} {d['setup_ms']:.0f} ms" for name, d in setup["details"].items())
        + f" (T={setup['T']}, V={setup['V']}, B={setup['B']})"
    )
    shown = [{k: v for k, v in row.items() if k != "details"} for row in rows]
    harness.print_table(
        shown,
        title="median milliseconds of one step (whole vocabulary, then advance); x: times as long as duolect; x cpu: least processor time",
    )
    harness.save("ctc_prefix", rows, settings=vars(args), notes=notes, quick=args.quick)


if __name__ == "__main__":
    main()
