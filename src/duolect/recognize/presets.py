"""The decodings that have a name: what `duolect compare` puts side by side and `--decoding` takes."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from duolect.config import ConfigError, from_json, with_overrides
from duolect.recognize.decoding import (
    Attention,
    Context,
    Ctc,
    Decoding,
    Greedy,
    LabelSynchronous,
    Language,
    Prior,
    Speculative,
    Term,
    TimeSynchronous,
)
from duolect.search.fusion import AtEnd, AtWordEnd, Every, EveryLabel, Schedule, ShortestHypothesis

DEFAULT_SCALES: Mapping[str, Mapping[str, float]] = {
    "llm": {"llm": 0.4},
    "llm+prior": {"llm": 0.5, "prior": -0.2},
    "unit": {"unit": 0.4},
    "unit+prior": {"unit": 0.5, "prior": -0.2},
    "unit+llm": {"unit": 0.3, "llm": 0.3},
    "aed": {"aed": 3.0},
    "sllm": {"sllm": 1.0},
}
"""Where nothing was tuned: between the paper's optimum (0.43, -0.27) and what untuned LLMs got there."""


@dataclass(frozen=True)
class Ingredients:
    """What the named decodings are made of. scales: by combination (`llm`, `llm+prior`, `unit`, ...), the acoustic part's being 1.

    lm: one or several, which become the parts llm, llm2, ... context: phrases with weights, for decodings that search.
    """

    lm: tuple[str, ...] = ("duolect-lm",)
    unit_lm: str = "duolect-unit-lm"
    aed: str = "whisper-base"
    speech_llm: str = "duolect-sllm"
    prompt: str = ""
    prior: str = "softmax"
    beam: int = 8
    nbest: int = 20
    label_beam: int = 4
    interval: int = 20
    scales: Mapping[str, Mapping[str, float]] = field(default_factory=lambda: DEFAULT_SCALES)
    context: Mapping[str, float] = field(default_factory=dict)
    context_scale: float = 1.0


def parts_of(lms: Sequence[str]) -> list[str]:
    """What the parts of several language models are called."""
    return [f"llm{i}" if i > 1 else "llm" for i in range(1, len(lms) + 1)]


def default_scales(combination: str, lms: Sequence[str]) -> dict[str, float]:
    """DEFAULT_SCALES of a combination; several language models share one and a half times the scale of one."""
    scales = dict(DEFAULT_SCALES[combination])
    return {**scales, **dict.fromkeys(parts_of(lms), round(1.5 * scales["llm"] / len(lms), 3))} if "llm" in scales and lms[1:] else scales


def _llms(x: Ingredients, scales: Mapping[str, float], when: Schedule, otherwise: Schedule | None = None) -> dict[str, Term]:
    parts = zip(parts_of(x.lm), x.lm, strict=True)
    return {part: Language(lm, scales.get(part, scales["llm"]), when, x.prompt, otherwise=otherwise) for part, lm in parts}


def _llm(x: Ingredients, when: Schedule, beam: int, *, prior: bool = False, otherwise: Schedule | None = None) -> Decoding:
    scales = x.scales["llm+prior" if prior else "llm"]
    terms = _llms(x, scales, when, otherwise)
    if prior and x.prior == "llm":
        terms["prior"] = Prior("llm", scales["prior"], when, of=x.lm[0], prompted=bool(x.prompt.strip()))
    elif prior:
        terms["prior"] = Prior(x.prior, scales["prior"], when, words=True)
    return TimeSynchronous(beam, terms)


def _unit(x: Ingredients, when: Schedule, beam: int, *, prior: bool = False) -> Decoding:
    scales = x.scales["unit+prior" if prior else "unit"]
    terms: dict[str, Term] = {"unit": Language(x.unit_lm, scales["unit"], when)}
    if prior:
        terms["prior"] = Prior(x.prior, scales["prior"], when, of=x.unit_lm if x.prior == "llm" else "")
    return TimeSynchronous(beam, terms)


