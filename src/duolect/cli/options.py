"""What commands that recognize have in common: which models, on what; sources, scores and failures for people."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import UseAppendAction

from duolect.cli.checks import at_least, corpus_name, is_file

if TYPE_CHECKING:
    from duolect.data.sources import Source
    from duolect.evaluate.table import Row
    from duolect.recognize.presets import Ingredients
    from duolect.recognize.recognizer import Recognizer
    from duolect.scorer import Recognized


DEFAULT_LM = ("duolect-lm",)
LM_FILES = (".arpa", ".arpa.gz", ".bin", ".klm", ".gguf")
"""What language models end in that are files."""


@dataclass(frozen=True)
class ModelOptions:
    """Which models, on what."""

    am: str = "duolect-ctc"
    """CTC acoustic model: an embedded name, a model folder, a hub id."""
    lm: UseAppendAction[tuple[str, ...]] = ()
    """Language model: an embedded name, folder, .gguf file, hub id, KenLM's .arpa or .bin file; default: duolect-lm. Again for several."""
    unit_lm: str = "duolect-unit-lm"
    """Language model in the acoustic model's own labels, for label-wise fusion."""
    aed: str = "whisper-base"
    """Attention encoder-decoder (Whisper)."""
    speech_llm: str = "duolect-sllm"
    """Speech LLM: an embedded name, or the folder of a model that `duolect train speech_llm` made."""
    model: str = ""
    """A folder that is acoustic model and decoder in one (AED, speech LLM), in place of --am and --aed or --speech-llm."""
    scales: Path | None = None
    """A folder of scales files as `duolect tune` writes them (llm.json, unit.json, ...), for `duolect explain` also one of them; default:
    the acoustic model's own."""
    beam: int = 8
    """Hypotheses kept by one-pass fusion."""
    nbest: int = 20
    """Hypotheses kept where nothing is fused before the end (CTC beam, rescoring)."""
    interval: int = 20
    """Frames between two scorings of delayed fusion."""
    prior: Literal["softmax", "counts", "sampled", "llm", "uniform"] = "softmax"
    """Which label prior decodings with one subtract (see `duolect prior`); llm: of the first --lm's own labels."""
    prompt: str = ""
    """Text the language model reads before every transcript: a topic, names, a sentence in the right style."""
    context: UseAppendAction[tuple[str, ...]] = ()
    """A phrase to expect (a name, a term), or a file of one a line, each line with a weight behind a tab if you like; a speech LLM
    whose prompt has a place for them reads them, too."""
    context_scale: float = 1.0
    """Bonus of a phrase in nats for each of its letters (times its weight)."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, ..."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of language and attention models; scores in bfloat16 differ by tenths of a nat."""
    batch_seconds: float = 120.0
    """Padded audio recognized at once; halved by itself when memory runs out."""


def recognizer_for(
    options: ModelOptions,
    decodings: Mapping[str, str],
    *,
    overrides: Mapping[str, str] | None = None,
    word_times: bool = False,
    warn: Sequence[Mapping[str, Any]] = (),
) -> Recognizer:
    """A recognizer of named decodings; its scales are said. warn: lines of the corpus, in case the scales were tuned on them."""
    at_least(1, beam=options.beam, nbest=options.nbest, interval=options.interval)
    if not options.batch_seconds > 0:
        raise ValueError(f"--batch-seconds {options.batch_seconds:g}: expected more than 0")
    for lm in options.lm:
        is_file("--lm", lm, means_one=lm.endswith(LM_FILES))
    context = _phrases(options.context)
    from duolect.recognize.decoding import Attention
    from duolect.recognize.models import Models
    from duolect.recognize.presets import decoding_of
    from duolect.recognize.recognizer import Recognizer

    options = of_one_folder(replace(options, lm=options.lm or DEFAULT_LM))
    models = Models(device=device_of(options.device), precision=options.precision)
    decodings = {name: _chosen(which, options, models) for name, which in decodings.items()}
    ingredients = replace(_ingredients(options, models, decodings.values(), warn), context=context)
    made = {name: decoding_of(which, ingredients, overrides) for name, which in decodings.items()}
    if options.model not in ("", options.aed) and any("aed" in decoding.terms for decoding in made.values()):
        models.say(f"aed: {options.aed}, as {options.model} is none (--aed names another)")
    for name, decoding in made.items() if context else ():
        if "context" in decoding.terms or any(
            isinstance(t, Attention) and models.attention(t.model).takes_context for t in decoding.terms.values()
        ):
            continue
        models.say(f"warning: --context does nothing in {decodings[name]}, where no search hears CTC: use ctc, delayed, aed+ctc-label, ...")
    return Recognizer(models, options.am, made, batch_seconds=options.batch_seconds, word_times=word_times)


