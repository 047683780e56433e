"""CTC beam search without a language model: duolect's `ctc_beam_search` against pyctcdecode, on the same log-probs.

pyctcdecode runs in a process of its own (it needs numpy 1) and times its own calls. It has two ways: its defaults, which skip labels below
log p -5 in a frame and beams 10 below the best, and with both prunings off. duolect too: floors of 5 and 10 below the best, and none.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import harness
import numpy as np
import torch
from harness import THROWAWAY, Spent, Timing, Unavailable, milliseconds, seconds_of, timing
from synthetic import ctc_log_probs, labels_per_frame, pieces
from torch import Tensor

from duolect.scorer import Hypothesis
from duolect.search.ctc import ctc_beam_search
from duolect.vocabulary import Vocabulary, load_vocabulary

PYCTCDECODE = ("pyctcdecode==0.5.0", "numpy==1.26.4")
DEFAULTS = {"token_min_logp": -5.0, "beam_prune_logp": -10.0}
OFF = {"token_min_logp": -34.5, "beam_prune_logp": -1e30}  # it clips log p at -34.54; labels of probability 0 stay out
SECONDS_PER_EXTENSION = 5e-6
"""About what pyctcdecode takes for one label of one beam in one frame, to see what it can do in time without pruning."""


Way = Literal["alone", "batch", "floors alone", "floors batch"]
WAYS: tuple[Way, ...] = ("alone", "batch", "floors alone", "floors batch")
FLOORS = {"label_floor": 5.0, "beam_floor": 10.0}
"""As pyctcdecode's defaults, but both relative to the best."""

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
    spent: list[Spent]

    @property
    def mean(self) -> Spent:
        return Spent(*(sum(seconds) / len(self.spent) for seconds in zip(*self.spent, strict=True)))


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
        return Found(
            [" ".join(a["text"].split()) for a in answer], [a["score"] for a in answer], [Spent(a["seconds"], a["cpu"]) for a in answer]
        )

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
    """duolect's best texts; the seconds of a batch are shared out evenly."""
    groups = [[u] for u in utterances] if way.endswith("alone") else [list(utterances)]
    floors = FLOORS if way.startswith("floors") else {}
    texts, scores, seconds = [], [], []

    def search(x: Tensor, n: Tensor) -> list[list[Hypothesis]]:
        return ctc_beam_search(x, n, vocabulary=given.vocabulary, beam=beam, **floors)

    for group in groups:
        n = given.lengths[group]
        x = given.log_probs[group, : int(n.max())]
        taken, found = seconds_of(lambda x=x, n=n: search(x, n))
        for nbest in found:
            text, score = best_text(nbest)
            texts.append(text)
            scores.append(score)
        seconds += [Spent(taken.wall / len(group), taken.cpu / len(group))] * len(group)
    return Found(texts, scores, seconds)


def best_text(nbest: Sequence[Hypothesis]) -> tuple[str, float]:
    """The text with the greatest sum over its label sequences, as pyctcdecode adds up cuts of a word into pieces and spaces at the end."""
    table: dict[str, list[float]] = {}
    for h in nbest:
        table.setdefault(" ".join(h.text.split()), []).append(h.parts["ctc"])
    summed = {text: float(torch.tensor(scores, dtype=torch.double).logsumexp(0)) for text, scores in table.items()}
    return max(summed.items(), key=lambda item: item[1])


