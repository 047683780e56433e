"""score, tune: numbers from hypotheses files. Needs no torch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from duolect.cli.checks import PICTURES, at_least, writable
from duolect.cli.options import recognized_in

if TYPE_CHECKING:
    from duolect.evaluate.tune import Tuned
    from duolect.scorer import Recognized


def score(
    hypotheses: Positional[tuple[Path, ...]],
    /,
    normalizer: Literal["none", "basic", "whisper-english"] = "whisper-english",
    unit: Literal["utterance", "speaker"] = "utterance",
    compounds: Literal["apart", "merged"] = "apart",
    errors: int = 0,
    json: Path | None = None,
) -> int:
    """Word error rates of hypotheses files, with intervals, by domain; several files are compared with the first.

    Example: duolect score llm.jsonl ctc.jsonl --errors 5

    Args:
        hypotheses: Files from `duolect decode` or any JSON lines with text and pred_text.
        normalizer: What is done to both texts before words are compared.
        unit: What the bootstrap draws.
        compounds: merged: `white paper` and `whitepaper` are the same, as on the Open ASR Leaderboard.
        errors: Print the alignments of so many utterances with the most errors.
        json: Also write everything to this file.
    """
    from duolect.evaluate.normalize import normalizer as normalizer_of
    from duolect.evaluate.table import json_table, plain_table, rows
    from duolect.evaluate.wer import alignment_lines, score_recognized
    from duolect.run import write_json

    if not hypotheses:
        raise ValueError("name at least one hypotheses file")
    at_least(0, errors=errors)
    writable("--json", json, inputs=hypotheses, kinds=[".json"])
    merge_compounds = compounds == "merged"
    scores = {}
    for path in hypotheses:
        lines = recognized_in(path)
        name = path.stem if len({p.stem for p in hypotheses}) == len(hypotheses) else str(path)
        rules = {"normalizer": normalizer_of(normalizer), "unit": unit, "merge_compounds": merge_compounds}
        scores[name] = score_recognized(lines, corpus=path.stem, **rules)
    table = rows(scores)
    print(plain_table(table))
    for name, result in scores.items():
        worst = sorted((u for u in result.utterances if u.errors.total), key=lambda u: -u.errors.total)[:errors]
        for utterance in worst:
            print(f"\n{name} · {utterance.id} · {utterance.errors.total} errors")
            print("\n".join(alignment_lines(utterance.reference, utterance.hypothesis, merge_compounds=merge_compounds)))
    if json is not None:
        write_json(json, json_table(table))
    return 0


def tune(
    hypotheses: Path,
    out: Path | None = None,
    parts: tuple[str, ...] = (),
    reference: str = "ctc",
    negative: tuple[str, ...] = ("prior",),
    largest: float = 2.0,
    normalizer: Literal["none", "basic", "whisper-english"] = "whisper-english",
    search: Literal["line", "grid"] = "line",
    by: str = "",
    folds: int = 5,
    draws: int = 1000,
    seed: int = 0,
    plot: Path | None = None,
) -> int:
    """The scales that give the fewest word errors on n-best lists, with their intervals and a held-out estimate.

    Example: duolect tune --hypotheses llm.jsonl --out scales/llm.json --by domain --plot llm.png

    Args:
        hypotheses: A file whose hypotheses have all the parts (decode, then rescore).
        out: The scales file to write, e.g. scales/llm.json.
        parts: Which parts to tune; default: all but the reference.
        reference: The part whose scale stays 1.
        negative: Parts that are subtracted (priors).
        largest: No scale exceeds it.
        normalizer: What is done to both texts before words are compared.
        search: line: exact, one scale after the other; grid: RWTH's, over the shrinking box of the best points.
        by: Also the best scales of each part of the corpus, by a field of the lines (domain, speaker, ...).
        folds: Parts of the cross-validation.
        draws: Bootstrap samples for the intervals of the scales.
        seed: Of folds and draws.
        plot: WER over the scales as a PNG.
    """
    from duolect.evaluate.nbest import nbest_lists
    from duolect.evaluate.normalize import normalizer as normalizer_of
    from duolect.evaluate.plots import figure_class, wer_surface
    from duolect.evaluate.surface import Range
    from duolect.evaluate.tune import tune as tuned_scales
    from duolect.evaluate.tune import write_scales
    from duolect.run import progress_bar

    at_least(2, folds=folds)
    at_least(1, draws=draws)
    at_least(0, seed=seed)
    if not 0 < largest < inf:
        raise ValueError(f"--largest {largest:g}: expected a number above 0")
    writable("--out", out, inputs=[hypotheses], kinds=[".json"])
    writable("--plot", plot, inputs=[hypotheses], kinds=PICTURES)
    if plot is not None:
        figure_class()
    lines = recognized_in(hypotheses)
    names = _parts(lines, parts, reference, hypotheses)
    groups = _groups(lines, by, hypotheses) if by else None
    counted = progress_bar(lines, desc="errors counted", unit="", leave=False)
    lists = nbest_lists(counted, normalizer=normalizer_of(normalizer), parts=(reference, *names), corpus=hypotheses.stem)
    # A prior corrects a language model, so its scale is tuned as a share of that one's (paper.md 2.8).
    base = next((name for name in names if name not in negative), None)
    free = {name: Range(-largest, 0.0, of=base) if name in negative else Range(0.0, largest) for name in names}
    options = {"search": search, "groups": groups, "folds": folds, "draws": draws, "seed": seed, "progress": True}
    tuned = tuned_scales(lists, reference=reference, free=free, **options)
    _say_tuned(tuned, reference, by)
    if out is not None:
        write_scales(out, tuned=tuned, by=by)
    if plot is not None:
        wer_surface(tuned, path=plot)
    return 0


def _parts(lines: Sequence[Recognized], parts: tuple[str, ...], reference: str, hypotheses: Path) -> tuple[str, ...]:
    """The parts whose scales are tuned. Raises ValueError where the hypotheses lack them."""
    if not (there := {name for line in lines for h in line.nbest for name in h.parts}):
        raise ValueError(f"{hypotheses}: no hypothesis has parts, as `duolect decode` and `rescore` write them: is it another system's?")
    if reference in parts:
        raise ValueError(f"--parts {reference}: its scale is fixed to 1: leave it out, or fix another part's by --reference")
    names = parts or tuple(sorted(there - {reference}))
    if not names:
        raise ValueError(f"{hypotheses}: the hypotheses have no part but {reference}: add one with `duolect rescore`")
    if unknown := [name for name in (reference, *names) if name not in there]:
        raise ValueError(f"{hypotheses}: the hypotheses have no part {', '.join(unknown)}, only {', '.join(sorted(there))}: rescore them")
    return names


def _groups(lines: Sequence[Recognized], by: str, path: Path) -> list[str]:
    """What each line has in a field, `other` where it has none. Raises ValueError where no line has it."""
    if not any(line.fields.get(by) is not None for line in lines):
        fields = sorted({name for line in lines for name in line.fields})
        raise ValueError(f"--by {by}: no line of {path} has that field; they have {', '.join(fields)}")
    return [str(line.fields[by]) if line.fields.get(by) is not None else "other" for line in lines]


def _say_tuned(tuned: Tuned, reference: str, by: str) -> None:
    from duolect.evaluate.table import FEW, aligned

    bounds = tuned.as_good
    rows = [("part", "scale", "95% interval", "not significantly worse")]
    for name, scale in tuned.scales.items():
        between = f"{bounds[name].low:.3f} .. {bounds[name].high:.3f}" if name in bounds else ""
        rows.append((name, f"{scale:.4f}", str(tuned.scale_intervals.get(name) or ""), between))
    print(aligned(rows))
    if len(bounds) > 1:
        share = 100.0 * float(tuned.probes.as_good.mean())
        print(f"({share:.0f}% of the range searched is not significantly worse; not every combination of these values is: see --plot)")
    print(f"\nWER {tuned.wer:.2f} {tuned.interval or ''} tuned; {tuned.alone:.2f} with {reference} alone; {tuned.oracle:.2f} best in list")
    if tuned.cross_validated is not None:
        print(f"WER {tuned.cross_validated:.2f} {tuned.cross_validated_interval or ''} cross-validated: what to expect on other data")
    if tuned.groups:
        own = [name for name in tuned.scales if name != reference]
        table = [[by, "utts", "words", *own, "WER, common scales", "own, fitted", "held out: common", "own", "gain [95%]"]]
        for name, g in tuned.groups.items():
            held = ["-"] * 3
            if g.gain is not None:
                held = [f"{g.held_out_common:.2f}", f"{g.held_out:.2f}", f"{g.gain:+.2f} {g.gain_interval or ''}"]
            scales = (f"{g.scales[part]:.3f}" for part in own)
            few = "*" * (g.utterances < FEW)
            table.append([name + few, str(g.utterances), str(g.words), *scales, f"{g.common:.2f}", f"{g.wer:.2f}", *held])
        print(f"\n{aligned(table)}")
        if any(g.utterances < FEW for g in tuned.groups.values()):
            print(f"*: fewer than {FEW} utterances, of which neither scales nor intervals say much")
        print("own, fitted: to these utterances, flattered; held out: each fold by scales tuned without it; gain < 0: own is better")
    print(tuned.signature)
    if tuned.failed:
        some = f"{len(tuned.failed)} of {tuned.utterances} utterances"
        print(f"warning: {some} have no hypothesis: their words count as deleted", file=sys.stderr)
    if tuned.impossible:
        print(f"warning: {tuned.impossible} hypotheses have a part of -inf and are never chosen", file=sys.stderr)
    for name in tuned.at_edge:
        print(f"warning: the scale of {name} lies at the edge of its range; widen it with --largest", file=sys.stderr)
