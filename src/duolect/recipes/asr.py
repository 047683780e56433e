"""Acoustic models: what an experiment is, the recipes that make one, and running it. `duolect train <recipe>` is this file.

A recipe is a function of its data that returns a frozen AsrExperiment; deviations are `--set field=value` and are recorded.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import duolect
from duolect.audio.augment import Augmentation, SpecAugment, random_for
from duolect.config import digest, registered
from duolect.data.filter import Case, Labelled, usable
from duolect.data.pieces import train_pieces
from duolect.data.sources import open_source
from duolect.models.adapters import AdapterDims
from duolect.models.aed import AedModel
from duolect.models.attention_decoder import DecoderDims
from duolect.models.conformer import PRESETS, ConformerDims, ConformerEncoder
from duolect.models.ctc import CtcModel, read_config
from duolect.models.embedded import resolve
from duolect.models.encoders import Encoder, WhisperEncoder
from duolect.models.extended import ExtendedEncoder, TopDims
from duolect.models.hf_encoder import HuggingFaceEncoder
from duolect.models.lm import load_language_model
from duolect.models.lora import Lora
from duolect.models.speech_llm import SpeechLlm, SpeechLlmDims, Trainable
from duolect.models.warm_start import warm_start
from duolect.run import RunFolder, write_json
from duolect.train.asr import AsrTask, Corpus, Learning
from duolect.train.checkpoint import STATE, TrainError
from duolect.train.loop import TrainConfig, train
from duolect.train.optim import Piecewise, WarmUp
from duolect.train.parallel import World
from duolect.vocabulary import SentencePieceVocabulary, load_vocabulary, with_blank

DEMO = Path(duolect.__file__).parent / "embedded" / "demo" / "manifest.jsonl"


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
    """Whisper's encoder, its layers above merge_after at 25 Hz; frozen: layers at rest, from below (with the convolutions)."""

    whisper: str = "whisper-base"
    merge_after: int = 2
    frozen: int = 2
    top: TopDims | None = None


@registered
@dataclass(frozen=True)
class FromModel:
    """Encoder, CTC heads and units of a model of ours, by name or folder; or the encoder alone of one of transformers (folder, hub id)."""

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
    decides what is best. held_out: so many training utterances of rare speakers are kept for the check `held-out`. start: a model folder or
    checkpoint whose weights are taken where they fit."""

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


Recipe = Callable[[Sequence[str], Sequence[str], str], AsrExperiment]


def tiny(sources: Sequence[str], checks: Sequence[str], text: str) -> AsrExperiment:
    """Two minutes on a CPU: a small Conformer CTC that learns the demo recordings by heart, to see that everything works."""
    dims = ConformerDims.of(layers=3, dim=96, kernel=15, channels=(16, 32, 32), subsampling=4, dropout=0.0, attention_dropout=0.0)
    clean = Augmentation(speeds=(1.0,), noise_chance=0.0, spec=None)
    return AsrExperiment(
        "tiny",
        tuple(Corpus(x, augment=clean) for x in sources or [str(DEMO)]),
        TrainConfig({"top": 4e-3, "encoder": 4e-3}, steps=400, schedule=WarmUp(50), log_every=20, validate_every=100, save_every=100),
        dims,
        _named(checks or sources or [str(DEMO)]),
        Units(48, text),
        learning=Learning(batch_seconds=30.0),
        max_seconds=35.0,
    )


def mini(sources: Sequence[str], checks: Sequence[str], text: str) -> AsrExperiment:
    """A useful model of some 30 hours of speech in two hours on two CPU cores, or minutes on a GPU: Conformer 12 x 192, CTC + AED.

    Real speech first, then synthesized: the first source is heard whole in every epoch, a seventh of each other.
    """
    dims = ConformerDims.of(layers=12, dim=192, kernel=15, channels=(32, 32, 32), subsampling=6)
    spec = SpecAugment(ramp=(500, 1500, 3000))
    return AsrExperiment(
        "mini",
        tuple(Corpus(x, 1 if i == 0 else 7, Augmentation(noise_chance=0.2 if i == 0 else 0.4, spec=spec)) for i, x in enumerate(sources)),
        TrainConfig(
            {"top": 1.5e-3, "encoder": 1.5e-3, "decoder": 1.5e-3},
            epochs=60,
            schedule=Piecewise(),
            average=0.999,
            precision="bf16" if torch.cuda.is_available() else "fp32",
            validate_every=500,
            save_every=250,
            keep_best=4,
        ),
        dims,
        _named(checks),
        Units(256, text),
        heads=(6,),
        decoder=DecoderDims.of(layers=3, dim=192),
        learning=Learning(batch_seconds=120.0),
        held_out=40,
    )


def librispeech_aed(sources: Sequence[str], checks: Sequence[str], text: str) -> AsrExperiment:
    """The paper's LibriSpeech baseline (paper.md 1.3-1.9): Conformer 12 x 512, CTC at layers 4, 8, 12, decoder 6 x 512, 100 epochs."""
    speeds = (0.7, 0.8, 0.9, 1.0, 1.1)
    return AsrExperiment(
        "librispeech_aed",
        tuple(Corpus(x, augment=Augmentation(speeds=speeds, noise_chance=0.0)) for x in sources),
        _paper(100.0),
        PRESETS["small"],
        _named(checks),
        Units(10_240, text),
        heads=(4, 8),
        decoder=DecoderDims.of(layers=6, dim=512),
        learning=Learning(batch_seconds=1000.0),
    )


