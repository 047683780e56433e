"""Scale tuning on n-best lists with three free scales: reading, counting errors, and both searches against a plain loop in Python.

Lists are made up: texts by a Markov chain of English words with edits, parts that hang together with the errors as real ones do.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import harness
import numpy as np
from harness import Timing, measures, seconds_of, times, timing

from duolect.evaluate.nbest import NBestLists, nbest_lists
from duolect.evaluate.normalize import normalizer
from duolect.evaluate.surface import Range
from duolect.evaluate.tune import tune
from duolect.scorer import Recognized, read_hypotheses

TEXT = """
the of and to a in that it is was i he for you with his on be as had not but at by she they this have from which one her all or an
were we there been their said if would when so no what up out them who my time more now some could its into then man do two like
has about hundred people don't it's colour little after before very house river morning letter children evening answer nothing
window
"""
WORDS = TEXT.split()
FREE = {"llm": Range(), "prior": Range(-2.0, 0.0, of="llm"), "unit": Range()}


def write_lists(path: Path, *, utterances: int, hypotheses: int, seed: int = 0) -> None:
    """A hypotheses file of 5 to 30 words an utterance, with up to 6 edits in each hypothesis."""
    rng = np.random.default_rng(seed)
    with open(path, "w", encoding="utf-8") as out:
        for i in range(utterances):
            reference = rng.choice(WORDS, rng.integers(5, 31)).tolist()
            nbest = []
            for _ in range(hypotheses):
                words, edits = list(reference), min(int(rng.poisson(2.0)), 6)
                for at, kind, word in zip(
                    rng.integers(0, len(words), edits), rng.integers(0, 3, edits), rng.choice(WORDS, edits), strict=True
                ):
                    at = min(int(at), len(words) - 1)
                    words[at : at + (kind != 1)] = [str(word)] if kind < 2 or len(words) < 2 else []
                llm, prior, unit = (
                    -5.0 * len(words) - 2.5 * edits + rng.normal(0, 6),
                    rng.normal(-90, 5),
                    -4.0 * len(words) - edits + rng.normal(0, 5),
                )
                ctc = -10 - 0.4 * llm + 0.2 * prior - 0.3 * unit - 1.5 * edits + rng.normal(0, 1.5)
                parts = {"ctc": ctc, "llm": llm, "prior": prior, "unit": unit}
                nbest.append({"text": " ".join(words), "labels": [], "parts": {k: round(float(v), 5) for k, v in parts.items()}})
            nbest.sort(key=lambda h: -h["parts"]["ctc"])
            out.write(json.dumps({"id": f"u{i}", "text": " ".join(reference), "nbest": nbest}) + "\n")


def looped(errors: list[list[int]], parts: dict[str, list[list[float]]], scales: dict[str, float]) -> int:
    """Errors at one point, as a loop writes it."""
    total = 0
    for i in range(len(errors)):
        best, chosen = -np.inf, 0
        for j in range(len(errors[i])):
            score = sum(scale * parts[name][i][j] for name, scale in scales.items())
            if score > best:
                best, chosen = score, j
        total += errors[i][chosen]
    return total


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--utterances", type=int, default=5_000)
    parser.add_argument("--hypotheses", type=int, default=64)
    parser.add_argument("--subset", type=int, default=100, help="utterances of the loop in Python")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    harness.use_threads(options.threads)
    if options.quick:
        options.utterances, options.hypotheses, options.subset = 300, 16, 20
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "lists.jsonl")
        write_lists(path, utterances=options.utterances, hypotheses=options.hypotheses)
        spent, lines = seconds_of(lambda: list(read_hypotheses(path)))
        rows.append({"what": "read", "s": spent.wall, "cpu s": spent.cpu})
    spent, lists = seconds_of(lambda: listed(lines))
    rows.append({"what": "normalize, count errors", "s": spent.wall, "cpu s": spent.cpu})
    few = lists.of(np.arange(options.subset))
    for search in ("line", "grid"):
        whole, found = seconds_of(lambda search=search: tune(lists, reference="ctc", free=FREE, search=search))
        print(search, dict(found.scales), f"WER {found.wer:.3f}, cross-validated {found.cross_validated:.3f}, alone {found.alone:.3f}")
        rows.append(
            {
                "what": f"tune, {search} (5 folds, 1000 draws)",
                "s": whole.wall,
                "cpu s": whole.cpu,
                "wer": found.wer,
                "cv": found.cross_validated,
            }
        )
    points = np.random.default_rng(0).uniform([0.0, -2.0, 0.0], [2.0, 0.0, 2.0], (20, 3))
    surface_time, loop_time, same = against_the_loop(few, points)
    if not same:
        raise SystemExit("the loop and the surface give different errors: nothing is compared")
    each = {"surface, a point": surface_time, "python loop, a point": loop_time}
    for what, one in each.items():
        rows.append({"what": f"{what}, {options.subset} utterances", "s": one.median, "cpu s": one.cpu})
    harness.print_table(rows, title=f"{options.utterances} utterances x {options.hypotheses} hypotheses, 3 free scales")
    ratios = times(loop_time, surface_time), times(loop_time, surface_time, by="cpu")
    notes = [f"errors at {len(points)} points are equal; the loop takes {ratios[0]:g} x as long (x cpu {ratios[1]:g})"]
    harness.save(
        "tune",
        [*rows, *({"what": what, **measures(one)} for what, one in each.items())],
        settings=vars(options),
        notes=notes,
        quick=options.quick,
    )


def listed(lines: Sequence[Recognized]) -> NBestLists:
    return nbest_lists(lines, normalizer=normalizer("whisper-english"), parts=("ctc", *FREE))


def against_the_loop(lists: NBestLists, points: np.ndarray) -> tuple[Timing, Timing, bool]:
    """(the surface's and the loop's seconds a point, whether all errors are equal)."""
    from duolect.evaluate.surface import surface_of

    surface = surface_of(lists, reference="ctc", free=FREE)
    errors, parts = lists.errors.tolist(), {name: values.tolist() for name, values in lists.parts.items()}
    ours, theirs, same = [], [], True
    for point in points:
        spent, wrong = seconds_of(lambda point=point: int(surface.utterance_errors(point).sum()))
        scales = {"ctc": 1.0, "llm": point[0], "prior": point[0] * point[1], "unit": point[2]}
        slow, expected = seconds_of(lambda scales=scales: looped(errors, parts, scales))
        ours.append(spent)
        theirs.append(slow)
        same &= wrong == expected
    return timing(ours), timing(theirs), same


if __name__ == "__main__":
    main()
