"""CTC beam search without a language model: duolect's `ctc_beam_search` against pyctcdecode, on the same log-probs.

pyctcdecode runs in a process of its own (it needs numpy 1) and times its own calls. It has two ways: its defaults, which skip labels below
log p -5 in a frame and beams 10 below the best, and with both prunings off. duolect prunes by the beam alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import harness
import numpy as np
import torch
from harness import THROWAWAY, Timing, Unavailable, milliseconds, seconds_of, timing
from synthetic import characters, ctc_log_probs, labels_per_frame, pieces
from torch import Tensor

from duolect.scorer import Hypothesis
from duolect.search.ctc import ctc_beam_search
from duolect.search.reduce import soft_collapse
from duolect.vocabulary import Vocabulary, load_vocabulary

PYCTCDECODE = ("pyctcdecode==0.5.0", "numpy==1.26.4")
DEFAULTS = {"token_min_logp": -5.0, "beam_prune_logp": -10.0}
OFF = {"token_min_logp": -34.5, "beam_prune_logp": -1e30}  # it clips log p at -34.54; labels of probability 0 stay out
SECONDS_PER_EXTENSION = 5e-6
"""About what pyctcdecode takes for one label of one beam in one frame, to see what it can do in time without pruning."""


Way = Literal["alone", "batch", "collapsed"]
WAYS: tuple[Way, ...] = ("alone", "batch", "collapsed")
COLLAPSE = 0.8
"""Threshold of soft collapse, the paper's."""

CHECKED_FRAMES, CHECKED_BEAM = 25, 32
TOLERANCE = 0.05
"""Greatest difference of log p where neither side prunes by more than the beam: their slots differ, and pyctcdecode merges by text."""


@dataclass(frozen=True)
class Input:
    """log_probs [B, T, V] of one vocabulary, lengths [B]."""

    name: str
    vocabulary: Vocabulary
    log_probs: Tensor
    lengths: Tensor


@dataclass(frozen=True)
class Found:
    """Best text and log p of each utterance, and the seconds each took."""

    texts: list[str]
    scores: list[float]
    seconds: list[float]