def _both(x: Ingredients) -> Decoding:
    scales = x.scales["unit+llm"]
    unit = Language(x.unit_lm, scales["unit"], EveryLabel())
    return TimeSynchronous(x.beam, {"unit": unit, **_llms(x, scales, EveryLabel(), Every(x.interval))})


def _hears(x: Ingredients, part: str, *, scaled: bool = True, when: Schedule | None = None) -> dict[str, Term]:
    """The model that hears the audio itself: part `aed` or `sllm`."""
    scale = x.scales[part][part] if scaled else 1.0
    return {part: Attention({"aed": x.aed, "sllm": x.speech_llm}[part], scale, when or EveryLabel())}


def _alone(x: Ingredients, part: str, beam: int | None = None, *, exponent: float = 0.0) -> Decoding:
    return LabelSynchronous(_hears(x, part, scaled=False), beam or x.label_beam, length_exponent=exponent)


def _joint(x: Ingredients, part: str, beams: int = 1) -> Decoding:
    return LabelSynchronous({**_hears(x, part), "ctc": Ctc()}, beams * x.label_beam, ends="apart")


def _timed(x: Ingredients, part: str, when: Schedule, beam: int) -> Decoding:
    return TimeSynchronous(beam, _hears(x, part, when=when))


@dataclass(frozen=True)
class Preset:
    """A named decoding: its row in a table, and the combination whose scales it uses (None: it has none)."""

    title: str
    make: Callable[[Ingredients], Decoding]
    scales: str | None = None


PRESETS: Mapping[str, Preset] = {
    "ctc-greedy": Preset("CTC greedy", lambda x: Greedy()),
    "ctc": Preset("CTC beam", lambda x: TimeSynchronous(x.nbest)),
    "rescore": Preset("CTC + LLM, n-best rescoring", lambda x: _llm(x, AtEnd(), x.nbest), "llm"),
    "rescore-prior": Preset("CTC + LLM - prior, n-best rescoring", lambda x: _llm(x, AtEnd(), x.nbest, prior=True), "llm+prior"),
    "delayed": Preset("CTC + LLM, delayed every n frames", lambda x: _llm(x, Every(x.interval), x.beam), "llm"),
    "delayed-prior": Preset(
        "CTC + LLM - prior, delayed every n frames", lambda x: _llm(x, Every(x.interval), x.beam, prior=True), "llm+prior"
    ),
    "word-end": Preset("CTC + LLM, delayed to word ends", lambda x: _llm(x, AtWordEnd(), x.beam), "llm"),
    "shortest": Preset("CTC + LLM, delayed by shortest hypothesis", lambda x: _llm(x, ShortestHypothesis(4), x.beam), "llm"),
    "unit-rescore": Preset("CTC + unit LM, n-best rescoring", lambda x: _unit(x, AtEnd(), x.nbest), "unit"),
    "labelwise": Preset("CTC + unit LM, label-wise", lambda x: _unit(x, EveryLabel(), x.beam), "unit"),
    "labelwise-prior": Preset("CTC + unit LM - prior, label-wise", lambda x: _unit(x, EveryLabel(), x.beam, prior=True), "unit+prior"),
    "labelwise-delayed": Preset("CTC + unit LM label-wise + LLM delayed", _both, "unit+llm"),
    "aed-greedy": Preset("AED greedy", lambda x: _alone(x, "aed", 1)),
    "aed": Preset("AED beam", lambda x: _alone(x, "aed", exponent=1.0)),
    "aed+ctc-rescore": Preset("CTC + AED, n-best rescoring", lambda x: _timed(x, "aed", AtEnd(), x.nbest), "aed"),
    "aed+ctc-time": Preset("AED + CTC, time-synchronous", lambda x: _timed(x, "aed", Every(x.interval), x.beam), "aed"),
    "aed+ctc-label": Preset("AED + CTC, label-synchronous", lambda x: _joint(x, "aed"), "aed"),
    "sllm-greedy": Preset("Speech LLM greedy", lambda x: _alone(x, "sllm", 1)),
    "sllm-draft": Preset("Speech LLM greedy, CTC as draft", lambda x: Speculative(_hears(x, "sllm", scaled=False))),
    "sllm": Preset("Speech LLM beam", lambda x: _alone(x, "sllm")),
    "sllm-length": Preset("Speech LLM beam, length norm", lambda x: _alone(x, "sllm", exponent=1.0)),
    "sllm+ctc-rescore": Preset("CTC + speech LLM, n-best rescoring", lambda x: _timed(x, "sllm", AtEnd(), x.nbest), "sllm"),
    "sllm+ctc-time": Preset("Speech LLM + CTC, time-synchronous", lambda x: _timed(x, "sllm", Every(x.interval), x.beam), "sllm"),
    "sllm+ctc-label": Preset("Speech LLM + CTC, label-synchronous", lambda x: _joint(x, "sllm", 2), "sllm"),
}