def librispeech_aed_base(sources: Sequence[str], checks: Sequence[str], text: str) -> AsrExperiment:
    """The same with the Conformer of 16 x 1024, CTC at layers 4, 10, 16."""
    return _base(librispeech_aed(sources, checks, text), "librispeech_aed_base")


def loquacious_aed(sources: Sequence[str], checks: Sequence[str], text: str) -> AsrExperiment:
    """The paper's AED on Loquacious, 4 epochs (`--set training.epochs=20` for the long one): Conformer 16 x 1024, no change of speed."""
    speech = tuple(Corpus(x, augment=Augmentation(speeds=(1.0,), noise_chance=0.0)) for x in sources)
    experiment = _base(librispeech_aed(sources, checks, text), "loquacious_aed")
    return replace(experiment, corpora=speech, training=_paper(4.0))


def continued(sources: Sequence[str], checks: Sequence[str], text: str) -> AsrExperiment:
    """Two more epochs for a trained AED (`--set start=...`) at 1e-5 (paper: 5e-6, 1e-5, 2e-5): the fair rival of a speech LLM."""
    experiment = loquacious_aed(sources, checks, text)
    schedule = Piecewise(((0.0, 0.01), (0.05, 1.0), (0.9, 0.01), (1.0, 0.01)))
    rates = dict.fromkeys(experiment.training.learning_rates, 1e-5)
    return replace(
        experiment, recipe="continued", training=replace(experiment.training, learning_rates=rates, epochs=2.0, schedule=schedule)
    )


def whisper_top(sources: Sequence[str], checks: Sequence[str], text: str) -> AsrExperiment:
    """The embedded CTC model, first half: Conformer layers on Whisper base's encoder, which rests; its frames are computed three times.

    Real speech first, then synthesized. Go on with `whisper_ctc --set start=<run>/model`.
    """
    noise = Augmentation(noise_chance=0.35, snr_db=(8.0, 30.0), spec=None)
    return AsrExperiment(
        "whisper_top",
        tuple(Corpus(x, 1 if i == 0 else 6, noise) for i, x in enumerate(sources)),
        TrainConfig({"top": 1.5e-3, "encoder": 0.0}, seconds=4500, average=0.998, validate_every=500, save_every=250),
        FromWhisper(frozen=6, top=TopDims(dim=288, layers=4, dropout=0.15, attention_dropout=0.15)),
        _named(checks),
        Units(256, text),
        learning=Learning(batch_seconds=40.0, kept_versions=3),
        held_out=40,
        max_seconds=20.0,
    )


