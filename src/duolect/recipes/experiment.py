"""Experiments: what an acoustic model or speech LLM is, how it comes about, and running it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from duolect.audio.augment import random_for
from duolect.config import digest, registered
from duolect.data.filter import Case, Labelled, usable
from duolect.data.pieces import train_pieces
from duolect.data.sources import open_source
from duolect.models.aed import AedModel
from duolect.models.attention_decoder import DecoderDims
from duolect.models.conformer import ConformerDims, ConformerEncoder
from duolect.models.ctc import CtcModel, read_config, spotter_of
from duolect.models.embedded import resolve
from duolect.models.encoders import Encoder, WhisperEncoder
from duolect.models.extended import ExtendedEncoder, TopDims
from duolect.models.hf_encoder import HuggingFaceEncoder
from duolect.models.lm import load_language_model
from duolect.models.lora import Lora
from duolect.models.speech_llm import SpeechLlm, SpeechLlmDims
from duolect.models.spotter import SpottingEncoder
from duolect.models.warm_start import warm_start
from duolect.recognize.models import place_of
from duolect.run import open_run, write_json
from duolect.train.asr import AsrTask, Corpus, Learning
from duolect.train.checkpoint import STATE, TrainError
from duolect.train.loop import TrainConfig, train
from duolect.train.parallel import World
from duolect.vocabulary import SentencePieceVocabulary, load_vocabulary, with_blank


@registered
@dataclass(frozen=True)
class Units:
    """What the model writes. size: pieces, made of `text` (a text file or manifest; the training texts where it is empty); folder: a model
    folder whose units are taken instead."""

    size: int = 256
    text: str = ""
    case: Case = "lower"
    folder: str = ""


@registered
@dataclass(frozen=True)
class FromWhisper:
    """Whisper's encoder. frozen: layers at rest, from below (with the convolutions). top: layers above it, which may join frames. spotter:
    its decoder is heard, too, at 25 Hz, asked in windows of (back, ahead) frames of 20 ms; it learns in low-rank paths, or all of it
    where spotter_lora is None."""

    whisper: str = "whisper-base"
    frozen: int = 2
    top: TopDims | None = None
    spotter: tuple[int, int] | None = None
    spotter_lora: Lora | None = None


@registered
@dataclass(frozen=True)
class FromModel:
    """Encoder, CTC heads and units of a model of ours, by name or folder; or the encoder alone of one of transformers (folder, hub id).

    Nothing named: the model that the experiment starts with, its decoder too."""

    model: str = "duolect-ctc"


@registered
@dataclass(frozen=True)
class LlmPart:
    """The language model of a speech LLM: an embedded name, folder, .gguf file or hub id, and how it hears and learns. heads: encoder
    layers that get a CTC head in its own vocabulary."""

    model: str = "smollm2-135m"
    dims: SpeechLlmDims = field(default_factory=SpeechLlmDims)
    heads: tuple[int, ...] = ()


@registered
@dataclass(frozen=True)
class AsrExperiment:
    """An acoustic model and how it comes about. heads: layers with an auxiliary CTC head. checks: validation sets by name, the first one
    decides what is best. held_out: so many training utterances of rare speakers are kept for the check `held-out`. start: a model folder
    whose weights are taken where they fit."""

    recipe: str
    corpora: tuple[Corpus, ...]
    training: TrainConfig
    encoder: ConformerDims | FromWhisper | FromModel
    checks: Mapping[str, str] = field(default_factory=dict)
    units: Units = field(default_factory=Units)
    heads: tuple[int, ...] = ()
    decoder: DecoderDims | None = None
    llm: LlmPart | None = None
    learning: Learning = field(default_factory=Learning)
    held_out: int = 0
    start: str = ""
    max_seconds: float = 19.5
    max_share_lost: float = 0.2


def run(
    experiment: AsrExperiment,
    out: Path,
    *,
    world: World,
    mirror: str = "",
    deviations: Sequence[str] = (),
    frames: dict[Any, Any] | None = None,
) -> Mapping[str, float]:
    """The figures of the trained model, which lies in out/model; the same experiment and folder go on where they stopped.

    frames: where frames of an encoder at rest are kept, for several runs with the same one.

    Raises RunError for a folder of another experiment, DataError, ModelError and TrainError.
    """
    torch.manual_seed(experiment.training.seed)
    known = {"top", "spotter", "encoder", "decoder", "adapter", "llm"}
    if odd := experiment.training.learning_rates.keys() - known:
        raise TrainError(f"learning_rates of {', '.join(sorted(odd))}: expected {', '.join(sorted(known))}: correct the name")
    if experiment.learning.kept_versions and experiment.training.workers:
        raise TrainError("kept_versions keeps frames in this process, worker processes would each make them again: set training.workers=0")
    if world.sharded and experiment.llm is not None and (how := experiment.llm.dims.attention) != "prefix":
        raise TrainError(
            f"attention={how} uses layers of the language model outside of its forward pass, which shards cannot: leave --shard out"
        )
    whole = _start(experiment) if experiment.encoder == FromModel("") else None
    made = whole if whole is not None else _encoder(experiment.encoder)  # before the folder: a wrong name leaves none
    if world.first:
        _open(experiment, out, world, deviations)
    world.barrier()
    if isinstance(made, CtcModel | AedModel):
        ctc = made if isinstance(made, CtcModel) else made.ctc
    else:
        vocabulary = _units(experiment, out, world)
        ctc = CtcModel(made, vocabulary, aux=dict.fromkeys(experiment.heads, vocabulary))
    model = whole or (ctc if experiment.decoder is None else AedModel(ctc, experiment.decoder))
    if experiment.llm is not None:
        model = _speech_llm(experiment, experiment.llm, ctc, named=isinstance(made, CtcModel))
    if experiment.start and whole is None:
        report = warm_start(model, resolve(experiment.start))
        world.say(str(report))
    checks = {name: _check_set(name, source, ctc, experiment, out, world) for name, source in experiment.checks.items()}
    corpora, held = _corpora(experiment, ctc, out, world)
    if held:
        checks.setdefault("held-out", held)
    size, trained = (sum(p.numel() for p in model.parameters() if p.requires_grad or rest) / 1e6 for rest in (True, False))
    world.say(f"{size:.1f} M parameters, {trained:.1f} M of them learn; on {world.size} x {world.device}")
    card = f"# {experiment.recipe}\n\nTrained by duolect; the whole experiment is recipe.json of its run folder.\n"
    seed = experiment.training.seed
    kept = None if frames is None else frames.setdefault(digest(replace(experiment, llm=None)), {})
    learning = experiment.learning
    if world.sharded and learning.decoder_check:
        world.say("shards cannot decode while they learn: validation leaves the decoder's WER out")
        learning = replace(learning, decoder_check=0)
    training, case = experiment.training, experiment.units.case
    task = AsrTask(model, learning, corpora, checks, seed=seed, case=case, card=card, frames=kept, precision=training.precision)
    return train(task, training, out, world=world, mirror=mirror)


def _corpora(
    experiment: AsrExperiment, ctc: CtcModel, out: Path, world: World
) -> tuple[list[tuple[Corpus, Sequence[Labelled]]], list[Labelled]]:
    """(each corpus with what can be learned from it, the utterances held out of the first); the rest is listed in skipped-<n>.jsonl."""
    fastest = max([1.0, *(speed for corpus in experiment.corpora for speed in corpus.augment.speeds)])
    corpora: list[tuple[Corpus, Sequence[Labelled]]] = []
    held: list[Labelled] = []
    for number, corpus in enumerate(experiment.corpora):
        source = open_source(corpus.source)
        found = usable(
            source.utterances,
            ctc.vocabulary,
            seconds_per_frame=ctc.seconds_per_frame * fastest,
            max_seconds=experiment.max_seconds,
            case=experiment.units.case,
            max_share_lost=experiment.max_share_lost,
            skipped=out / f"skipped-{number}.jsonl" if world.first else None,
        )
        # Of a tiny corpus most must be left to learn from.
        items, apart = _held_out(found.items, 0 if number else min(experiment.held_out, max(1, len(found.items) // 10)))
        held += apart
        corpora.append((corpus, items))
        hours = sum(x.seconds for x in items) / 3600
        kept = f", {len(apart)} more held out" if apart else ""
        left_out = f", {len(found.skipped)} left out (skipped-{number}.jsonl)" if found.skipped else ""
        odd = f", {len(source.problems)} lines cannot be used, such as {source.problems[0]}" if source.problems else ""
        world.say(f"{corpus.source}: {len(items)} utterances, {hours:.2f} h{kept}{left_out}{odd}")
    return corpora, held


def _open(experiment: AsrExperiment, out: Path, world: World, deviations: Sequence[str]) -> None:
    """Makes the run folder, or takes it up; one of another experiment that never came to save anything is begun anew."""
    if (out / "recipe.json").is_file() and not (out / STATE).is_file():
        for old in (
            *out.glob("skipped-*.jsonl"),
            *(out / n for n in ("recipe.json", "env.json", "units.txt", "deviations.json", "metrics.jsonl")),
        ):
            old.unlink(missing_ok=True)
        shutil.rmtree(out / "units", ignore_errors=True)
    open_run(out, recipe=experiment, device=str(world.device), seed=experiment.training.seed)
    write_json(out / "deviations.json", list(deviations))


def _units(experiment: AsrExperiment, out: Path, world: World) -> SentencePieceVocabulary:
    """The model's units, made by the first process and kept in out/units."""
    units, folder = experiment.units, out / "units"
    if world.first and not (folder / "vocabulary.json").is_file():
        if units.folder:
            vocabulary = load_vocabulary(Path(resolve(units.folder)))
        else:
            text = units.text or str(_texts(experiment, out))
            vocabulary = train_pieces(text, pieces=units.size, case=units.case, seed=experiment.training.seed)
        vocabulary.save(folder)
    world.barrier()
    found = load_vocabulary(folder)
    if not isinstance(found, SentencePieceVocabulary):
        raise TrainError(f"{units.folder}: its units are no SentencePiece model: name a model folder with one, or make units of text")
    return found


