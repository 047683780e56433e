"""train: acoustic models and speech LLMs by recipe; what all commands that train have in common."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from duolect.cli.checks import Settings, one_of, pairs, writable

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class RunOptions:
    """How a training runs."""

    set: Annotated[Settings, arg(help="Deviations from the recipe, such as training.epochs=20; --show names the fields.")] = ()
    device: str | None = None
    """cpu or cuda; default: a GPU if there is one."""
    shard: bool = False
    """Cut the model over the processes (FSDP2) instead of copying it."""
    mirror: Literal["", "tensorboard", "wandb", "trackio"] = ""
    """Also write the metrics there."""
    show: bool = False
    """Print the resolved experiment and stop."""


def train(
    recipe: Positional[str],
    out: Path | None = None,
    train: tuple[str, ...] = (),
    dev: tuple[str, ...] = (),
    text: str = "",
    options: Annotated[RunOptions, arg(name="")] = RunOptions(),
) -> int:
    """Trains an acoustic model or a speech LLM; the same command goes on where it stopped.

    Example: duolect train tiny

    Several GPUs: torchrun --no-python --nproc-per-node 8 duolect train ...

    Example: duolect train mini --train real/manifest.jsonl synth/manifest.jsonl --dev dev/manifest.jsonl --out runs/mini

    Args:
        recipe: tiny (two minutes, the demo by heart), mini (Conformer CTC + AED of 30 h), whisper_ctc (CTC on Whisper
            base), speech_llm (of embedded models, for CPUs), librispeech_aed, librispeech_aed_base, loquacious_aed, continued,
            loquacious_speech_llm (of the paper).
        out: Run folder; default: runs/<recipe>.
        train: Speech with transcripts: manifests, folders, LibriSpeech trees, folders that `duolect prepare` made.
        dev: Validation sets, the same kinds; the first decides which weights are best.
        text: Text that units are made of; default: the training transcripts.
        options: Training. --set start=<run>/model begins with the weights of another model where they fit, whatever its heads and layers.
    """
    from duolect.recipes.asr import RECIPES
    from duolect.recipes.experiment import run

    one_of("recipe", recipe, RECIPES)
    if recipe != "tiny" and not train:
        raise ValueError(f"{recipe} needs speech to learn from: name manifests or folders with --train")
    return trained(RECIPES[recipe](train, dev, text), run, out or Path("runs") / recipe, options)


def trained(plain: Any, run: Callable[..., Any], out: Path, options: RunOptions) -> int:
    """Runs (or shows) an experiment with its deviations and says how good the model became."""
    import json
    from contextlib import nullcontext

    from duolect.config import diff, to_json, with_overrides
    from duolect.run import alone
    from duolect.train.parallel import join

    experiment = with_overrides(plain, pairs(options.set, such_as="training.epochs=20"))
    if options.show:
        print(json.dumps(to_json(experiment), indent=1))
        return 0
    writable("--out", out, folder=True)
    world = join("shard" if options.shard else "replicate", options.device)
    with alone(out) if world.first else nullcontext():
        figures = run(experiment, out, world=world, mirror=options.mirror, deviations=diff(plain, experiment))
    if world.first:
        print(": ".join(filter(None, (str(out / "model"), ", ".join(f"{name} {value:.2f}" for name, value in figures.items())))))
    world.leave()
    return 0
