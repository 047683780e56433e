"""The recipes of acoustic models and speech LLMs: `duolect train <recipe>`.

A recipe is a function of its data that returns a frozen AsrExperiment; deviations are `--set field=value` and are recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import duolect
from duolect.audio.augment import Augmentation, SpecAugment
from duolect.data.sources import named
from duolect.models.adapters import AdapterDims
from duolect.models.attention_decoder import DecoderDims
from duolect.models.conformer import PRESETS, ConformerDims
from duolect.models.extended import TopDims
from duolect.models.lora import Lora
from duolect.models.speech_llm import SpeechLlmDims
from duolect.recipes.experiment import AsrExperiment, FromModel, FromWhisper, LlmPart, Units
from duolect.train.asr import Corpus, Learning
from duolect.train.loop import TrainConfig
from duolect.train.optim import Piecewise, WarmUp

DEMO = Path(duolect.__file__).parent / "embedded" / "demo" / "manifest.jsonl"

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
        named(checks or sources or [str(DEMO)]),
        Units(48, text),
        learning=Learning(batch_seconds=30.0),
        max_seconds=35.0,
    )


def mini(sources: Sequence[str], checks: Sequence[str], text: str) -> AsrExperiment:
    """A model of the size of a study, for two quiet hours of a CPU core or minutes of a GPU: Conformer 8 x 144 of 40 ms, CTC + AED.

    Sources from hard to easy: real speech, heard whole in every epoch; then synthesized voices, a third of each. The last one (best of a
    single voice) is heard from the start, the one before it two epochs later, and so on; the first epoch goes from short utterances to
    long ones. That, few and short units and a CTC head half-way up are what leaves the plateau of blanks within four hours of speech heard;
    without them 18 did not (docs/LOG.md). Two hours of a core ended at 72% WER, 65% jointly (docs/RESULTS.md).
    """
    dims = ConformerDims.of(layers=8, dim=144, kernel=15, channels=(16, 32, 32), subsampling=4, dropout=0.05, attention_dropout=0.0)
    speech = Augmentation(noise_chance=0.2, spec=SpecAugment(ramp=(3000, 8000, 10**9)))
    last = len(sources) - 1
    return AsrExperiment(
        "mini",
        tuple(Corpus(x, 3 if i else 1, speech, begin=2 * (last - i)) for i, x in enumerate(sources)),
        TrainConfig(
            {"top": 1.5e-3, "encoder": 1.5e-3, "decoder": 1.5e-3},
            seconds=7200,
            schedule=Piecewise(((0.0, 0.05), (0.02, 1.0), (0.5, 0.6), (1.0, 0.005))),
            average=0.998,
            precision="auto",
            validate_every=1000,
            save_every=500,
            keep_best=4,
        ),
        dims,
        named(checks),
        Units(128, text),
        heads=(4,),
        decoder=DecoderDims.of(layers=3, dim=144),
        learning=Learning(batch_seconds=30.0, rising=1),
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
        named(checks),
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
    """Two more epochs for a trained model (`--set start=...`) at 1e-5 (paper: 5e-6, 1e-5, 2e-5): the fair rival of a speech LLM."""
    experiment = loquacious_aed(sources, checks, text)
    schedule = Piecewise(((0.0, 0.01), (0.05, 1.0), (0.9, 0.01), (1.0, 0.01)))
    rates = dict.fromkeys(experiment.training.learning_rates, 1e-5)
    return replace(
        experiment,
        recipe="continued",
        training=replace(experiment.training, learning_rates=rates, epochs=2.0, schedule=schedule),
        encoder=FromModel(""),
        heads=(),
        decoder=None,
    )


def whisper_ctc(sources: Sequence[str], checks: Sequence[str], text: str) -> AsrExperiment:
    """A CTC model on Whisper base: what its encoder hears, at rest, and its decoder names, through Conformer layers, to a head that writes
    and copies.

    Real speech first, then synthesized, of which an epoch hears a sixth. Units are of one and a half to a word: the fewer places in a word
    there are to choose, the sooner it is known when to copy which.
    """
    speech = Augmentation(noise_chance=0.35, snr_db=(8.0, 30.0), speechless=0.02, spec=SpecAugment(ramp=(0, 10**9, 10**9)))
    training = TrainConfig(
        {"top": 1.5e-3, "spotter": 4e-4, "encoder": 0.0},
        seconds=4200,
        average=0.998,
        precision="auto",
        validate_every=150,
        save_every=150,
        keep_best=3,
        learns={"spotter": (0.1, 1e9)},  # the layers on top begin at random and would pull it anywhere
    )
    top = TopDims(dim=288, layers=4, dropout=0.15, attention_dropout=0.15)
    return AsrExperiment(
        "whisper_ctc",
        tuple(Corpus(x, 1 if i == 0 else 6, speech) for i, x in enumerate(sources)),
        training,
        FromWhisper(frozen=6, top=top, spotter=(2, 16), spotter_lora=Lora(32, 32.0, (), 0.05)),
        named(checks),
        Units(2000, text),
        learning=Learning(batch_seconds=40.0),
        held_out=40,
        max_seconds=20.0,
    )


def speech_llm(sources: Sequence[str], checks: Sequence[str], text: str) -> AsrExperiment:
    """A small speech LLM, for CPUs: the embedded CTC model at rest, its words and their frames, duolect-lm with low-rank paths.

    Real speech first, then synthesized: the first source is heard whole in every epoch, an eighth of each other. The noise makes the
    CTC model, which has seen this speech, err as often as on speech that is new to it (24% of the words instead of 14%).
    """
    noise = Augmentation(noise_chance=0.9, snr_db=(-2.0, 18.0), speechless=0.02, spec=None)
    dims = SpeechLlmDims(
        adapter=AdapterDims("words", labels=True),
        before="Words that may come: {context}\nMisheard transcript: ",  # the best of five pairs of prompts before any training
        after="\nCorrected transcript:",
        begin="\n",
        encoder="rest",
        lora=Lora(targets=(), dropout=0.05),
    )
    rates = {"top": 0.0, "encoder": 0.0, "adapter": 1e-3, "llm": 3e-4}
    return AsrExperiment(
        "speech_llm",
        tuple(Corpus(x, 1 if i == 0 else 8, noise) for i, x in enumerate(sources)),
        TrainConfig(rates, seconds=4800, precision="auto", validate_every=200, save_every=100, keep_best=3),
        FromModel(),
        named(checks),
        Units(text=text, folder="duolect-ctc"),
        llm=LlmPart("duolect-lm", dims),
        learning=Learning(batch_seconds=60.0, kept_versions=2, decoder_check=24),
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


_SMALL = (tiny, mini, whisper_ctc, speech_llm)
_PAPER = (librispeech_aed, librispeech_aed_base, loquacious_aed, loquacious_speech_llm, continued)
RECIPES: Mapping[str, Recipe] = {recipe.__name__: recipe for recipe in (*_SMALL, *_PAPER)}


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
