"""study, fusion: the paper's tables, each by one command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from duolect.cli.checks import Settings, at_least, one_of, pairs, writable


def study(
    table: Positional[str],
    train: tuple[str, ...],
    test: str,
    out: Path | None = None,
    recipe: str = "speech_llm",
    dev: tuple[str, ...] = (),
    set: Annotated[Settings, arg(help="Changes of the recipe for all rows, such as training.seconds=600.")] = (),
    decodings: tuple[str, ...] = (),
    limit: int | None = None,
    device: str | None = None,
) -> int:
    """Trains several speech LLMs that differ in one thing and recognizes with each: one table; the same command goes on.

    Example: duolect study attention --train train.jsonl --test dev.jsonl --set training.seconds=600

    Args:
        table: attention (prefix, merged, cross), learning (at rest, LoRA, whole), downsampling (concat 1-4x, conv, by CTC label), prompts,
            initial (pre-trained or random), units (the LLM's own or the CTC model's).
        train: Speech with transcripts: manifests, folders, LibriSpeech trees, folders that `duolect prepare` made.
        test: What is recognized.
        out: Folder of the runs and of table.md, table.json; default: out/study/<table>.
        recipe: The recipe of all rows.
        dev: Validation sets while training.
        decodings: Named decodings; default: sllm-greedy sllm sllm+ctc-label.
        limit: Only the first so many utterances of the test set.
        device: cpu or cuda; default: a GPU if there is one.
    """
    from duolect.cli.options import write_tables
    from duolect.config import with_overrides
    from duolect.recipes.asr import RECIPES
    from duolect.study.tables import DECODINGS, TABLES, Study, measured
    from duolect.train.parallel import join

    one_of("table", table, TABLES)
    one_of("recipe", recipe, RECIPES)
    at_least(1, limit=limit)
    out = out or Path("out/study") / table
    writable("--out", out, folder=True)
    experiment = with_overrides(RECIPES[recipe](train, dev, ""), pairs(set, such_as="training.seconds=600"))
    if experiment.llm is None:
        raise ValueError(f"recipe {recipe} has no speech LLM: the tables are of one, such as --recipe speech_llm")
    world = join("replicate", device)
    # A row is what it changes of the model; how it learns is the user's to say.
    fixed = [field for field in pairs(set, such_as="training.seconds=600") if field.startswith("training.")]
    found = measured(Study(table, experiment, test, decodings or DECODINGS, limit, fixed), out, world=world)
    if world.first:
        write_tables(found, out, device=str(world.device))
    world.leave()
    return 0


def fusion(
    tune: str,
    test: str,
    lm: tuple[str, ...] = ("duolect-lm", "duolect-unit-lm"),
    am: str = "duolect-ctc",
    out: Path = Path("out/fusion"),
    priors: tuple[Literal["softmax", "counts", "sampled", "llm"], ...] = ("softmax", "counts", "sampled"),
    intervals: tuple[int, ...] = (1, 5, 10, 20),
    beams: tuple[int, ...] = (1, 4, 8, 16, 32, 64),
    nbest: int = 64,
    rounds: int = 1,
    limit: int | None = None,
    device: str = "auto",
) -> int:
    """How one CTC model and language models are best joined: rescoring, delayed, label-wise, beams, priors; scales tuned on other speech.

    Example: duolect fusion --tune dev.jsonl --test test.jsonl --lm runs/lm/model duolect-unit-lm

    The same command goes on where it stopped. Label-wise fusion is of language models with the CTC model's labels, delayed fusion of all
    others.

    Args:
        tune: Speech with transcripts that the scales are tuned on.
        test: Speech with transcripts, of other speakers, that the table is of.
        lm: Language models; anything that --lm takes elsewhere.
        am: CTC acoustic model, with priors (see `duolect prior`).
        out: Folder for table.md, table.json, the tuned scales and all hypotheses.
        priors: Which priors are tried; llm (in the language model's own labels) needs `duolect prior --lm`.
        intervals: Frames between two scorings of delayed fusion.
        beams: Beams of one-pass search.
        nbest: Hypotheses of the lists that are rescored and that scales are tuned on.
        rounds: How often scales are tuned anew on what one-pass search by the last ones found beside the lists.
        limit: Only the first so many utterances of both corpora.
        device: cpu or cuda; auto: a GPU if there is one.
    """
    from duolect.cli.options import device_of, write_tables
    from duolect.recognize.models import Models
    from duolect.study.fusion import FusionStudy, measured

    at_least(0, rounds=rounds)
    at_least(1, limit=limit, nbest=nbest, intervals=min(intervals, default=1), beams=min(beams, default=1))
    writable("--out", out, folder=True)
    names = {Path(x).parent.name if Path(x).name == "model" else Path(x).name: x for x in lm}
    if len(names) < len(lm):
        raise ValueError(f"--lm {' '.join(lm)}: two of them have the same name: rename a folder")
    models = Models(device=device_of(device))
    study = FusionStudy(am, names, tune, test, priors, intervals, beams, nbest=nbest, rounds=rounds, limit=limit)
    write_tables(measured(study, out, models), out, device=models.device)
    return 0