def _texts(experiment: AsrExperiment, out: Path) -> Path:
    path = out / "units.txt"
    texts = [x.text or "" for corpus in experiment.corpora for x in open_source(corpus.source).utterances]
    path.write_text("".join(f"{' '.join(x.split())}\n" for x in texts), encoding="utf-8")
    return path


def _speech_llm(experiment: AsrExperiment, part: LlmPart, ctc: CtcModel, *, named: bool) -> SpeechLlm:
    """The speech LLM of an experiment; its folder leaves out what rests and can be had by name (named: so can the CTC model)."""
    if experiment.decoder is not None:
        raise TrainError("an experiment has a decoder or an llm, not both: --set decoder=null")
    llm, vocabulary = load_language_model(place_of(part.model, "language"))
    if spotter := spotter_of(ctc.encoder):
        spotter.merge()
    if not part.dims.pretrained:
        llm = type(llm)(llm.config)
    if part.heads:
        ctc = ctc.with_heads(dict.fromkeys(part.heads, with_blank(vocabulary)))
    sources = {"llm": part.model} if part.dims.pretrained and part.dims.learns != "all" else {}
    if named and isinstance(experiment.encoder, FromModel) and not (part.heads or _holds_encoder(experiment.start)):
        sources["ctc"] = experiment.encoder.model
    # A folder is found again from any other one.
    sources = {part: str(Path(name).resolve()) if Path(name).exists() else name for part, name in sources.items()}
    return SpeechLlm(ctc, llm, vocabulary, part.dims, sources=sources)


