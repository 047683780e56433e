"""Hypotheses files in memory, for tests that think in references and hypotheses by id."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from duolect.evaluate.wer import Score, score_recognized
from duolect.scorer import Hypothesis, Recognized


def score(
    references: Mapping[str, str],
    hypotheses: Mapping[str, str | None],
    *,
    domains: Mapping[str, str] | None = None,
    speakers: Mapping[str, str] | None = None,
    **rules: Any,
) -> Score:
    """The WER of hypotheses by id; None is a failed utterance."""
    lines = []
    for key, text in references.items():
        known = {name: values[key] for name, values in (("domain", domains), ("speaker", speakers)) if values is not None}
        hypothesis = hypotheses[key]
        nbest = [] if hypothesis is None else [Hypothesis((), hypothesis, {})]
        lines.append(Recognized({"id": key, "text": text, **known}, nbest, error="corrupt" if hypothesis is None else None))
    return score_recognized(lines, unit="speaker" if speakers is not None else "utterance", **rules)
