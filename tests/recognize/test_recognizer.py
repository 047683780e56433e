"""Decodings over real files: every preset runs, batches do not matter, failures stay alone, killed runs continue."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import soundfile

from duolect.config import ConfigError, from_json, to_json
from duolect.data.sources import open_source
from duolect.recognize.decoding import Greedy, Language, Prior, TimeSynchronous
from duolect.recognize.files import ResumeError, decode_to_file, written
from duolect.recognize.models import Models, PriorError
from duolect.recognize.presets import PRESETS, Ingredients, decoding_of
from duolect.recognize.recognizer import Recognizer
from duolect.scorer import read_hypotheses
from duolect.search.fusion import AtEnd, AtWordEnd, Every, SearchError
from duolect.search.rescore import labels_for, rescored
from tests.models.test_decoder import tiny_whisper


def ingredients(zoo) -> Ingredients:
    return Ingredients(lm=str(zoo["llm"]), unit_lm=str(zoo["unit"]), aed="tiny", beam=4, nbest=6, interval=3, aed_beam=2)


def with_whisper(models: Models) -> Models:
    models._loaded["attention", "tiny"] = tiny_whisper()
    return models


def recognized(recognizer: Recognizer, zoo, name: str, order=None):
    utterances = open_source(zoo["corpus"]).utterances
    found = {
        r[name].id: r[name] for r in recognizer.recognize(utterances if order is None else [utterances[i] for i in order], progress=False)
    }
    return [found[u.id] for u in utterances]


@pytest.mark.parametrize("name", PRESETS)
def test_each_named_decoding_gives_the_same_in_any_batch(zoo, models, name):
    decodings = {name: decoding_of(name, ingredients(zoo))}
    together = recognized(
        Recognizer(with_whisper(models), str(zoo["am"]), decodings, batch_seconds=100), zoo, name, order=[3, 0, 6, 2, 5, 1, 4]
    )
    alone = recognized(Recognizer(models, str(zoo["am"]), decodings, batch_seconds=0.1), zoo, name)
    scales = decodings[name].scales()
    for a, b in zip(together, alone, strict=True):
        assert a.error is None and b.error is None
        assert a.text == b.text
        assert [h.labels for h in a.nbest] == [h.labels for h in b.nbest]
        for h, g in zip(a.nbest, b.nbest, strict=True):
            assert dict(h.parts) == pytest.approx(dict(g.parts), abs=1e-3)
            assert set(h.parts) == set(scales)


def test_several_decodings_share_one_encoding_and_keep_apart(zoo, models):
    names = ("ctc-greedy", "ctc", "labelwise")
    both = Recognizer(models, str(zoo["am"]), {n: decoding_of(n, ingredients(zoo)) for n in names})
    for name in names:
        one = Recognizer(models, str(zoo["am"]), {name: decoding_of(name, ingredients(zoo))})
        assert [r.text for r in recognized(both, zoo, name)] == [r.text for r in recognized(one, zoo, name)]


def test_fusion_at_the_end_equals_rescoring_the_file(zoo, models, tmp_path):
    x = ingredients(zoo)
    plain = Recognizer(models, str(zoo["am"]), {"it": TimeSynchronous(6)})
    fused = Recognizer(models, str(zoo["am"]), {"it": TimeSynchronous(6, {"llm": Language(x.lm, 0.4, AtEnd())})})
    lines = decode_to_file(plain, "it", open_source(zoo["corpus"]).utterances, tmp_path / "nbest.jsonl", progress=False)
    lm = models.language(x.lm)
    lists = rescored([r.nbest for r in lines], name="llm", scorer=lm, labels=labels_for(lm.vocabulary, [h for r in lines for h in r.nbest]))
    for hypotheses, line in zip(lists, recognized(fused, zoo, "it"), strict=True):
        ours = {h.labels: h.parts["llm"] for h in hypotheses}
        assert ours == pytest.approx({h.labels: h.parts["llm"] for h in line.nbest}, abs=1e-3)
        best = max(hypotheses, key=lambda h: h.score({"ctc": 1.0, "llm": 0.4}))
        assert best.labels == line.nbest[0].labels


def test_bad_files_fail_alone(zoo, models, tmp_path):
    source = open_source(zoo["corpus"]).utterances
    (tmp_path / "broken.wav").write_bytes(b"RIFF nonsense")
    soundfile.write(tmp_path / "silent.wav", np.zeros(0), 16000)
    bad = [
        replace(source[0], id="broken", audio=tmp_path / "broken.wav", fields={**source[0].fields, "id": "broken"}),
        replace(source[0], id="missing", audio=tmp_path / "nowhere.wav", fields={**source[0].fields, "id": "missing"}),
        replace(source[0], id="empty", audio=tmp_path / "silent.wav", fields={**source[0].fields, "id": "empty"}),
    ]
    recognizer = Recognizer(models, str(zoo["am"]), {"it": Greedy()})
    lines = decode_to_file(recognizer, "it", [*source[:2], *bad, *source[2:]], tmp_path / "out.jsonl", progress=False)
    assert [r.id for r in lines if r.error] == ["broken", "missing", "empty"]
    assert all(r.error and "\n" not in r.error for r in lines if r.id in ("broken", "missing", "empty"))
    assert [r.text for r in lines if not r.error] == [r.text for r in recognized(recognizer, zoo, "it")]


def test_an_error_of_a_model_stays_with_its_utterance(zoo, models, tmp_path):
    long = tmp_path / "long.wav"
    soundfile.write(long, np.random.default_rng(0).normal(0, 0.1, 16000 * 2), 16000)
    source = open_source(zoo["corpus"]).utterances[:3]
    lm = models.language(str(zoo["unit"]))
    lm._longest = 4  # histories of more labels are refused, as by a model with few positions
    recognizer = Recognizer(models, str(zoo["am"]), {"it": TimeSynchronous(4, {"unit": Language(str(zoo["unit"]), 0.5, Every(1))})})
    lines = [r["it"] for r in recognizer.recognize(source, progress=False)]
    assert len(lines) == 3
    assert all(r.error is None or "positions" in r.error for r in lines)


def test_a_killed_run_continues_and_loses_or_doubles_nothing(zoo, models, tmp_path):
    utterances = open_source(zoo["corpus"]).utterances
    recognizer = Recognizer(models, str(zoo["am"]), {"it": TimeSynchronous(4)}, batch_seconds=1.0)
    whole = decode_to_file(recognizer, "it", utterances, tmp_path / "whole.jsonl", progress=False)
    out = tmp_path / "killed.jsonl"

    class Killed(BaseException):
        pass

    original = Recognizer.recognize

    def dying(self, rest, *, progress=True):
        for count, found in enumerate(original(self, rest, progress=progress)):
            if count == 3:
                raise Killed
            yield found

    Recognizer.recognize = dying
    try:
        with pytest.raises(Killed):
            decode_to_file(recognizer, "it", utterances, out, progress=False)
    finally:
        Recognizer.recognize = original
    part = tmp_path / "killed.jsonl.part"
    assert not out.exists() and len(part.read_text().splitlines()) == 3
    with open(part, "a") as torn:
        torn.write('{"id": "u6", "pred_te')
    with pytest.raises(ResumeError, match="another decoding"):
        decode_to_file(Recognizer(models, str(zoo["am"]), {"it": TimeSynchronous(5)}), "it", utterances, out, progress=False)
    again = decode_to_file(recognizer, "it", utterances, out, progress=False)
    assert [r.id for r in again] == [u.id for u in utterances]
    assert [r.text for r in again] == [r.text for r in whole]
    assert not part.exists()
    assert [r.text for r in read_hypotheses(out)] == [r.text for r in whole]


def test_long_audio_is_cut_at_pauses_and_joined(zoo, models, tmp_path):
    rng = np.random.default_rng(3)
    pieces = [rng.normal(0, 0.2, 16000 * 4) for _ in range(12)]
    soundfile.write(tmp_path / "long.wav", np.concatenate(pieces), 16000)
    (utterance,) = open_source(tmp_path / "long.wav").utterances
    recognizer = Recognizer(models, str(zoo["am"]), {"it": TimeSynchronous(3)}, word_times=True)
    (found,) = [r["it"] for r in recognizer.recognize([utterance], progress=False)]
    assert found.error is None
    assert found.fields["duration"] == pytest.approx(48.0)
    starts = [w["start"] for w in found.extra["words"]]
    assert starts == sorted(starts) and all(0 <= w["start"] <= w["end"] <= 48.05 for w in found.extra["words"])
    assert starts and starts[-1] > 30, "words behind the first segment carry the recording's time"
    assert " ".join(w["text"] for w in found.extra["words"]) == " ".join(found.text.split())


@pytest.mark.parametrize("form", ["txt", "json", "srt", "vtt", "ctm"])
def test_formats(zoo, models, form):
    recognizer = Recognizer(models, str(zoo["am"]), {"it": TimeSynchronous(3)}, word_times=True)
    found = next(r["it"] for r in recognizer.recognize(open_source(zoo["corpus"]).utterances, progress=False) if r["it"].text)
    text = written(found, form)
    words = found.extra["words"]
    assert words and all(0 <= w["confidence"] <= 1 for w in words)
    expected = {
        "txt": found.text + "\n",
        "srt": "1\n00:00:0",
        "vtt": "WEBVTT\n\n00:00:0",
        "ctm": f"{found.id} 1 {words[0]['start']:.2f} ",
        "json": "{",
    }[form]
    assert text.startswith(expected)
    if form == "json":
        assert json.loads(text)["words"] == words
    if form == "ctm":
        assert len(text.splitlines()) == len(words)


def test_decodings_are_values_that_survive_json(zoo):
    for name in PRESETS:
        decoding = decoding_of(name, ingredients(zoo))
        assert from_json(json.loads(json.dumps(to_json(decoding)))) == decoding


def test_decodings_from_files_and_overrides(zoo, tmp_path):
    decoding = TimeSynchronous(7, {"llm": Language("x", 0.3, AtWordEnd())})
    (tmp_path / "d.json").write_text(json.dumps(to_json(decoding)))
    assert decoding_of(str(tmp_path / "d.json"), ingredients(zoo)) == decoding
    changed = decoding_of("delayed", ingredients(zoo), {"beam": "3", "terms.llm.scale": "0.9"})
    assert changed.scales() == {"ctc": 1.0, "llm": 0.9}
    (tmp_path / "broken.json").write_text('{"type": "Greedy",\n')
    with pytest.raises(ConfigError, match=r"broken.json:\d"):
        decoding_of(str(tmp_path / "broken.json"), ingredients(zoo))
    with pytest.raises(ConfigError, match="ctc-greedy"):
        decoding_of("greedy-ctc", ingredients(zoo))
    with pytest.raises(ConfigError, match="beem"):
        decoding_of("delayed", ingredients(zoo), {"beem": "3"})


def test_a_missing_prior_and_a_beam_of_nothing_are_said(zoo, models):
    with pytest.raises(PriorError, match="it has softmax, counts"):
        list(
            Recognizer(models, str(zoo["am"]), {"it": TimeSynchronous(2, {"p": Prior("nonsense", -0.1)})}).recognize(
                open_source(zoo["corpus"]).utterances, progress=False
            )
        )
    with pytest.raises(SearchError, match="beam of 0"):
        list(
            Recognizer(models, str(zoo["am"]), {"it": TimeSynchronous(0)}).recognize(open_source(zoo["corpus"]).utterances, progress=False)
        )