def whisper_ctc(sources: Sequence[str], checks: Sequence[str], text: str) -> AsrExperiment:
    """The embedded CTC model, second half: the encoder's upper layers learn too, at low rates, from what `whisper_top` left."""
    first = whisper_top(sources, checks, text)
    spec = SpecAugment(ramp=(0, 10**9, 10**9))
    corpora = tuple(replace(x, augment=replace(x.augment, spec=spec)) for x in first.corpora)
    training = replace(first.training, learning_rates={"top": 4e-4, "encoder": 6e-5}, seconds=3000)
    encoder = FromWhisper(frozen=3, top=first.encoder.top) if isinstance(first.encoder, FromWhisper) else first.encoder
    return replace(first, recipe="whisper_ctc", corpora=corpora, training=training, encoder=encoder, learning=Learning(batch_seconds=30.0))


def speech_llm(sources: Sequence[str], checks: Sequence[str], text: str) -> AsrExperiment:
    """A small speech LLM, for CPUs: the embedded CTC model at rest, its words and their frames, SmolLM2-135M with low-rank paths.

    Real speech first, then synthesized: the first source is heard whole in every epoch, a fourteenth of each other. The noise makes the
    CTC model, which has seen this speech, err as often as on speech that is new to it (35% of the words instead of 13%).
    """
    noise = Augmentation(noise_chance=0.9, snr_db=(-2.0, 15.0), spec=None)
    prompts = {"before": "Misheard transcript: ", "after": "\nCorrected transcript:", "begin": "\n"}  # the best of five before training
    dims = SpeechLlmDims(adapter=AdapterDims("words"), encoder="rest", **prompts)
    return AsrExperiment(
        "speech_llm",
        tuple(Corpus(x, 1 if i == 0 else 14, noise) for i, x in enumerate(sources)),
        TrainConfig({"top": 0.0, "encoder": 0.0, "adapter": 1e-3, "llm": 3e-4}, seconds=3600, validate_every=250, save_every=250),
        FromModel(),
        _named(checks),
        Units(text=text, folder="duolect-ctc"),
        llm=LlmPart(dims=dims),
        learning=Learning(batch_seconds=30.0, kept_versions=2, decoder_check=24),
        held_out=40,
        max_seconds=20.0,
    )


def loquacious_speech_llm(sources: Sequence[str], checks: Sequence[str], text: str) -> AsrExperiment:
    """The paper's prefix LLM (paper.md 1.8), one epoch: Qwen2-0.5B at 120 ms, rsLoRA 320, `--set encoder.model=<AED folder>`."""
    experiment = loquacious_aed(sources, checks, text)
    dims = SpeechLlmDims(
        adapter=AdapterDims("concat", 2),
        before="USER: ",
        after="Transcribe speech to text. ASSISTANT: ",
        lora=Lora(rank=320, alpha=16.0, dropout=0.1),
    )
    schedule = WarmUp(2000, "cosine", 0.001)
    rates = {"top": 1e-4, "encoder": 1e-4, "adapter": 1e-4, "llm": 1e-4}
    training = replace(experiment.training, learning_rates=rates, epochs=1.0, schedule=schedule)
    return replace(
        experiment,
        recipe="loquacious_speech_llm",
        training=training,
        encoder=FromModel("loquacious-aed"),
        heads=(),
        decoder=None,
        llm=LlmPart("Qwen/Qwen2-0.5B", dims),
    )


RECIPES: Mapping[str, Recipe] = {
    f.__name__: f
    for f in (
        tiny,
        mini,
        whisper_top,
        whisper_ctc,
        speech_llm,
        librispeech_aed,
        librispeech_aed_base,
        loquacious_aed,
        loquacious_speech_llm,
        continued,
    )
}


