"""Fitted language models: what is saved loads, and predicts the same."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from duolect.models import ModelError
from duolect.models.finetuned import LmDims, fitted, save_fitted
from duolect.models.lm import HFCausalLM, load_language_model
from duolect.models.lora import Lora, LoraLinear
from duolect.search.rescore import text_scores
from duolect.vocabulary import Vocabulary
from tests.conftest import sentence_pieces
from tests.models.test_speech_llm import TEXTS, tokenizer, write_llm

LORA = {"llama": Lora(4, targets=("q_proj", "down_proj")), "qwen2": Lora(4), "gpt2": Lora(4, targets=())}
SAID = ["ab abba", "ba", "bab ab ab"]
PIECES = sentence_pieces(TEXTS * 5, size=14)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("llms")
    for kind in LORA:
        write_llm(kind, root / kind, tokenizer())
    return {kind: root / kind for kind in LORA}


def moved(model: Any) -> None:
    """Changes everything that learns, as a training would."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))


@torch.no_grad()
def plain(model: Any, vocabulary: Vocabulary, labels: list[int]) -> Tensor:
    """log p(labels eos) by a forward of the whole model, over the labels that are there."""
    ids = torch.tensor([[vocabulary.bos, *labels, vocabulary.eos]])
    log_probs = model(input_ids=ids[:, :-1]).logits[..., : vocabulary.size].float().log_softmax(-1)
    return log_probs.gather(2, ids[:, 1:, None]).sum()


@pytest.mark.parametrize(
    ("kind", "learns", "units", "embeddings", "initial"),
    [
        (kind, learns, units, ("learn", "rest")[i % 2], ("pieces", "random")[i % 3 == 0])
        for i, (kind, learns, units) in enumerate(itertools.product(LORA, ("all", "lora", "nothing"), ("own", "pieces")))
    ],
)
def test_a_saved_model_predicts_what_it_did(
    kind: str, learns: Any, units: str, embeddings: Any, initial: Any, sources: dict[str, Path], tmp_path: Path
) -> None:
    llm, vocabulary = load_language_model(sources[kind])
    dims = LmDims(learns, LORA[kind], embeddings, initial)
    vocabulary = fitted(llm, vocabulary, dims, units=PIECES if units == "pieces" else None)
    if units == "pieces":  # position by position the acoustic model's labels
        assert [vocabulary.piece(i) for i in range(vocabulary.size)] == [PIECES.piece(i) for i in range(PIECES.size)]
        assert llm.get_output_embeddings().weight.shape[0] == PIECES.size and vocabulary.digest() == PIECES.digest()  # type: ignore[union-attr]
    moved(llm)
    llm.eval()
    labels = [vocabulary.encode(text) for text in SAID]
    wanted = [float(plain(llm, vocabulary, x)) for x in labels]
    save_fitted(
        tmp_path, llm, llm.state_dict(), vocabulary, dims=dims, written="lower", card="", source=str(sources[kind]), dtype=torch.float32
    )
    found = HFCausalLM.load(tmp_path)
    assert found.written == "lower" and found.vocabulary.digest() == vocabulary.digest()
    assert not any(isinstance(module, LoraLinear) for module in found.model.modules())
    got = text_scores(found, SAID)
    assert [count for _, count in got] == [len(x) + 1 for x in labels]
    assert [score for score, _ in got] == pytest.approx(wanted, abs=1e-3)
    if learns == "all":  # anyone's transformers loads it
        alone = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
        assert float(plain(alone, vocabulary, labels[0])) == pytest.approx(wanted[0], abs=1e-3)
    elif units == "own" and embeddings == "rest":
        assert set(load_file(tmp_path / "model.safetensors")) == {n for n, p in llm.named_parameters() if p.requires_grad}
        assert all(".up" in n or ".down" in n for n in load_file(tmp_path / "model.safetensors"))


def test_begin_and_end_are_those_of_the_fitting(sources: dict[str, Path], tmp_path: Path) -> None:
    llm, vocabulary = load_language_model(sources["llama"])
    newline = vocabulary.encode("\n")
    dims = LmDims("lora", LORA["llama"], "rest", end="\n")
    found = fitted(llm, vocabulary, dims)
    assert [found.eos] == newline and found.bos == vocabulary.bos
    save_fitted(tmp_path, llm, llm.state_dict(), found, dims=dims, written="lower", card="", source=str(sources["llama"]))
    again = HFCausalLM.load(tmp_path).vocabulary
    assert (again.bos, again.eos) == (found.bos, found.eos)
    with pytest.raises(ModelError, match="labels of the model's tokenizer, expected one"):
        fitted(load_language_model(sources["llama"])[0], vocabulary, LmDims(end="ab abba ba"))


def test_a_source_that_changed_is_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    llm, vocabulary = load_language_model(sources["llama"])
    dims = LmDims("lora", LORA["llama"], "rest")
    found = fitted(llm, vocabulary, dims)
    save_fitted(tmp_path, llm, llm.state_dict(), found, dims=dims, written="lower", card="", source=str(sources["llama"]))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocabulary": "0123456789"}))
    with pytest.raises(ModelError, match="has changed since"):
        load_language_model(tmp_path)