def log_p_of(text: str, x: np.ndarray, labels: Sequence[str]) -> float:
    """log p(text) by x [T, V]: of all label sequences that spell it, spaces at the ends and doubled ones aside, and all alignments.

    A state is how much of the text stands, and the label that wrote last, or blank behind it. labels: as `labels_of` spells them.
    """
    text = f" {text}".rstrip()
    spelled = [(y, piece.replace("▁", " ")) for y, piece in enumerate(labels) if piece and np.isfinite(x[:, y]).any()]
    edges = [(p, y, q) for y, piece in spelled for p in range(len(text) + 1) if (q := _behind(text, p, piece)) is not None]
    states: dict[tuple[int, int], int] = {}
    for _, y, q in edges:
        states.setdefault((q, y), len(states))
    at, label = np.array(list(states), dtype=int).reshape(-1, 2).T
    begin, end = np.array([(p, states[q, y]) for p, y, q in edges], dtype=int).reshape(-1, 2).T
    # A label that repeats needs a blank in between: what it wrote itself does not go on by it.
    own = np.array([states.get((p, y), len(states)) for p, y, _ in edges], dtype=int)
    blank, wrote, log_p = np.eye(1, len(text) + 1)[0], np.zeros(len(states)), 0.0
    for frame in np.exp(x.astype(float)):
        total = blank + np.bincount(at, wrote, len(blank))
        grown = (total[begin] - np.append(wrote, 0.0)[own]).clip(min=0.0)
        blank, wrote = total * frame[labels.index("")], (wrote + np.bincount(end, grown, len(wrote))) * frame[label]
        scale = blank.sum() + wrote.sum()
        blank, wrote, log_p = blank / scale, wrote / scale, log_p + float(np.log(scale))
    return log_p + float(np.log(blank[-1] + wrote[at == len(text)].sum()))


def _behind(text: str, p: int, piece: str) -> int | None:
    """How much of the text stands once a piece is written behind its first p characters; None where it is another text."""
    for c in piece:
        if p < len(text) and text[p] == c:
            p += 1
        elif p == 0 and text[1:2] == c:  # no space before the first word
            p = 2
        elif c != " " or (0 < p < len(text) and text[p - 1] != " "):
            return None
    return p


def inputs(path: Path | None, vocabulary: Path | None, *, quick: bool) -> list[Input]:
    """Made-up log-probs of three vocabularies, behind real ones where there is a file."""
    given = []
    if path is not None:
        arrays = np.load(path)
        log_probs, lengths = torch.from_numpy(arrays["log_probs"]).float(), torch.from_numpy(arrays["lengths"]).long()
        if vocabulary is None:
            sys.exit("error: --log-probs needs --vocabulary FOLDER: the model folder whose vocabulary.json says what the labels mean")
        known = load_vocabulary(vocabulary)
        if known.size != log_probs.shape[2]:
            sys.exit(f"error: {path} has {log_probs.shape[2]} labels, the vocabulary of {vocabulary} {known.size}: not the same model's")
        # Once pyctcdecode has tried a label that ends in a space (a lone one, or <unk>, which it writes so) in one beam, what it tries next
        # begins a word, whichever beam that is in: its texts are then cut where its scores know of no cut. Taken out on both sides.
        silent = [i for i in range(known.size) if i != known.blank and (known.piece(i).endswith("▁") or known.piece(i).endswith(">"))]
        log_probs[..., silent] = -torch.inf
        given.append(Input("real", known, log_probs.log_softmax(-1), lengths))
    count, frames = (3, 60) if quick else (16, 300)
    lengths = torch.full((count,), frames)
    for v in [pieces(size - 1) for size in ((64,) if quick else (32, 257, 1025))]:
        given.append(Input("made up", v, ctc_log_probs(v, utterances=count, frames=frames, seed=7), lengths))
    return given


def agreement(given: Input, a: Found, b: Found) -> dict[str, Any]:
    """Whose best text is likelier, by the exact log p of both: of how many utterances a's, neither's, b's; where they differ by how much
    (gaps); and what the score that each search gave lacks to it on average.

    SystemExit where a score is above the exact log p of its text, which no part of the text's alignments can have.
    """
    labels, exact = labels_of(given.vocabulary), []
    for u, texts in enumerate(zip(a.texts, b.texts, strict=False)):  # b may be of the first utterances only
        x = given.log_probs[u, : int(given.lengths[u])].numpy()
        exact.append([log_p_of(text, x, labels) for text in texts])
        for text, score, most in zip(texts, (a.scores[u], b.scores[u]), exact[u], strict=True):
            if score > most + 1e-3:
                sys.exit(
                    f"error: {given.name}, utterance {u}: {text!r} scores {score:.4f}, all its alignments {most:.4f}; nothing was timed"
                )
    gaps = sorted(x - y for (x, y), t, s in zip(exact, a.texts, b.texts, strict=False) if t != s)
    counts = [sum(g > 0 for g in gaps), len(exact) - len(gaps), sum(g <= 0 for g in gaps)]
    lacks = [sum(x[i] - y for x, y in zip(exact, found, strict=False)) / len(exact) for i, found in enumerate((a.scores, b.scores))]
    return {"likelier": counts, "gaps": [round(g, 4) for g in gaps], "lacks": lacks}


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