def of_one_folder(options: ModelOptions) -> ModelOptions:
    """The options with --model spelled out by what its folder says it is."""
    from duolect.models.ctc import read_config
    from duolect.models.embedded import resolve

    if not options.model:
        return options
    kind = read_config(Path(resolve(options.model))).get("type")
    if kind not in ("ctc", "aed", "speech_llm"):
        raise ValueError(f"--model {options.model}: its config.json says {kind}, expected ctc, aed or speech_llm: use --am, --lm, --aed")
    return replace(options, am=options.model, **({} if kind == "ctc" else {kind: options.model}))


def _chosen(decoding: str, options: ModelOptions, models: Any) -> str:
    """The name of a decoding, `auto` replaced: the unit LM, too, where it speaks the acoustic model's units and there is one --lm."""
    from duolect.recognize.models import place_of
    from duolect.vocabulary import VocabularyError, load_vocabulary

    if decoding != "auto":
        return decoding
    if options.model:
        return "sllm+ctc-label" if options.speech_llm == options.model else "aed+ctc-label" if options.aed == options.model else "delayed"
    if options.speech_llm != ModelOptions.speech_llm:
        return "sllm+ctc-label"
    if len(options.lm) > 1:
        return "--fusion auto"
    try:
        same = load_vocabulary(place_of(options.unit_lm, "language")).digest() == models.acoustic(options.am).vocabulary.digest()
    except VocabularyError:
        same = False
    return "labelwise-delayed" if same else "--fusion auto"


def _ingredients(options: ModelOptions, models: Any, decodings: Any, warn: Sequence[Mapping[str, Any]]) -> Ingredients:
    from duolect.evaluate.tune import read_scales, same_corpus_warning
    from duolect.recognize.presets import DEFAULT_SCALES, FUSIONS, PRESETS, Ingredients, default_scales, parts_of

    folder = options.scales or models.scales_folder(options.am)
    if options.scales is not None and not options.scales.is_dir():
        raise ValueError(f"--scales {options.scales}: is no folder: name the one of the files that `duolect tune` wrote (llm.json, ...)")
    scales = dict(DEFAULT_SCALES)
    references = {str(f["id"]): str(f.get("text", "")) for f in warn}
    for wanted in sorted({p.scales for name in decodings if (p := {**PRESETS, **FUSIONS}.get(name)) and p.scales}):
        default, file = default_scales(wanted, options.lm), wanted.replace("llm", "+".join(parts_of(options.lm))) + ".json"
        path = folder / file if folder else None
        if path is not None and path.is_file():
            tuned = read_scales(path)
            if missing := set(default) - set(tuned.scales):
                raise ValueError(f"{path}: has scales for {', '.join(tuned.scales)}, {wanted} needs {', '.join(missing)}: name them so")
            scales[wanted] = {**default, **tuned.scales}
            note = f"tuned on {tuned.corpus or path}"
            if warning := same_corpus_warning(tuned, references=references):
                models.say(f"warning: {path.name}: {warning}")
        else:
            scales[wanted], note = default, f"not tuned for this pair of models: `duolect tune` writes {file}"
        models.say(f"scales {wanted}: " + ", ".join(f"{k} {v:g}" for k, v in scales[wanted].items()) + f" ({note})")
    names = ("lm", "unit_lm", "aed", "speech_llm", "prompt", "beam", "nbest", "interval", "prior", "context_scale")
    return Ingredients(scales=scales, **{name: getattr(options, name) for name in names})