def _holds_encoder(start: str) -> bool:
    """Whether a warm start may change the encoder; a speech LLM's folder need not hold one."""
    if not start:
        return False
    try:
        with safe_open(Path(resolve(start)) / "model.safetensors", "pt") as file:
            names = list(file.keys())
            return any(name.startswith("encoder.") for name in names)
    except (OSError, SafetensorError):
        return True  # which the warm start will say


def _start(experiment: AsrExperiment) -> CtcModel | AedModel:
    """The model that an experiment goes on with as it is."""
    if not experiment.start:
        raise TrainError(f"{experiment.recipe} goes on with a trained model: name it, --set start=<run>/model")
    place = Path(resolve(experiment.start))
    return AedModel.load(place) if read_config(place).get("type") == "aed" else CtcModel.load(place)


def _encoder(config: ConformerDims | FromWhisper | FromModel) -> Encoder | CtcModel:
    if isinstance(config, ConformerDims):
        return ConformerEncoder(config)
    if isinstance(config, FromModel):
        place = resolve(config.model)
        kind = read_config(Path(place)) if (Path(place) / "config.json").is_file() else {}
        if kind.get("type") is not None:
            return CtcModel.load(place)
        return WhisperEncoder.from_whisper(place) if kind.get("model_type") == "whisper" else HuggingFaceEncoder.load(place)
    if config.spotter is None:
        encoder = whisper = WhisperEncoder.from_whisper(resolve(config.whisper))
    else:
        source = str(Path(config.whisper).resolve()) if Path(config.whisper).exists() else config.whisper  # found from any folder
        encoder = SpottingEncoder.from_whisper(source, back=config.spotter[0], ahead=config.spotter[1], lora=config.spotter_lora)
        whisper = encoder.base
    frozen: list[nn.Module] = [whisper.conv1, whisper.conv2, *whisper.layers[: config.frozen]]
    for module in [whisper] if config.frozen >= whisper.depth else frozen:
        module.requires_grad_(False)
    return encoder if config.top is None else ExtendedEncoder(encoder, config.top)