def checked(given: Input, beam: int) -> dict[Way, Found]:
    """duolect's results; SystemExit where a batch gives other texts or scores than each utterance alone."""
    everything = range(len(given.lengths))
    found = {way: ours(given, everything, beam=beam, way=way) for way in WAYS}
    pairs: tuple[tuple[Way, Way], ...] = (("alone", "batch"), ("floors alone", "floors batch"))
    for one, many in pairs:
        alone, batch = found[one], found[many]
        worst = max(abs(a - b) for a, b in zip(alone.scores, batch.scores, strict=True))
        if alone.texts != batch.texts or not worst <= 1e-3:
            sys.exit(f"error: duolect's {many} differs from each utterance alone (beam {beam}, score by {worst:.2g}); nothing was timed")
    return found


def unpruned_count(given: Input, beam: int, seconds: float) -> int:
    """How many utterances pyctcdecode can decode without pruning in about that time; at least one."""
    each = float(given.lengths.float().mean()) * given.log_probs.shape[2] * beam * SECONDS_PER_EXTENSION
    return max(1, min(len(given.lengths), int(seconds / each)))


def measured(
    given: Input, theirs: Pyctcdecode | None, beam: int, *, repetitions: int, seconds: float, unpruned_seconds: float
) -> dict[str, Any]:
    """One line of the table."""
    everything = range(len(given.lengths))
    found = checked(given, beam)
    same = {"floors": agreement(given, found["alone"], found["floors alone"])}
    taken: dict[str, list[Spent]] = {}

    def noted(name: str, result: Found) -> Spent:
        taken.setdefault(name, []).append(result.mean)
        return result.mean

    calls: dict[str, Callable[[], Spent]] = {way: lambda way=way: noted(way, ours(given, everything, beam=beam, way=way)) for way in WAYS}
    if theirs is not None:
        same["theirs"] = agreement(given, found["floors alone"], theirs(everything, beam=beam, pruning=DEFAULTS))
        calls["theirs"] = lambda: noted("theirs", theirs(everything, beam=beam, pruning=DEFAULTS))
    harness.interleaved(calls, repetitions=repetitions, seconds=seconds)
    if theirs is not None and unpruned_seconds:
        # Without pruning it may take minutes, so it is run once, on as many utterances as the time allows, and ours once more beside it.
        some = range(unpruned_count(given, beam, unpruned_seconds))
        result = theirs(some, beam=beam, pruning=OFF)
        noted("theirs unpruned", result)
        noted("alone beside", ours(given, some, beam=beam, way="alone"))
        same["theirs unpruned"] = {**agreement(given, found["alone"], result), "utterances": len(result.texts)}
    frames, labels = int(given.lengths.float().mean()), given.log_probs.shape[2]
    row = {"input": given.name, "V": labels, "T": frames, "B": len(given.lengths), "beam": beam}
    return _row(row, {name: timing(values) for name, values in taken.items()}, same)


def _row(row: dict[str, Any], timings: dict[str, Timing], same: dict[str, dict[str, Any]]) -> dict[str, Any]:
    row |= {f"{name} ms": milliseconds(t.median) for name, t in timings.items() if name != "alone beside"}
    pairs = {way.replace("floors ", ""): ("theirs", way) for way in WAYS if way.startswith("floors")} if "theirs" in timings else {}
    if "theirs unpruned" in timings:
        pairs["unpruned"] = ("theirs unpruned", "alone beside")
    for name, (slow, fast) in pairs.items():
        row[f"x {name}"] = harness.times(timings[slow], timings[fast])
        row[f"x cpu {name}"] = harness.times(timings[slow], timings[fast], by="cpu")
    row |= {f"likelier: {name}": "/".join(map(str, found["likelier"])) for name, found in same.items()}
    row["details"] = {"timings": {name: harness.measures(t) for name, t in timings.items()}, "agreement": same}
    return row