def run(
    experiment: AsrExperiment,
    out: Path,
    *,
    world: World,
    mirror: str = "",
    command: Sequence[str] | None = None,
    deviations: Sequence[str] = (),
    frames: dict[Any, Any] | None = None,
) -> Mapping[str, float]:
    """The figures of the trained model, which lies in out/model; the same experiment and folder go on where they stopped.

    frames: where frames of an encoder at rest are kept, for several runs with the same one.

    Raises RunError for a folder of another experiment, DataError, ModelError and TrainError.
    """
    torch.manual_seed(experiment.training.seed)
    known = {"top", "encoder", *(["adapter", "llm"] if experiment.llm else ["decoder"] if experiment.decoder else [])}
    if odd := experiment.training.learning_rates.keys() - known:
        raise TrainError(f"learning_rates of {', '.join(sorted(odd))}: expected {', '.join(sorted(known))}: correct the name")
    made = _encoder(experiment.encoder)  # before the folder: a wrong name leaves none
    if world.first:
        _open(experiment, out, world, command, deviations)
    world.barrier()
    if isinstance(made, CtcModel):
        ctc = made
    else:
        vocabulary = _units(experiment, out, world)
        ctc = CtcModel(made, vocabulary, aux=dict.fromkeys(experiment.heads, vocabulary))
    model = ctc if experiment.decoder is None else AedModel(ctc, experiment.decoder)
    if experiment.llm is not None:
        model = _speech_llm(experiment, experiment.llm, ctc, named=isinstance(made, CtcModel))
    if experiment.start:
        report = warm_start(model, experiment.start)
        _say(world, str(report))
    corpora, held = _corpora(experiment, ctc, out, world)
    checks = {name: _check_set(name, source, ctc, experiment, out, world) for name, source in experiment.checks.items()}
    if held:
        checks["held-out"] = held
    size, trained = (sum(p.numel() for p in model.parameters() if p.requires_grad or rest) / 1e6 for rest in (True, False))
    _say(world, f"{size:.1f} M parameters, {trained:.1f} M of them learn; on {world.size} x {world.device}")
    card = f"# {experiment.recipe}\n\nTrained by duolect; the whole experiment is recipe.json of its run folder.\n"
    seed = experiment.training.seed
    kept = None if frames is None else frames.setdefault(digest(replace(experiment, llm=None)), {})
    task = AsrTask(model, experiment.learning, corpora, checks, seed=seed, case=experiment.units.case, card=card, frames=kept)
    return train(task, experiment.training, out, world=world, layers=_layers(model), mirror=mirror)


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
        items, apart = _held_out(found.items, experiment.held_out if number == 0 else 0)
        held += apart
        corpora.append((corpus, items))
        hours = sum(x.seconds for x in items) / 3600
        left_out = f", {len(found.skipped)} left out (skipped-{number}.jsonl)" if found.skipped else ""
        odd = f", {len(source.problems)} lines cannot be used, such as {source.problems[0]}" if source.problems else ""
        _say(world, f"{corpus.source}: {len(items)} utterances, {hours:.2f} h{left_out}{odd}")
    return corpora, held


def _base(experiment: AsrExperiment, name: str) -> AsrExperiment:
    return replace(experiment, recipe=name, encoder=PRESETS["base"], heads=(4, 10), decoder=DecoderDims.of(layers=6, dim=1024))


def _paper(epochs: float) -> TrainConfig:
    """paper.md 1.9: AdamW, one cycle up to 5e-4, clipping at 5, bf16."""
    rates: dict[str, float] = {"top": 5e-4, "decoder": 5e-4, "encoder": 5e-4}
    return TrainConfig(
        rates,
        epochs=epochs,
        schedule=Piecewise(),
        eps=1e-16,
        clip=5.0,
        precision="bf16",
        workers=8,
        validate_every=2000,
        save_every=1000,
        keep_best=4,
    )


def _named(sources: Sequence[str]) -> dict[str, str]:
    """Validation sets by the names of their folders or files."""
    names = [Path(x).parent.name if Path(x).suffix == ".jsonl" else Path(x).name for x in sources]
    return {name if names.count(name) == 1 else f"{name}-{i}": str(x) for i, (name, x) in enumerate(zip(names, sources, strict=True))}


