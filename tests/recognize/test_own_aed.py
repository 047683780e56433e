"""An AED of ours through the named decodings: one folder is acoustic model and encoder-decoder, in one vocabulary."""

from __future__ import annotations

import pytest
import torch

from duolect.data.sources import open_source
from duolect.recognize.models import Models
from duolect.recognize.presets import Ingredients, decoding_of
from duolect.recognize.recognizer import Recognizer
from tests.models.test_attention_decoder import tiny

NAMES = ("aed-greedy", "aed", "aed+ctc-rescore", "aed+ctc-time", "aed+ctc-label")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("own") / "aed"
    tiny().save(path, card="", dtype=torch.float32)
    return str(path)


@pytest.mark.parametrize("name", NAMES)
def test_each_aed_decoding_gives_the_same_in_any_batch(zoo, folder, name):
    decodings = {name: decoding_of(name, Ingredients(lm=("",), unit_lm="", aed=folder, beam=4, nbest=6, interval=3, aed_beam=2))}
    models, utterances = Models(say=lambda text: None), open_source(zoo["corpus"]).utterances
    found = []
    for seconds in (100, 0.1):
        recognizer = Recognizer(models, folder, decodings, batch_seconds=seconds)
        found.append({r[name].id: r[name] for r in recognizer.recognize(utterances, progress=False)})
    assert len(found[0]) == len(utterances)
    for key, a in found[0].items():
        b = found[1][key]
        assert a.error is None and b.error is None and [h.labels for h in a.nbest] == [h.labels for h in b.nbest]
        for h, g in zip(a.nbest, b.nbest, strict=True):
            assert dict(h.parts) == pytest.approx(dict(g.parts), abs=1e-3)
