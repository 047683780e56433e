"""Experiments of language models: one that is there already fitted to texts, or a Transformer from scratch in a CTC model's units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from duolect.config import registered
from duolect.data.filter import Case
from duolect.data.sources import named
from duolect.data.text import TextLines
from duolect.models.embedded import resolve
from duolect.models.finetuned import Learns, LmDims, Written, fitted, save_fitted
from duolect.models.lm import load_language_model
from duolect.recognize.models import place_of
from duolect.run import open_run, write_json
from duolect.train.checkpoint import TrainError
from duolect.train.language import LmTask, TextLearning
from duolect.train.loop import TrainConfig, train
from duolect.train.optim import WarmUp
from duolect.train.parallel import World
from duolect.vocabulary import SentencePieceVocabulary, Vocabulary, load_vocabulary


@registered
@dataclass(frozen=True)
class LmShape:
    """A causal Transformer with RMSNorm, SwiGLU, rotary positions and no bias, from scratch (paper.md 1.10: 32 layers of 1024).

    The default is as large as a quarter of an hour on one core can teach a million words.
    """

    dim: int = 192
    layers: int = 3
    heads: int = 3
    feed_forward: int = 512
    dropout: float = 0.0


@registered
@dataclass(frozen=True)
class Text:
    """A text file, a sentence a line, or a manifest; times: how often it is read in an epoch."""

    source: str
    times: int = 1


@registered
@dataclass(frozen=True)
class LmExperiment:
    """A language model and how it comes about. model: an embedded name, folder, .gguf file, hub id, or a shape. units: the model folder
    whose SentencePiece units it is to have; its own where empty. checks: validation texts by name; the first decides what is best."""

    recipe: str
    texts: tuple[Text, ...]
    training: TrainConfig
    model: str | LmShape
    dims: LmDims = field(default_factory=LmDims)
    units: str = ""
    checks: Mapping[str, str] = field(default_factory=dict)
    learning: TextLearning = field(default_factory=TextLearning)
    case: Case = "lower"


def finetune(llm: str, texts: Sequence[str], checks: Sequence[str], units: str = "", learns: Learns = "all") -> LmExperiment:
    """Two epochs of a pre-trained model over transcripts (paper.md 1.10: 1e-5, 1.8 k labels a batch, all of it learns).

    Low-rank paths learn at 3e-4, the embeddings of new units at 1e-3; old ones rest unless all learns.
    """
    rates = {"llm": 1e-5 if learns == "all" else 3e-4, "embeddings": 1e-3 if units else 1e-5}
    training = TrainConfig(rates, epochs=2.0, schedule=WarmUp(200), precision="auto", validate_every=250, save_every=250, keep_best=2)
    dims = LmDims(learns, embeddings="learn" if learns == "all" else "rest")
    return LmExperiment("finetune", tuple(Text(x) for x in texts), training, llm, dims, units, named(checks))


def scratch(texts: Sequence[str], checks: Sequence[str], units: str) -> LmExperiment:
    """A small model in a CTC model's units, five epochs (paper.md 1.10); as shipped: `--set training.seconds=1500`."""
    rates = {"llm": 3e-3, "embeddings": 3e-3}
    training = TrainConfig(rates, epochs=5.0, schedule=WarmUp(60), weight_decay=0.05, precision="auto", validate_every=300)
    learning = TextLearning(batch_labels=3000)
    return LmExperiment("scratch", tuple(Text(x) for x in texts), training, LmShape(), units=units, checks=named(checks), learning=learning)


