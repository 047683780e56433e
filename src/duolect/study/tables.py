"""The paper's ablations of speech LLMs as tables: which rows, what each changes in an experiment (paper.md 5, T4-T10)."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from duolect.config import with_overrides
from duolect.data.sources import open_source
from duolect.evaluate.normalize import normalizer
from duolect.evaluate.table import Row, rows
from duolect.evaluate.wer import score_recognized
from duolect.recipes.experiment import AsrExperiment, run
from duolect.recognize.files import decode_to_files
from duolect.recognize.models import Models
from duolect.recognize.presets import PRESETS, Ingredients, decoding_of
from duolect.recognize.recognizer import Recognizer
from duolect.run import require_same_recipe
from duolect.train.parallel import World

Rows = Mapping[str, Mapping[str, str]]

_REQUEST = "Transcribe speech to text. ASSISTANT: "
# What low-rank paths, new layers and random weights need would make a pre-trained model forget.
_WHOLE = {"llm.dims.learns": "all", "training.learning_rates.llm": "5e-5"}

TABLES: Mapping[str, Rows] = {
    "attention": {
        "prefix": {"llm.dims.attention": "prefix"},
        "prefix, audio in both directions": {"llm.dims.attention": "prefix", "llm.dims.bidirectional": "true"},
        "merged": {"llm.dims.attention": "merged"},
        "cross": {"llm.dims.attention": "cross"},
    },
    "learning": {
        "LLM at rest": {"llm.dims.learns": "nothing"},
        "LoRA": {"llm.dims.learns": "lora"},
        "LLM whole": _WHOLE,
        "LLM whole, embeddings too": {**_WHOLE, "llm.dims.embeddings": "learn"},
    },
    "downsampling": {
        **{
            f"concat {n}x": {"llm.dims.adapter.labels": "false", "llm.dims.adapter.kind": "concat", "llm.dims.adapter.factor": str(n)}
            for n in (1, 2, 3, 4)
        },
        "conv 2x": {"llm.dims.adapter.labels": "false", "llm.dims.adapter.kind": "conv", "llm.dims.adapter.factor": "2"},
        "by CTC label": {"llm.dims.adapter.labels": "false", "llm.dims.adapter.kind": "ctc"},
        "by CTC label, with its posterior": {"llm.dims.adapter.kind": "ctc", "llm.dims.adapter.labels": "true"},
        "by word of CTC's transcript": {"llm.dims.adapter.labels": "false", "llm.dims.adapter.kind": "words"},
        "by word of CTC's transcript, with its posterior": {"llm.dims.adapter.kind": "words", "llm.dims.adapter.labels": "true"},
    },
    "prompts": {
        "none": {"llm.dims.before": "", "llm.dims.after": ""},
        "both": {"llm.dims.before": "USER: ", "llm.dims.after": _REQUEST},
        "before": {"llm.dims.before": "USER: ", "llm.dims.after": ""},
        "after": {"llm.dims.before": "", "llm.dims.after": _REQUEST},
        "the recipe's": {},
    },
    "initial": {
        "pre-trained": {},
        "pre-trained, whole": {**_WHOLE, "llm.dims.embeddings": "learn"},
        "random, whole": {"llm.dims.pretrained": "false", "llm.dims.learns": "all", "llm.dims.embeddings": "learn"},
    },
    "units": {
        "the LLM's own": {},
        "the CTC model's, from the pieces' embeddings": {"llm.dims.units": "ctc", "llm.dims.begin": ""},
        "the CTC model's, random": {"llm.dims.units": "ctc", "llm.dims.begin": "", "llm.dims.initial": "random"},
    },
}
"""What is compared, by the table's name: the title of each row and the fields it sets."""

DECODINGS = ("sllm-greedy", "sllm", "sllm+ctc-label")


@dataclass(frozen=True)
class Study:
    """A table of TABLES on an experiment with a speech LLM. test: what is recognized; decodings: by which presets; limit: utterances;
    fixed: fields of the experiment that no row changes."""

    table: str
    experiment: AsrExperiment
    test: str
    decodings: Sequence[str] = DECODINGS
    limit: int | None = None
    fixed: Sequence[str] = ()

    def experiments(self) -> dict[str, AsrExperiment]:
        """The experiment of each row."""
        rows = {title: {k: v for k, v in row.items() if k not in self.fixed} for title, row in TABLES[self.table].items()}
        return {title: with_overrides(self.experiment, changes) for title, changes in rows.items()}


def measured(study: Study, out: Path, *, world: World, progress: bool = True) -> tuple[Row, ...]:
    """The rows of a study: each experiment trained in out/<number>, its decodings of the test set, and CTC alone as the first row.

    What is there already is not made again; RunError if a row was trained on another experiment. Frames of an encoder that rests in all
    rows are computed once. Raises what training raises.
    """
    frames: dict[Any, Any] = {}
    source = open_source(study.test)
    utterances = [u for u in source.utterances if u.text is not None][: study.limit]
    if not utterances:
        raise ValueError(f"{study.test}: no utterance has a transcript, so nothing can be compared")
    scores = {}
    for number, (title, experiment) in enumerate(study.experiments().items()):
        folder = out / f"{number}-{''.join(c if c.isalnum() else '-' for c in title)}"
        print(f"== {study.table}: {title} ({folder})", file=sys.stderr, flush=True)
        if (folder / "result.json").is_file():
            require_same_recipe(folder, experiment)
        else:
            run(experiment, folder, world=world, frames=frames)
        model = str(folder / "model")
        names = ("ctc-greedy", *study.decodings) if not scores else study.decodings
        made = {name: decoding_of(name, Ingredients(speech_llm=model)) for name in names}
        recognizer = Recognizer(Models(device=str(world.device), say=lambda text: None), model, made)
        files = {name: folder / "hypotheses" / f"{name}.jsonl" for name in made}
        for name, lines in decode_to_files(recognizer, utterances, files, progress=progress).items():
            row = PRESETS[name].title if name == "ctc-greedy" else f"{title}: {PRESETS[name].title.removeprefix('Speech LLM ')}"
            scores[row] = score_recognized(lines, normalizer=normalizer("whisper-english"), corpus=Path(study.test).stem)
    return rows(scores)
