"""Tables of systems: aligned text, Markdown, JSON. Plain characters only, fit for a log file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from duolect.evaluate.bootstrap import Interval
from duolect.evaluate.wer import Comparison, Score, compare, score_json

FEW = 20
"""Utterances below which figures are marked."""


@dataclass(frozen=True)
class Row:
    """One system. against_first: the difference to the first row, None there."""

    system: str
    score: Score
    against_first: Comparison | None = None


def rows(scores: Mapping[str, Score]) -> tuple[Row, ...]:
    """One row per system, each compared with the first. ScoreError if the systems were not scored on the same utterances."""
    first = next(iter(scores), "")
    return tuple(
        Row(name, one, None if name == first else compare(scores[first], one, names=(first, name))) for name, one in scores.items()
    )


def plain_table(table: Sequence[Row]) -> str:
    """The rows in aligned columns, their signature below."""
    head, body = _cells(table)
    return "\n".join([aligned([head, *body]), *_footnotes(table, "")]) + "\n"


def aligned(rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Rows of cells in columns, the first row as a head; the first `left` columns begin at the left, the others end at the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]

    def line(row: Sequence[str]) -> str:
        cells = [cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        return "  ".join(cells).rstrip()

    return "\n".join([line(rows[0]), "  ".join("-" * w for w in widths), *map(line, rows[1:])])


def markdown_table(table: Sequence[Row]) -> str:
    """The rows as a Markdown table, their signature below."""
    head, body = _cells(table)
    rule = [":--"] + ["--:"] * (len(head) - 1)
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in (head, rule, *body)]
    return "\n".join([*lines, "", *(f"- {note}" for note in _footnotes(table, "`"))]) + "\n"


def json_table(table: Sequence[Row]) -> dict[str, Any]:
    """The rows as JSON values, full precision."""
    return {
        "rows": [{"system": row.system, **score_json(row.score), "against_first": _comparison_json(row.against_first)} for row in table]
    }


def _comparison_json(comparison: Comparison | None) -> dict[str, Any] | None:
    if comparison is None:
        return None
    interval = comparison.interval
    return {
        "difference": comparison.difference if math.isfinite(comparison.difference) else None,
        "interval": [interval.low, interval.high] if interval else None,
        "p_value": comparison.p_value,
        "better": comparison.better,
    }


def _cells(table: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """(titles, one line of cells per row); a column that no row fills is left out."""
    domains = sorted({name for row in table for name in row.score.domains})
    columns: list[tuple[str, Callable[[Row], str]]] = [
        ("system", lambda row: row.system),
        ("WER %", lambda row: f"{row.score.errors.rate:.2f}"),
        ("95%", lambda row: _interval(row.score.interval)),
        ("S", lambda row: str(row.score.errors.substitutions)),
        ("D", lambda row: str(row.score.errors.deletions)),
        ("I", lambda row: str(row.score.errors.insertions)),
        ("runaway %", lambda row: f"{100 * row.score.runaways / len(row.score.utterances):.1f}" if row.score.runaways else ""),
        ("words", lambda row: str(row.score.errors.words)),
        *((name, partial(_domain_cell, name)) for name in domains),
        ("failed", lambda row: str(len(row.score.failed)) if row.score.failed else ""),
        ("RTF", lambda row: "" if row.score.rtf is None else f"{row.score.rtf:.3g}"),
        ("vs first", lambda row: "" if row.against_first is None else f"{row.against_first.difference:+.2f}"),
        ("95% of it", lambda row: "" if row.against_first is None else _interval(row.against_first.interval, sign="+")),
        ("p", lambda row: "" if row.against_first is None else _p_value(row.against_first.p_value)),
    ]  # fmt: skip
    always = ("system", "WER %", "S", "D", "I", "words")
    filled = [(title, [cell(row) for row in table]) for title, cell in columns]
    kept = [(title, cells) for title, cells in filled if title in always or any(cells)]
    return [title for title, _ in kept], [[cells[i] for _, cells in kept] for i in range(len(table))]


def _domain_cell(name: str, row: Row) -> str:
    return f"{row.score.domains[name].errors.rate:.2f}" if name in row.score.domains else ""


def _interval(interval: Interval | None, *, sign: str = "") -> str:
    return "" if interval is None else f"[{interval.low:{sign}.2f}, {interval.high:{sign}.2f}]"


def _p_value(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _footnotes(table: Sequence[Row], quote: str) -> list[str]:
    """What the numbers hang on: the signature (once if all rows share it), seconds, comparison, utterances without a hypothesis."""
    signatures = {row.score.signature for row in table}
    notes = []
    if len(signatures) == 1:
        notes.append(f"{quote}{signatures.pop()}{quote}")
    else:
        notes += [f"{row.system}: {quote}{row.score.signature}{quote}" for row in table]
    if any(row.score.rtf is not None for row in table):
        notes.append("RTF: seconds of compute per second of audio.")
    if any(row.against_first is not None for row in table):
        notes.append(f"vs first: WER points against {table[0].system!r}, paired bootstrap on the same utterances; p two-sided.")
    if any(row.score.runaways for row in table):
        notes.append("runaway: utterances with insertions for half of the reference's words or more, five at least.")
    if any(len(row.score.utterances) < FEW for row in table):
        notes.append(f"fewer than {FEW} utterances: neither rates nor intervals say much.")
    for row in table:
        if row.score.failed:
            ids = ", ".join(row.score.failed[:5]) + (", ..." if len(row.score.failed) > 5 else "")
            notes.append(f"{row.system}: {len(row.score.failed)} utterances failed and count as deleted: {ids}")
    return notes