def _open(experiment: AsrExperiment, out: Path, world: World, command: Sequence[str] | None, deviations: Sequence[str]) -> None:
    """Makes the run folder, or takes it up; one of another experiment that never came to save anything is begun anew."""
    if (out / "recipe.json").is_file() and not (out / STATE).is_file():
        for old in (
            *out.glob("skipped-*.jsonl"),
            *(out / n for n in ("recipe.json", "env.json", "units.txt", "deviations.json", "metrics.jsonl")),
        ):
            old.unlink(missing_ok=True)
        shutil.rmtree(out / "units", ignore_errors=True)
    RunFolder.open(out, recipe=experiment, device=str(world.device), seed=experiment.training.seed, command=command)
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
    llm, vocabulary = load_language_model(resolve(part.model))
    if not part.dims.pretrained:
        llm = type(llm)(llm.config)
    if part.heads:
        ctc = ctc.with_heads(dict.fromkeys(part.heads, with_blank(vocabulary)))
    sources = {"llm": part.model} if part.dims.pretrained and part.dims.learns != "all" else {}
    if named and isinstance(experiment.encoder, FromModel) and not (experiment.start or part.heads):
        sources["ctc"] = experiment.encoder.model
    return SpeechLlm(ctc, llm, vocabulary, part.dims, sources=sources)


def _encoder(config: ConformerDims | FromWhisper | FromModel) -> Encoder | CtcModel:
    if isinstance(config, ConformerDims):
        return ConformerEncoder(config)
    if isinstance(config, FromModel):
        place = resolve(config.model)
        kind = read_config(Path(place)) if (Path(place) / "config.json").is_file() else {}
        if kind.get("type") is not None:
            return CtcModel.load(place)
        return WhisperEncoder.from_whisper(place) if kind.get("model_type") == "whisper" else HuggingFaceEncoder.load(place)
    encoder = WhisperEncoder.from_whisper(resolve(config.whisper), merge_after=config.merge_after)
    frozen: list[nn.Module] = [encoder.conv1, encoder.conv2, *encoder.layers[: config.frozen]]
    if config.frozen >= encoder.depth:
        frozen = [encoder]
    for module in frozen:
        module.requires_grad_(False)
    return encoder if config.top is None else ExtendedEncoder(encoder, config.top)


def _held_out(items: Sequence[Labelled], count: int) -> tuple[list[Labelled], list[Labelled]]:
    """(for training, about `count` of rare speakers for validation), no speaker in both."""
    by_speaker: dict[str, list[Labelled]] = {}
    for item in items:
        by_speaker.setdefault(str(item.utterance.fields.get("speaker")), []).append(item)
    held: list[Labelled] = []
    for speaker in sorted(by_speaker, key=lambda s: random_for(0, 0, s, "held out").random()):
        if len(held) < count and len(by_speaker[speaker]) <= 4:
            held += by_speaker[speaker]
    ids = {x.utterance.id for x in held}
    return [x for x in items if x.utterance.id not in ids], held


def _check_set(name: str, source: str, ctc: CtcModel, experiment: AsrExperiment, out: Path, world: World) -> Sequence[Labelled]:
    """What of a validation set can be scored; nothing is left out for its length but what the encoder cannot hear at once."""
    longest, listed = min(ctc.encoder.max_seconds, 40.0), f"skipped-{name}.jsonl"
    limits: dict[str, Any] = {"max_seconds": longest, "max_share_lost": 0.5, "case": experiment.units.case}
    if world.first:
        limits["skipped"] = out / listed
    found = usable(open_source(source).utterances, ctc.vocabulary, seconds_per_frame=ctc.seconds_per_frame, **limits)
    if found.skipped:
        count = f"{len(found.skipped)} of {len(found.items) + len(found.skipped)}"
        _say(world, f"{name}: {count} utterances do not count ({listed}): WER is of the rest")
    return found.items


def _layers(model: Trainable) -> list[nn.Module]:
    """What a sharded run shards by itself: every layer."""
    return [
        layer for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 1 for layer in module if _heavy(layer)
    ]


def _heavy(module: nn.Module) -> bool:
    return sum(p.numel() for p in module.parameters()) > 100_000 and not isinstance(module, nn.Linear)


def _say(world: World, text: str) -> None:
    if world.first:
        print(text, file=sys.stderr, flush=True)