def _held_out(items: Sequence[Labelled], count: int) -> tuple[list[Labelled], list[Labelled]]:
    """(for training, about `count` of rare speakers for validation), no speaker in both."""
    by_speaker: dict[str, list[Labelled]] = {}
    for item in items:
        by_speaker.setdefault(str(item.utterance.fields.get("speaker")), []).append(item)
    held: list[Labelled] = []
    for speaker in sorted(by_speaker, key=lambda s: random_for(0, 0, s, "held out").random()):
        own = by_speaker[speaker]
        if len(held) < count and len(own) <= 4 and 2 * (len(held) + len(own)) <= len(items):  # most is left to learn from
            held += own
    ids = {x.utterance.id for x in held}
    return [x for x in items if x.utterance.id not in ids], held


def _check_set(name: str, source: str, ctc: CtcModel, experiment: AsrExperiment, out: Path, world: World) -> Sequence[Labelled]:
    """What of a validation set can be scored; nothing is left out for its length but what the encoder cannot hear at once."""
    longest, listed = min(ctc.encoder.max_seconds, 40.0), f"skipped-{name.replace(os.sep, '-')}.jsonl"
    limits: dict[str, Any] = {"max_seconds": longest, "max_share_lost": max(0.5, experiment.max_share_lost), "case": experiment.units.case}
    if world.first:
        limits["skipped"] = out / listed
    found = usable(open_source(source).utterances, ctc.vocabulary, seconds_per_frame=ctc.seconds_per_frame, **limits)
    if found.skipped:
        count = f"{len(found.skipped)} of {len(found.items) + len(found.skipped)}"
        world.say(f"{name}: {count} utterances do not count ({listed}): WER is of the rest")
    return found.items