def notes_of(rows: Sequence[dict[str, Any]], given: Sequence[Input], absent: str | None) -> list[str]:
    """What to read the table with."""
    notes = [
        f"{x.name}, V={x.vocabulary.size}: {labels_per_frame(x.log_probs, x.lengths):.3g} labels a frame above log p -5" for x in given
    ]
    notes.append(
        "milliseconds per utterance on the clock; alone: one utterance at a time, batch: all at once, floors: of 5 (labels) and 10 (beam)"
        " below the best; likelier: floors: of how many utterances `alone` has a likelier text than `floors alone`, the same, a less"
        " likely one, by exact log p over all label sequences and alignments"
    )
    if absent is not None:
        return [*notes, f"pyctcdecode is left out: {absent}"]
    notes.append(
        "theirs: pyctcdecode, one at a time, with its defaults (token_min_logp -5, beam_prune_logp -10); theirs unpruned: off,"
        " the first utterances only; x: theirs / ours with floors, x cpu: by least processor time; x unpruned: theirs unpruned / alone,"
        " both pruning by the beam alone; likelier: theirs: `floors alone` likelier/same/less likely, theirs unpruned: `alone`"
    )
    for name in ("theirs", "theirs unpruned"):
        if not (found := [row["details"]["agreement"][name] for row in rows if name in row["details"]["agreement"]]):
            continue
        gaps, lacks = [g for f in found for g in f["gaps"]], [sum(f["lacks"][i] for f in found) / len(found) for i in (0, 1)]
        notes.append(
            f"{name}: where the texts differ duolect's is likelier by {min(gaps, default=0.0):.2g} to {max(gaps, default=0.0):.2g}; the "
            f"searches' scores lack {lacks[0]:.2g} (duolect) and {lacks[1]:.2g} to the exact log p of their texts on average"
        )
    notes.append(
        "a beam slot is a prefix of labels in duolect, a (text, last frame label) pair in pyctcdecode: two of theirs may be one of ours "
        "(ends in blank, in a label), two of ours one of theirs (cuts of a word)"
    )
    return notes


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short utterances and one beam: does it run, are the results equal")
    parser.add_argument("--log-probs", type=harness.existing, help="what bench/dump_log_probs.py wrote, in front of the made-up ones")
    parser.add_argument("--vocabulary", type=harness.existing, help="the model folder that they are of")
    parser.add_argument("--beams", type=int, nargs="+", default=[8, 32, 100])
    parser.add_argument("--threads", type=int, default=1, help="threads of torch; pyctcdecode has one")
    parser.add_argument("--repetitions", type=int, default=5, help="rounds")
    parser.add_argument("--seconds", type=float, default=30.0, help="no new round of a line after so long (one is always made)")
    parser.add_argument(
        "--unpruned-seconds",
        type=float,
        default=10.0,
        help="about so long for pyctcdecode without pruning, at the least beam (one utterance at least); 0: not at all",
    )
    args = parser.parse_args()
    harness.use_threads(args.threads)
    given = inputs(args.log_probs, args.vocabulary, quick=args.quick)
    beams, repetitions = (args.beams[:1], 2) if args.quick else (args.beams, args.repetitions)
    rows, absent = [], None
    limits = {"repetitions": repetitions, "seconds": args.seconds}
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
                rows.append(measured(one, theirs, beam, unpruned_seconds=args.unpruned_seconds if beam == beams[0] else 0.0, **limits))
            if theirs is not None:
                theirs.close()
    shown = [{k: v for k, v in row.items() if k != "details"} for row in rows]
    harness.print_table(shown, title="CTC beam search without a language model")
    harness.save("ctc_beam", rows, settings=vars(args), notes=notes_of(rows, given, absent), quick=args.quick)


if __name__ == "__main__":
    main()
