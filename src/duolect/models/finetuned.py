"""Language models fitted to transcripts: in their own labels or in an acoustic model's, whole or by low-rank paths (paper.md 1.10)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from duolect.config import from_json, registered, to_json
from duolect.models import ModelError
from duolect.models.ctc import load_weights, read_config, save_model
from duolect.models.lora import Lora, add_lora, merge_lora
from duolect.models.rehead import Initial, rehead, tied_name
from duolect.vocabulary import VOCABULARY_FILE, TokenizerVocabulary, Vocabulary, load_vocabulary

Learns = Literal["all", "lora", "nothing"]
Written = Literal["keep", "lower", "upper", "sentence"]
"""How the text that a model learned from is written: any way, in lower or upper case without punctuation, as sentences."""

KIND = "language"


@registered
@dataclass(frozen=True)
class LmDims:
    """What of a causal language model learns.

    learns: `all` of it, low-rank paths (`lora`), or `nothing` but new embeddings. embeddings: whether embeddings and output matrix may
    learn; new ones always do. initial: of new ones (see rehead). begin, end: text of one label each that a transcript begins and ends with
    in place of the model's bos and eos ("\\n" as the end, paper.md 1.10). pretrained: false for random weights of the same shape.
    recompute: activations are computed again in the backward pass, for memory.
    """

    learns: Learns = "all"
    lora: Lora = field(default_factory=lambda: Lora(targets=(), dropout=0.0))
    embeddings: Literal["learn", "rest"] = "learn"
    initial: Initial = "pieces"
    begin: str = ""
    end: str = ""
    pretrained: bool = True
    recompute: bool = False


def fitted(llm: PreTrainedModel, vocabulary: Vocabulary, dims: LmDims, *, units: Vocabulary | None = None) -> Vocabulary:
    """The vocabulary of the model after it was made ready to learn as `dims` say, in place; units: labels that it gets instead of its own.

    Raises ModelError.
    """
    own = _with_ends(vocabulary, dims)
    new = units is not None and units.digest() != own.digest()
    if new and units is not None:
        rehead(llm, own, units, initial=dims.initial)
        own = units
    let_learn(llm, dims.learns, dims.lora, embeddings=new or dims.embeddings == "learn")
    if dims.recompute:
        llm.gradient_checkpointing_enable({"use_reentrant": False})
    return own


def let_learn(llm: PreTrainedModel, learns: Learns, lora: Lora, *, embeddings: bool) -> None:
    """Sets what of a language model has gradients; low-rank paths are added where they are to learn."""
    matrices: tuple[Any, Any] = (llm.get_input_embeddings(), llm.get_output_embeddings())
    llm.requires_grad_(learns == "all")
    if learns == "lora":
        add_lora(llm.base_model, lora)  # the output matrix stays one
    for module in matrices:
        module.weight.requires_grad_(embeddings)


def save_fitted(
    folder: Path,
    llm: PreTrainedModel,
    weights: Mapping[str, Tensor],
    vocabulary: Vocabulary,
    *,
    dims: LmDims,
    written: Written,
    card: str,
    source: str = "",
    dtype: torch.dtype = torch.float16,
) -> None:
    """Writes a folder that loads as a language model; weights: a state dict of `llm`, saved in `dtype`.

    Where all of it learned, a folder of transformers with vocabulary.json; else what learned alone, and the name of its `source`.
    """
    if dims.learns == "all":
        tied = tied_name(llm, llm)
        kept = {name: x for name, x in weights.items() if name != tied}
        config = {**llm.config.to_dict(), "architectures": [type(llm).__name__], "duolect": {"written": written}}
    else:
        learned = {name for name, p in llm.named_parameters() if p.requires_grad}
        kept = {name: x for name, x in weights.items() if name in learned}
        config = {"type": KIND, "source": source, "dims": to_json(dims), "written": written, "vocabulary": vocabulary.digest()}
    if dims.learns == "all" or not isinstance(vocabulary, TokenizerVocabulary):  # a tokenizer comes with the source
        vocabulary.save(folder)
    config.pop("_name_or_path", None)  # a place on the machine it was trained on
    save_model(folder, json.loads(json.dumps(config, default=str)), kept, card=card, dtype=dtype)


def load_fitted(folder: Path, source: tuple[PreTrainedModel, Vocabulary]) -> tuple[PreTrainedModel, Vocabulary]:
    """The model that `save_fitted` wrote beside its source, low-rank paths merged, and its vocabulary. Raises ModelError."""
    config, (llm, vocabulary) = read_config(folder), source
    dims = replace(from_json(config["dims"], where=f"{folder}/config.json"), recompute=False)
    dtype = llm.dtype
    units = load_vocabulary(folder) if (folder / VOCABULARY_FILE).is_file() else None
    found = fitted(llm.float(), vocabulary, dims, units=units)
    if found.digest() != config["vocabulary"]:
        raise ModelError(
            f"{folder}: was fitted in vocabulary {config['vocabulary']}, found {found.digest()}: {config['source']} has changed since, or "
            "the folder was not copied whole"
        )
    load_weights({name: p for name, p in llm.named_parameters() if p.requires_grad}, folder)
    merge_lora(llm)
    llm.config.duolect = {"written": config["written"]}
    return llm.requires_grad_(False).to(dtype), found  # pyright: ignore[reportArgumentType]


def _with_ends(vocabulary: Vocabulary, dims: LmDims) -> Vocabulary:
    """The vocabulary with the begin and end that `dims` name."""
    if not dims.begin and not dims.end:
        return vocabulary
    if not isinstance(vocabulary, TokenizerVocabulary):
        raise ModelError(
            f"begin and end are for models with a tokenizer, this one's labels are a {type(vocabulary).__name__}: leave them out"
        )
    chosen: dict[str, int] = {"bos": vocabulary.bos, "eos": vocabulary.eos}
    for name, text in (("bos", dims.begin), ("eos", dims.end)):
        if text:
            special = vocabulary.tokenizer.convert_tokens_to_ids(text)
            labels = [special] if vocabulary.piece(special or 0) == text else vocabulary.encode(text)
            if len(labels) != 1:
                raise ModelError(f"{text!r} is {len(labels)} labels of the model's tokenizer, expected one: choose another text")
            chosen[name] = labels[0]
    return TokenizerVocabulary(vocabulary.tokenizer, **chosen)


def written_of(model: PreTrainedModel) -> Written:
    """How the text that the model learned from was written; `keep` for one that nobody fitted."""
    return (getattr(model.config, "duolect", None) or {}).get("written", "keep")
