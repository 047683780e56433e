"""An AED of ours through the named decodings: one folder is acoustic model and encoder-decoder, in one vocabulary."""

from __future__ import annotations

import pytest
import torch

from duolect.data.sources import open_source
from duolect.models.aed import AedModel
from duolect.models.attention_decoder import histories
from duolect.models.encoders import Encoded
from duolect.recognize.decoding import Attention, Internal, LabelSynchronous, Language
from duolect.recognize.models import Models
from duolect.recognize.presets import Ingredients, decoding_of
from duolect.recognize.recognizer import Recognizer
from tests.conftest import tiny_lm
from tests.models.test_attention_decoder import tiny
from tests.oracles import lm_from_scratch

NAMES = ("aed-greedy", "aed", "aed+ctc-rescore", "aed+ctc-time", "aed+ctc-label")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("own") / "aed"
    tiny().save(path, card="", dtype=torch.float32)
    return str(path)


@pytest.mark.parametrize("name", NAMES)
def test_each_aed_decoding_gives_the_same_in_any_batch(zoo, folder, name):
    decodings = {name: decoding_of(name, Ingredients(lm=("",), unit_lm="", aed=folder, beam=4, nbest=6, interval=3, label_beam=2))}
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


def test_an_internal_language_model_is_subtracted_where_another_one_is_fused(zoo, folder):
    """In one search over the AED's labels: its score with audio, a language model's, and minus its own score without audio."""
    models, utterances = Models(say=lambda text: None), open_source(zoo["corpus"]).utterances
    lm = tiny_lm("llama", models.attention(folder).vocabulary)
    models._loaded["language", "other", ""] = lm
    terms = {"aed": Attention(folder), "lm": Language("other", 0.4), "internal": Internal(folder, -0.3)}
    decodings = {name: LabelSynchronous(dict(list(terms.items())[:n]), 4) for name, n in (("with", 3), ("without", 2))}
    found = list(Recognizer(models, folder, decodings).recognize(utterances, progress=False))
    aed = models.attention(folder)
    assert isinstance(aed, AedModel)
    v = aed.vocabulary
    for h in (h for r in found for h in r["with"].nbest):
        history, targets = histories(torch.tensor([h.labels]), torch.tensor([len(h.labels)]), bos=v.bos, eos=v.eos)
        with torch.no_grad():
            logits = aed.decoder(history, Encoded(torch.zeros(1, 3, 16), torch.tensor([3]))).logits
        wanted = -float(torch.nn.functional.cross_entropy(logits[0], targets[0], reduction="sum"))
        assert h.parts["internal"] == pytest.approx(wanted, abs=1e-3)
        assert h.parts["lm"] == pytest.approx(lm_from_scratch(lm, h.labels), abs=1e-3)
    assert any([h.labels for h in r["with"].nbest] != [h.labels for h in r["without"].nbest] for r in found), "it has a say"
