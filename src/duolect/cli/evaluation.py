"""score, tune: numbers from hypotheses files. Needs no torch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from duolect.cli.checks import at_least, writable


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
    from duolect.scorer import read_hypotheses

    if not hypotheses:
        raise ValueError("name at least one hypotheses file")
    at_least(0, errors=errors)
    writable("--json", json)
    scores, seconds, audio = {}, {}, 0.0
    for path in hypotheses:
        lines = list(read_hypotheses(path))
        if lines and not any(r.nbest or r.error for r in lines):
            raise ValueError(f"{path}: no line has pred_text or nbest: a manifest, not the output of `duolect decode`?")
        name = path.stem if len({p.stem for p in hypotheses}) == len(hypotheses) else str(path)
        scores[name] = score_recognized(
            lines, normalizer=normalizer_of(normalizer), unit=unit, merge_compounds=compounds == "merged", corpus=path.stem
        )
        seconds[name] = sum(r.seconds for r in lines)
        audio = max(audio, sum(float(r.fields.get("duration") or 0.0) for r in lines))
    table = rows(scores, seconds=seconds, audio_seconds=audio)
    print(plain_table(table))
    for name, result in scores.items():
        worst = sorted((u for u in result.utterances if u.errors.total), key=lambda u: -u.errors.total)[:errors]
        for utterance in worst:
            print(f"\n{name} · {utterance.id} · {utterance.errors.total} errors")
            print("\n".join(alignment_lines(utterance.reference, utterance.hypothesis)))
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
    plot: Path | None = None,
) -> int:
    """The scales that give the fewest word errors on n-best lists, with their intervals and a held-out estimate.

    Example: duolect tune --hypotheses llm.jsonl --out scales/llm.json --plot llm.png

    Args:
        hypotheses: A file whose hypotheses have all the parts (decode, then rescore).
        out: The scales file to write, e.g. scales/llm.json.
        parts: Which parts to tune; default: all but the reference.
        reference: The part whose scale stays 1.
        negative: Parts that are subtracted (priors).
        largest: No scale exceeds it.
        normalizer: What is done to both texts before words are compared.
        plot: WER over the scales as a PNG.
    """
    from duolect.evaluate.nbest import nbest_lists
    from duolect.evaluate.normalize import normalizer as normalizer_of
    from duolect.evaluate.surface import Range
    from duolect.evaluate.tune import tune as tuned_scales
    from duolect.evaluate.tune import write_scales
    from duolect.scorer import read_hypotheses

    writable("--out", out)
    writable("--plot", plot)
    lines = list(read_hypotheses(hypotheses))
    if not lines:
        raise ValueError(f"{hypotheses} is empty: there is nothing to tune on")
    names = parts or tuple(sorted({name for line in lines for h in line.nbest for name in h.parts} - {reference}))
    if not names:
        raise ValueError(f"{hypotheses}: the hypotheses have no part but {reference}: add one with `duolect rescore`")
    lists = nbest_lists(lines, normalizer=normalizer_of(normalizer), parts=(reference, *names), corpus=hypotheses.stem)
    # A prior corrects a language model, so its scale is tuned as a share of that one's (paper.md 2.8).
    base = next((name for name in names if name not in negative), None)
    free = {name: Range(-largest, 0.0, of=base) if name in negative else Range(0.0, largest) for name in names}
    tuned = tuned_scales(lists, reference=reference, free=free)
    for name, scale in tuned.scales.items():
        print(f"{name:12} {scale:8.4f}  {tuned.scale_intervals.get(name) or ''}")
    print(f"\nWER {tuned.wer:.2f} {tuned.interval or ''} tuned; {tuned.alone:.2f} with {reference} alone; {tuned.oracle:.2f} best in list")
    if tuned.cross_validated is not None:
        print(f"WER {tuned.cross_validated:.2f} {tuned.cross_validated_interval or ''} cross-validated: what to expect on other data")
    print(tuned.signature)
    for name in tuned.at_edge:
        print(f"warning: the scale of {name} lies at the edge of its range; widen it with --largest", file=sys.stderr)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_scales(out, tuned=tuned)
    if plot is not None:
        from duolect.evaluate.plots import wer_surface

        wer_surface(tuned.probes, best=tuned.scales, path=plot)
    return 0
