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
    seconds: float = 0.0,
    **rules: Any,
) -> Score:
    """The WER of hypotheses by id; None is a failed utterance. seconds: of compute, for 100 s of audio."""
    lines = []
    for key, text in references.items():
        known = {name: values[key] for name, values in (("domain", domains), ("speaker", speakers)) if values is not None}
        hypothesis = hypotheses[key]
        nbest = [] if hypothesis is None else [Hypothesis((), hypothesis, {})]
        fields = {"id": key, "text": text, "duration": 100 / len(references), **known}
        lines.append(Recognized(fields, nbest, seconds / len(references), error="corrupt" if hypothesis is None else None))
    return score_recognized(lines, unit="speaker" if speakers is not None else "utterance", **rules)