def run(
    experiment: LmExperiment,
    out: Path,
    *,
    world: World,
    mirror: str = "",
    deviations: Sequence[str] = (),
) -> Mapping[str, float]:
    """The figures of the trained model, which lies in out/model; the same experiment and folder go on where they stopped.

    Raises RunError for a folder of another experiment, TextError, ModelError and TrainError.
    """
    torch.manual_seed(experiment.training.seed)
    if not experiment.texts:
        raise TrainError("there is no text to learn from: name files with --text")
    corpora = [(TextLines(text.source, case=experiment.case), text.times) for text in experiment.texts]
    checks = {name: TextLines(source, case=experiment.case) for name, source in experiment.checks.items()}
    for lines in (*(lines for lines, _ in corpora), *checks.values()):
        if not len(lines):
            raise TrainError(f"{lines.path}: has no sentence: name a text with one a line, or a manifest with texts")
    units = _units(experiment.units)
    llm, vocabulary, source = _model(experiment, units)
    vocabulary = fitted(llm, vocabulary, experiment.dims, units=units)
    if not any(p.requires_grad for p in llm.parameters()):
        raise TrainError(f"nothing of {experiment.model} is to learn: name new units with --units, or --learns lora or all")
    if world.first:
        open_run(out, recipe=experiment, device=str(world.device), seed=experiment.training.seed)
        write_json(out / "deviations.json", list(deviations))
        for lines, times in corpora:
            often = f", {times} times an epoch" if times > 1 else ""
            world.say(f"{lines.path}: {len(lines)} sentences{often}{_unknown(lines, vocabulary)}")
        size, learns = (sum(p.numel() for p in llm.parameters() if p.requires_grad or rest) / 1e6 for rest in (True, False))
        world.say(f"{size:.1f} M parameters, {learns:.1f} M of them learn; {vocabulary.size} labels; on {world.size} x {world.device}")
    world.barrier()
    written: Written = experiment.case
    name = experiment.model if isinstance(experiment.model, str) else "a Transformer from scratch"

    def save(folder: Path, weights: Mapping[str, Tensor], note: str) -> None:
        card = f"# {experiment.recipe}: {name}\n\nTrained by duolect ({note}); the whole experiment is recipe.json of its run folder.\n"
        save_fitted(folder, llm, weights, vocabulary, dims=experiment.dims, written=written, card=card, source=source)

    task = LmTask(llm, vocabulary, experiment.learning, corpora, checks, seed=experiment.training.seed, save=save)
    updates = sum(task.sizes) * (experiment.training.epochs or 0) / experiment.learning.batch_labels
    if 0 < updates < 100 and experiment.training.steps is None:
        about = f"about {max(1, round(updates))} updates, so it learns little"
        world.say(f"{about}: --set learning.batch_labels=200 training.epochs=5 makes more")
    return train(task, experiment.training, out, world=world, mirror=mirror)


def _model(experiment: LmExperiment, units: SentencePieceVocabulary | None) -> tuple[PreTrainedModel, Vocabulary, str]:
    """(the model before it learns, its vocabulary, the name that a folder of what learned finds it by)."""
    if isinstance(experiment.model, str):
        place = place_of(experiment.model, "language")
        llm, vocabulary = load_language_model(place)
        if not experiment.dims.pretrained:
            llm = type(llm)(llm.config)
        return llm, vocabulary, str(Path(place).resolve()) if Path(experiment.model).exists() else experiment.model
    if units is None:
        raise TrainError("a model from scratch has no units of its own: name a CTC model's folder with --units")
    shape = experiment.model
    config = LlamaConfig(
        vocab_size=units.size,
        hidden_size=shape.dim,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=units.bos,
        eos_token_id=units.eos,
        pad_token_id=None,
        attention_dropout=shape.dropout,
        dtype="float32",
    )
    return LlamaForCausalLM(config), units, ""


def _units(name: str) -> SentencePieceVocabulary | None:
    if not name:
        return None
    units = load_vocabulary(resolve(name))
    if not isinstance(units, SentencePieceVocabulary):
        raise TrainError(
            f"{name}: its units are a {type(units).__name__}, expected SentencePiece: name the folder of a CTC model with such"
        )
    return units.without_blank()


def _unknown(lines: TextLines, vocabulary: Vocabulary) -> str:
    """What a message says of letters that the units cannot write, in a thousand sentences."""
    if not isinstance(vocabulary, SentencePieceVocabulary):
        return ""
    some = lines[:: max(1, len(lines) // 1000)]
    unknown = vocabulary.processor.unk_id()
    odd = [x for x in some if unknown in vocabulary.encode(x)]
    return f"; {100 * len(odd) / len(some):.1f}% have letters outside the units, such as {odd[0][:60]!r}" if odd else ""