def _phrases(named: Sequence[str]) -> dict[str, float]:
    """Phrases and their weights, of files or as they are."""
    found: dict[str, float] = {}
    for name in named:
        there = is_file("--context", name, means_one=os.sep in name or name.endswith((".txt", ".tsv", ".csv")))
        try:
            lines = Path(name).read_text(encoding="utf-8").splitlines() if there else [name]
        except UnicodeDecodeError:
            raise ValueError(f"--context {name}: is not UTF-8: expected a text with a phrase a line") from None
        for number, line in enumerate(lines, start=1):
            phrase, _, weight = line.partition("\t")
            try:
                found |= {phrase: float(weight or 1.0)} if phrase.strip() else {}
                if not math.isfinite(float(weight or 1.0)):
                    raise ValueError
            except ValueError:
                raise ValueError(f"{name}:{number}: {weight!r} is no weight: expected phrase, tab, number") from None
    if named and not found:
        raise ValueError(f"--context {named[0]}: has no phrase: write one a line")
    return found


def source_of(path: Path, failures: list[str]) -> Source | None:
    """The corpus of a path; None where it cannot be opened. What is wrong with it or its lines is added to failures."""
    from duolect.data.sources import SourceError, open_source

    try:
        source = open_source(path)
    except SourceError as error:
        failures.append(str(error))
        return None
    failures += [str(p) for p in source.problems]
    return source


def recognized_in(path: Path) -> list[Recognized]:
    """The lines of a hypotheses file. Raises ValueError for one that is empty, has an id twice or no hypothesis; says where one is torn."""
    from collections import Counter

    from duolect.run import progress_bar
    from duolect.scorer import read_hypotheses

    def torn(where: str) -> None:
        print(f"warning: {where}: the last line is torn, and left out: was its writing killed?", file=sys.stderr)

    lines = list(progress_bar(read_hypotheses(path, torn=torn), desc="lines read", unit="", leave=False))
    if not lines:
        raise ValueError(f"{path}: has no line: expected the output of `duolect decode`, or JSON lines with text and pred_text")
    if not any(r.nbest or r.error for r in lines):
        raise ValueError(f"{path}: no line has pred_text or nbest: a manifest, not the output of `duolect decode`?")
    if twice := [id for id, count in Counter(r.id for r in lines).items() if count > 1]:
        raise ValueError(f"{path}: {len(twice)} ids stand in several lines, such as {twice[0]}: give each utterance one of its own")
    return lines


def device_of(name: str) -> str:
    """The device of that name; `auto`: a GPU if there is one. ValueError for a GPU that is not there."""
    import torch

    if name != "auto":
        try:
            torch.device(name)
        except RuntimeError:
            raise ValueError(f"--device {name}: expected auto, cpu, cuda, cuda:1 or another device of torch") from None
        if name.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"device {name} was asked for, but torch sees no CUDA device here: use --device cpu, and see `duolect doctor`")
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def say_score(lines: Sequence[Any], data: Path) -> None:
    """Prints the WER of lines to standard error, where all have references."""
    from duolect.evaluate.normalize import normalizer
    from duolect.evaluate.wer import score_recognized

    if lines and all(isinstance(r.fields.get("text"), str) for r in lines):
        print(score_recognized(lines, normalizer=normalizer("whisper-english"), corpus=corpus_name(data)), file=sys.stderr)


def write_tables(table: Sequence[Row], out: Path, *, device: str, notes: Sequence[str] = (), **more: Any) -> None:
    """Prints a table and writes it into a folder: table.md, with notes below, and table.json with what it was made in."""
    from duolect.evaluate.table import json_table, markdown_table, plain_table
    from duolect.run import environment, write_json

    print(plain_table(table))
    (out / "table.md").write_text(markdown_table(table) + "".join(f"- {note}\n" for note in notes), encoding="utf-8")
    write_json(out / "table.json", {"table": json_table(table), **more, "env": environment(device=device, seed=0)})


def report(failures: Sequence[str], lines: Sequence[Recognized] = ()) -> int:
    """Exit code 1 if there are failures, which are listed; so are the warnings that lines of results carry."""
    for warning in dict.fromkeys(str(r.fields["warning"]) for r in lines if "warning" in r.fields):
        print(f"warning: {warning}", file=sys.stderr)
    if failures:
        print(f"\n{len(failures)} failed:", *failures, sep="\n  ", file=sys.stderr)
    return 1 if failures else 0
