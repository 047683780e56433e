"""train: acoustic models and speech LLMs by recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from duolect.cli.checks import one_of, pairs


def train(
    recipe: Positional[str],
    out: Path | None = None,
    train: tuple[str, ...] = (),
    dev: tuple[str, ...] = (),
    text: str = "",
    set: Annotated[
        tuple[str, ...], arg(help="Deviations from the recipe: field=value ..., such as training.epochs=20; --show names the fields.")
    ] = (),
    device: str | None = None,
    shard: Annotated[bool, arg(help="Cut the model over the processes (FSDP2) instead of copying it.")] = False,
    mirror: Literal["", "tensorboard", "wandb", "trackio"] = "",
    show: Annotated[bool, arg(help="Print the resolved experiment and stop.")] = False,
) -> int:
    """Trains an acoustic model or a speech LLM; the same command goes on where it stopped.

    Example: duolect train tiny

    Several GPUs: torchrun --no-python --nproc-per-node 8 duolect train ...

    Example: duolect train mini --train real/manifest.jsonl synth/manifest.jsonl --dev dev/manifest.jsonl --out runs/mini

    Args:
        recipe: tiny (two minutes, the demo by heart), mini (Conformer CTC + AED of 30 h), whisper_top and then whisper_ctc (the embedded
            CTC model), speech_llm (of embedded models, for CPUs), librispeech_aed, librispeech_aed_base, loquacious_aed, continued,
            loquacious_speech_llm (of the paper).
        out: Run folder; default: runs/<recipe>.
        train: Speech with transcripts: manifests, folders, LibriSpeech trees, folders that `duolect prepare` made.
        dev: Validation sets, the same kinds; the first decides which weights are best.
        text: Text that units are made of; default: the training transcripts.
        device: cpu or cuda; default: a GPU if there is one.
        mirror: Also write the metrics there.
    """
    import json

    from duolect.cli.options import quiet
    from duolect.config import diff, to_json, with_overrides
    from duolect.recipes.asr import RECIPES
    from duolect.recipes.experiment import run
    from duolect.train.parallel import join

    quiet()
    one_of("recipe", recipe, RECIPES)
    if recipe != "tiny" and not train:
        raise ValueError(f"{recipe} needs speech to learn from: name manifests or folders with --train")
    plain = RECIPES[recipe](train, dev, text)
    experiment = with_overrides(plain, pairs(set, such_as="training.epochs=20"))
    if show:
        print(json.dumps(to_json(experiment), indent=1))
        return 0
    out = out or Path("runs") / recipe
    world = join("shard" if shard else "replicate", device)
    figures = run(experiment, out, world=world, mirror=mirror, deviations=diff(plain, experiment))
    if world.first:
        print(f"{out / 'model'}: " + ", ".join(f"{name} {value:.2f}" for name, value in figures.items()))
    return 0