FUSIONS: Mapping[str, Preset] = {
    "--fusion auto": Preset("CTC + LMs by their labels", lambda x: _llm(x, EveryLabel(), x.beam, otherwise=Every(x.interval)), "llm"),
    "--fusion labelwise": Preset("CTC + LMs label-wise", lambda x: _llm(x, EveryLabel(), x.beam), "llm"),
    **{f"--fusion {name}": PRESETS[name] for name in ("delayed", "rescore", "word-end", "shortest")},
}
"""Decodings of an acoustic model and whatever --lm names."""


def decoding_of(name_or_file: str, ingredients: Ingredients, overrides: Mapping[str, Any] | None = None) -> Decoding:
    """The decoding of a preset's name or of a JSON file (a type-tagged config), with the ingredients' context where it is of use, and
    overrides by dotted field. Raises ConfigError."""
    if preset := PRESETS.get(name_or_file) or FUSIONS.get(name_or_file):
        decoding = preset.make(ingredients)
    elif name_or_file.endswith(".json") or Path(name_or_file).is_file():
        try:
            decoding = from_json(json.loads(Path(name_or_file).read_text()), where=name_or_file)
        except OSError as error:
            raise ConfigError(f"{name_or_file}: cannot be read ({error.strerror}): name a file or one of {', '.join(PRESETS)}") from error
        except json.JSONDecodeError as error:
            raise ConfigError(f"{name_or_file}:{error.lineno}: is no JSON ({error.msg})") from error
    else:
        near = "".join(f", is {x} meant?" for x in difflib.get_close_matches(name_or_file, PRESETS, 1))
        raise ConfigError(f"there is no decoding {name_or_file!r}{near}: name a JSON file or one of {', '.join(PRESETS)}")
    if not isinstance(decoding, Decoding):
        kinds = ", ".join(kind.__name__ for kind in (Greedy, TimeSynchronous, LabelSynchronous, Speculative))
        raise ConfigError(f"{name_or_file}: {type(decoding).__name__} is no decoding: expected one of {kinds}")
    if ingredients.context and isinstance(decoding, TimeSynchronous | LabelSynchronous | Speculative):
        words = tuple(phrase for phrase, weight in ingredients.context.items() if weight > 0)
        terms: dict[str, Term] = {
            name: replace(term, context=words) if isinstance(term, Attention) else term for name, term in decoding.terms.items()
        }
        # Without CTC nothing would keep a decoder from saying a phrase that is rewarded again and again.
        if ingredients.context_scale and decoding.hears_ctc and not isinstance(decoding, Speculative):
            terms["context"] = Context(ingredients.context, ingredients.context_scale)
        decoding = replace(decoding, terms=terms)
    decoding = with_overrides(decoding, overrides) if overrides else decoding
    for name, scale in decoding.scales().items():
        if not math.isfinite(scale):
            raise ConfigError(f"{name_or_file}: the scale of {name} is {scale}, expected a number")
    return decoding
