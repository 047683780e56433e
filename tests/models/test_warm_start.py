"""Warm start: what fits is taken by name, layer and vocabulary; the rest is reported and left."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from duolect.models import ModelError
from duolect.models.aed import AedModel
from duolect.models.attention_decoder import DecoderDims
from duolect.models.conformer import ConformerDims, ConformerEncoder
from duolect.models.ctc import CtcModel
from duolect.models.encoders import WhisperDims, WhisperEncoder
from duolect.models.warm_start import warm_start
from duolect.vocabulary import SentencePieceVocabulary, Vocabulary
from tests.conftest import WORDS, sentence_pieces


def pieces(*texts: str, size: int = 14) -> SentencePieceVocabulary:
    return SentencePieceVocabulary(sentence_pieces([*texts] * 5, size=size).model, blank="last")


AB, CD = pieces(WORDS), pieces("cd dc cdc dcd ccd", size=12)


def ctc(layers: int, vocabulary: Vocabulary = AB, *, aux: dict[int, Vocabulary] | None = None, seed: int = 0, dim: int = 16) -> CtcModel:
    torch.manual_seed(seed)
    return CtcModel(ConformerEncoder(ConformerDims(dim=dim, layers=layers, heads=2, kernel=4, channels=(2, 2, 4))), vocabulary, aux=aux)


def test_the_main_head_stays_where_it_was_when_layers_are_added(tmp_path: Path) -> None:
    source, model = AedModel(ctc(2, aux={1: AB}), DecoderDims.of(layers=2, dim=16)), ctc(3, CD, aux={2: AB, 1: CD}, seed=1)
    before = {name: x.clone() for name, x in model.weights().items()}
    source.save(tmp_path, card="", dtype=torch.float32)
    report = warm_start(model, tmp_path)
    old, now = source.weights(), model.weights()
    for name, x in now.items():
        origin = name.replace("aux.2.", "head.")
        if name in report.loaded:
            assert torch.equal(x, old[origin]), name
        else:
            assert torch.equal(x, before[name]), name
    assert "aux.2.weight" in report.loaded and "encoder.layers.1.norms.4.weight" in report.loaded
    assert {name.rsplit(".", 1)[0] for name in report.new if not name.startswith("encoder.layers.2.")} == {"head", "aux.1"}
    assert set(report.loaded) | set(report.new) == set(now)
    assert report.skipped["aux.1.weight"] == f"the model has no head at layer 1 with vocabulary {AB.digest()}"
    assert report.skipped["decoder.norm.weight"] == "the model has no such weight"
    text = str(report).splitlines()
    assert len(text) == 3 and "encoder.layers.1" in text[0] and "aux.2" in text[0]
    assert text[2].startswith("new (") and "encoder.layers.2" in text[2] and "head" in text[2]


def test_an_aed_from_an_aed_of_another_vocabulary_and_of_the_same(tmp_path: Path) -> None:
    dims = DecoderDims.of(layers=2, dim=16)
    source, model = AedModel(ctc(2), dims), AedModel(ctc(2, CD, seed=1), dims)
    source.save(tmp_path, card="", dtype=torch.float32)
    report = warm_start(model, tmp_path)
    assert torch.equal(model.decoder.layers[1].up.weight, source.decoder.layers[1].up.weight)
    assert report.skipped["decoder.embedding.weight"] == f"rows are labels of vocabulary {AB.digest()}, the model's is {CD.digest()}"
    assert sorted(report.new) == ["decoder.aux.1.1.weight", "decoder.embedding.weight", "head.bias", "head.weight"]
    twin = AedModel(ctc(2, seed=2), dims)
    assert not (report := warm_start(twin, tmp_path)).new and not report.skipped
    for name, x in source.weights().items():
        assert torch.equal(x, twin.weights()[name])


def test_other_shapes_and_encoders_are_named(tmp_path: Path) -> None:
    source = ctc(1)
    source.save(tmp_path / "small", card="")
    with pytest.raises(ModelError, match=r"nearly nothing of it fits the model: shape \[.*\], expected .*: name a checkpoint of a similar"):
        warm_start(ctc(1, dim=32), tmp_path / "small")
    whisper = CtcModel(WhisperEncoder(WhisperDims(dim=16, layers=1, heads=2)), AB)
    whisper.save(tmp_path, card="")
    with pytest.raises(ModelError, match="nearly nothing of it fits the model: of a whisper encoder, the model's is a conformer"):
        warm_start(source, tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"nothing of it fits the model: the model has no such weight \(1\)"):
        warm_start(source, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be read"):
        warm_start(source, tmp_path)
    with pytest.raises(ModelError, match="is no model folder"):
        warm_start(source, tmp_path / "nothing")