class Pyctcdecode:
    """The other side, started once per input."""

    def __init__(self, given: Input, folder: Path) -> None:
        np.save(folder / "log_probs.npy", given.log_probs.float().numpy())
        np.save(folder / "lengths.npy", given.lengths.numpy())
        (folder / "labels.json").write_text(json.dumps(labels_of(given.vocabulary)))
        python = harness.environment("pyctcdecode", PYCTCDECODE)
        self.process = subprocess.Popen(
            [str(python), str(Path(__file__).with_name("pyctcdecode_worker.py")), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answer()

    def __call__(self, utterances: Sequence[int], *, beam: int, pruning: dict[str, float], frames: int | None = None) -> Found:
        """The first `frames` frames of the utterances decoded, or all of them."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"utterances": list(utterances), "beam": beam, "frames": frames, **pruning}) + "\n")
        self.process.stdin.flush()
        answer = self._answer()
        return Found([" ".join(a["text"].split()) for a in answer], [a["score"] for a in answer], [a["seconds"] for a in answer])

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise Unavailable("pyctcdecode's process ended; its message is above")
        return json.loads(line)

    def close(self) -> None:
        """Ends the process."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait(timeout=60)


def labels_of(vocabulary: Vocabulary) -> list[str]:
    """The labels as pyctcdecode wants them: no text for blank, a space for the delimiter of a character vocabulary."""
    spelled = ["" if i == vocabulary.blank else vocabulary.piece(i) for i in range(vocabulary.size)]
    return [" " if x == "|" else x for x in spelled] if not any(x.startswith("▁") for x in spelled) else spelled


def ours(given: Input, utterances: Sequence[int], *, beam: int, way: Way) -> Found:
    """duolect's best texts; the seconds of a batch are shared out evenly, and soft collapse counts."""
    groups = [[u] for u in utterances] if way == "alone" else [list(utterances)]
    texts, scores, seconds = [], [], []

    def search(x: Tensor, n: Tensor) -> list[list[Hypothesis]]:
        if way == "collapsed":
            reduced = soft_collapse(x, n, threshold=COLLAPSE)
            x, n = reduced.log_probs, reduced.lengths
        return ctc_beam_search(x, n, vocabulary=given.vocabulary, beam=beam)

    for group in groups:
        n = given.lengths[group]
        x = given.log_probs[group, : int(n.max())]
        taken, found = seconds_of(lambda x=x, n=n: search(x, n))
        for nbest in found:
            text, score = best_text(nbest)
            texts.append(text)
            scores.append(score)
        seconds += [taken / len(group)] * len(group)
    return Found(texts, scores, seconds)


def best_text(nbest: Sequence[Hypothesis]) -> tuple[str, float]:
    """The text with the greatest sum over its label sequences, as pyctcdecode adds up cuts of a word into pieces and spaces at the end."""
    table: dict[str, list[float]] = {}
    for h in nbest:
        table.setdefault(" ".join(h.text.split()), []).append(h.parts["ctc"])
    summed = {text: float(torch.tensor(scores, dtype=torch.double).logsumexp(0)) for text, scores in table.items()}
    return max(summed.items(), key=lambda item: item[1])


def inputs(path: Path | None, vocabulary: Path | None, *, quick: bool) -> list[Input]:
    """Real log-probs from a file, else made-up ones of two vocabularies."""
    if path is not None:
        arrays = np.load(path)
        log_probs, lengths = torch.from_numpy(arrays["log_probs"]).float(), torch.from_numpy(arrays["lengths"]).long()
        if vocabulary is None:
            sys.exit("error: --log-probs needs --vocabulary FOLDER: the model folder whose vocabulary.json says what the labels mean")
        known = load_vocabulary(vocabulary)
        if known.size != log_probs.shape[2]:
            sys.exit(f"error: {path} has {log_probs.shape[2]} labels, the vocabulary of {vocabulary} {known.size}: not the same model's")
        # pyctcdecode starts a word in every beam once <unk> is tried in one, so labels without a text are taken out on both sides.
        silent = [i for i in range(known.size) if i != known.blank and known.piece(i).startswith("<") and known.piece(i).endswith(">")]
        log_probs[..., silent] = -torch.inf
        return [Input(path.stem, known, log_probs.log_softmax(-1), lengths)]
    count, frames = (3, 60) if quick else (16, 500)
    kinds = {"characters": characters(), "pieces": pieces(64 if quick else 256)}
    lengths = torch.full((count,), frames)
    return [Input(name, v, ctc_log_probs(v, utterances=count, frames=frames, seed=7), lengths) for name, v in kinds.items()]


def agreement(a: Found, b: Found) -> dict[str, float]:
    """Share of b's utterances with the same best text, mean of a's score less b's, their greatest distance where the text is the same."""
    pairs = list(zip(a.texts, a.scores, b.texts, b.scores, strict=False))  # b may be of the first utterances only
    return {
        "same": sum(t == u for t, _, u, _ in pairs) / len(pairs),
        "gap": sum(x - y for _, x, _, y in pairs) / len(pairs),
        "distance": max((abs(x - y) for t, x, u, y in pairs if t == u), default=0.0),
    }


def check(given: Input, theirs: Pyctcdecode) -> None:
    """SystemExit unless both sides, pruning by the beam alone, find the same text with the same log p in the begin of each utterance."""
    begin = given.lengths.clamp(max=CHECKED_FRAMES)
    some = range(min(len(given.lengths), 4))
    found = theirs(some, beam=CHECKED_BEAM, pruning=OFF, frames=CHECKED_FRAMES)
    wanted = ours(replace(given, lengths=begin), some, beam=CHECKED_BEAM, way="batch")
    wrong = [
        (u, wanted.texts[u], found.texts[u], wanted.scores[u] - found.scores[u])
        for u in some
        if wanted.texts[u] != found.texts[u] or not abs(wanted.scores[u] - found.scores[u]) <= TOLERANCE
    ]
    if wrong:
        sys.exit(f"error: {given.name}: other results than pyctcdecode's (utterance, our text, theirs, log p): {wrong}; nothing was timed")


def checked(given: Input, beam: int) -> Found:
    """duolect's result; SystemExit where a batch gives other texts or scores than each utterance alone."""
    everything = range(len(given.lengths))
    alone, batch = (ours(given, everything, beam=beam, way=way) for way in ("alone", "batch"))
    worst = max(abs(a - b) for a, b in zip(alone.scores, batch.scores, strict=True))
    if alone.texts != batch.texts or not worst <= 1e-3:
        sys.exit(f"error: duolect's batch differs from each utterance alone (beam {beam}, score by {worst:.2g}); nothing was timed")
    return alone


def unpruned_count(given: Input, beam: int, seconds: float) -> int:
    """How many utterances pyctcdecode can decode without pruning in about that time; at least one."""
    each = float(given.lengths.float().mean()) * given.log_probs.shape[2] * beam * SECONDS_PER_EXTENSION
    return max(1, min(len(given.lengths), int(seconds / each)))


def measured(
    given: Input, theirs: Pyctcdecode | None, beam: int, *, repetitions: int, seconds: float, unpruned_seconds: float
) -> dict[str, Any]:
    """One line of the table."""
    everything = range(len(given.lengths))
    wanted = checked(given, beam)
    same = {"collapsed": agreement(wanted, ours(given, everything, beam=beam, way="collapsed"))}
    taken: dict[str, list[float]] = {}

    def noted(name: str, found: Found) -> float:
        taken.setdefault(name, []).append(sum(found.seconds) / len(found.seconds))
        return taken[name][-1]

    calls = {way: lambda way=way: noted(way, ours(given, everything, beam=beam, way=way)) for way in WAYS}
    if theirs is not None:
        same["theirs"] = agreement(wanted, theirs(everything, beam=beam, pruning=DEFAULTS))
        calls["theirs"] = lambda: noted("theirs", theirs(everything, beam=beam, pruning=DEFAULTS))
    harness.interleaved(calls, repetitions=repetitions, seconds=seconds)
    if theirs is not None:
        # Without pruning it may take minutes, so it is run once, on as many utterances as the time allows, and ours once more beside it.
        some = range(unpruned_count(given, beam, unpruned_seconds))
        found = theirs(some, beam=beam, pruning=OFF)
        noted("theirs unpruned", found)
        noted("alone beside", ours(given, some, beam=beam, way="alone"))
        same["theirs unpruned"] = {**agreement(wanted, found), "utterances": len(found.texts)}
    frames, labels = int(given.lengths.float().mean()), given.log_probs.shape[2]
    row = {"input": given.name, "V": labels, "T": frames, "B": len(given.lengths), "beam": beam}
    return _row(row, {name: timing(values) for name, values in taken.items()}, same)


def _row(row: dict[str, Any], timings: dict[str, Timing], same: dict[str, dict[str, float]]) -> dict[str, Any]:
    row |= {f"{name} ms": milliseconds(t.median) for name, t in timings.items() if name != "alone beside"}
    if "theirs" in timings:
        row |= {f"x {way}": harness.times(timings["theirs"], timings[way]) for way in WAYS}
        row["x unpruned"] = harness.times(timings["theirs unpruned"], timings["alone beside"])
    row |= {f"same: {name}": round(found["same"], 4) for name, found in same.items()}
    about = {name: {"median_ms": milliseconds(t.median), "min_ms": milliseconds(t.least), "count": t.count} for name, t in timings.items()}
    row["details"] = {"timings": about, "agreement": same}
    return row


def notes_of(rows: Sequence[dict[str, Any]], given: Sequence[Input], absent: str | None) -> list[str]:
    """What to read the table with."""
    notes = [f"{x.name}: {labels_per_frame(x.log_probs, x.lengths):.3g} labels a frame above log p -5" for x in given]
    notes.append(
        "milliseconds per utterance; alone: one utterance at a time, batch: all B at once, collapsed: all at once after soft "
        f"collapse at {COLLAPSE}, its time included; same: share of the utterances with the best text of `alone` and `batch`"
    )
    if absent is not None:
        return [*notes, f"pyctcdecode is left out: {absent}"]
    notes.append(
        "theirs: pyctcdecode, one at a time, with its defaults (token_min_logp -5, beam_prune_logp -10); theirs unpruned: off,"
        " the first utterances only; x: theirs / ours; x unpruned: theirs unpruned / alone, both pruning by the beam alone"
    )
    for name in ("theirs", "theirs unpruned"):
        found = [row["details"]["agreement"][name] for row in rows]
        distance, gap = max(f["distance"] for f in found), sum(f["gap"] for f in found) / len(found)
        notes.append(
            f"{name}: where the text is the same its log p differs by {distance:.2g} at most; duolect's best is higher by "
            f"{gap:.2g} on average"
        )
    notes.append(
        "a beam slot is a prefix in duolect, a (text, last frame label) pair in pyctcdecode: at the same beam duolect may hold "
        "twice as many"
    )
    return notes


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short utterances and one beam: does it run, are the results equal")
    parser.add_argument("--log-probs", type=harness.existing, help="what bench/dump_log_probs.py wrote; else made up")
    parser.add_argument("--vocabulary", type=harness.existing, help="the model folder that they are of")
    parser.add_argument("--beams", type=int, nargs="+", default=[16, 64, 100])
    parser.add_argument("--threads", type=int, default=1, help="threads of torch; pyctcdecode has one")
    parser.add_argument("--repetitions", type=int, default=5, help="rounds")
    parser.add_argument("--seconds", type=float, default=60.0, help="no new round of a line after so long (one is always made)")
    parser.add_argument(
        "--unpruned-seconds",
        type=float,
        default=40.0,
        help="about so long for pyctcdecode without pruning, a line (one utterance at least)",
    )
    args = parser.parse_args()
    harness.use_threads(args.threads)
    given = inputs(args.log_probs, args.vocabulary, quick=args.quick)
    beams, repetitions = (args.beams[:1], 2) if args.quick else (args.beams, args.repetitions)
    rows, absent = [], None
    limits = {"repetitions": repetitions, "seconds": args.seconds, "unpruned_seconds": args.unpruned_seconds}
    THROWAWAY.mkdir(parents=True, exist_ok=True)
    for one in given:
        with tempfile.TemporaryDirectory(dir=THROWAWAY) as folder:
            theirs = None
            try:
                theirs = Pyctcdecode(one, Path(folder))
                check(one, theirs)
            except Unavailable as error:
                absent = str(error)
            for beam in beams:
                print(f"{one.name}, beam {beam} ...", file=sys.stderr, flush=True)
                rows.append(measured(one, theirs, beam, **limits))
            if theirs is not None:
                theirs.close()
    shown = [{k: v for k, v in row.items() if k != "details"} for row in rows]
    harness.print_table(shown, title="CTC beam search without a language model")
    harness.save("ctc_beam", rows, settings=vars(args), notes=notes_of(rows, given, absent), quick=args.quick)


if __name__ == "__main__":
    main()
