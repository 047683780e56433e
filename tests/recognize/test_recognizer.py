"""Decodings over real files: every preset runs, batches do not matter, failures stay alone, killed runs continue."""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from duolect.config import ConfigError, from_json, to_json, with_overrides
from duolect.data.sources import open_source
from duolect.data.utterance import load_audio
from duolect.models import ModelError
from duolect.models.ctc import CtcModel
from duolect.models.encoders import WhisperDims, WhisperEncoder
from duolect.models.lm import HFCausalLM
from duolect.models.priors import PRIORS_FILE, PriorError
from duolect.models.speech_llm import SpeechLlm, SpeechLlmDims
from duolect.recognize.decoding import WRITTEN, Greedy, Language, Prior, TimeSynchronous, of_other_words
from duolect.recognize.files import INDEX, ResumeError, Transcripts, decode_to_files, written
from duolect.recognize.models import Models, free_memory
from duolect.recognize.presets import PRESETS, Ingredients, decoding_of
from duolect.recognize.recognizer import LETTER_SECONDS, MEMORY_SHARE, Recognizer, Segment, _segments, timed_words
from duolect.scorer import Hypothesis, Recognized, read_hypotheses
from duolect.search.fusion import AtEnd, AtWordEnd, Every, SearchError
from duolect.search.rescore import labels_for, labels_of_text, rescored
from duolect.vocabulary import TokenizerVocabulary
from tests.conftest import tiny_lm
from tests.models.test_decoder import tiny_whisper
from tests.oracles import lm_from_scratch
from tests.recognize.conftest import TEXTS


def ingredients(zoo) -> Ingredients:
    names: Any = {"lm": (str(zoo["llm"]),), "unit_lm": str(zoo["unit"]), "aed": "tiny", "speech_llm": str(zoo["sllm"])}
    return Ingredients(**names, beam=4, nbest=6, interval=3, label_beam=2)


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


@pytest.mark.parametrize("name", ["sllm", "sllm-draft", "sllm+ctc-time"])
def test_phrases_that_are_expected_stand_in_the_prompt_of_a_speech_llm(zoo, models, tmp_path, name):
    """As if they had been written there by hand; a model without a place for them hears nothing of them."""
    x = ingredients(zoo)
    model, found = models.attention(x.speech_llm), []
    for before, context in (("ab {context}", {"Bab": 1.0, "bb a": 2.0}), ("ab bab, bb a", {}), ("ab ", {}), ("ab ", {"Bab": 1.0})):
        model.dims = replace(model.dims, before=before)
        model.save(tmp_path / before, card="", dtype=torch.float32)
        decoding = decoding_of(name, replace(x, speech_llm=str(tmp_path / before), context=context, context_scale=0.0))
        assert "context" not in decoding.terms, "the prompt alone"
        lines = recognized(Recognizer(models, str(zoo["am"]), {name: decoding}), zoo, name)
        found.append([[(h.labels, round(h.parts["sllm"], 3)) for h in line.nbest] for line in lines])
    assert found[0] == found[1] != found[2] == found[3]


@pytest.mark.parametrize("name", ["sllm", "aed+ctc-label", "rescore", "delayed-prior", "sllm-draft"])
def test_batches_are_split_by_a_plan_of_memory(zoo, models, monkeypatch, name):
    with_whisper(models)
    decoding, said = decoding_of(name, ingredients(zoo)), []
    models.say = said.append
    recognizer = Recognizer(models, str(zoo["am"]), {name: decoding, "ctc-greedy": Greedy()}, batch_seconds=100)
    whole, sizes = recognized(recognizer, zoo, name), list[list[float]]()
    assert not any("GiB" in text for text in said), "the machine has as much memory as a tiny model needs"
    original = type(decoding).run
    monkeypatch.setattr(
        type(decoding), "run", lambda self, batch: [sizes.append([len(x) / 16000 for x in batch.audios]), original(self, batch)][1]
    )

    def asked(seconds: float) -> int:
        return decoding.bytes_of(models, str(zoo["am"]), seconds=seconds)

    room = 3 * asked(1.0)
    for free, least in ((room, 3), (1, len(TEXTS))):  # of one byte nothing fits, and each utterance is tried alone
        said.clear()
        models._said.clear()
        monkeypatch.setattr("duolect.recognize.recognizer.free_memory", lambda device, free=free: free / MEMORY_SHARE)
        found = recognized(recognizer, zoo, name)
        recognized(recognizer, zoo, name)  # nothing is said again
        assert [h.labels for r in found for h in r.nbest] == [h.labels for r in whole for h in r.nbest]
        assert len(sizes) >= 2 * least and sorted(x for part in sizes for x in part) == sorted(2 * [r.fields["duration"] for r in whole])
        assert all(len(part) == 1 or len(part) * max(map(asked, part)) <= free for part in sizes)
        assert free == 1 or any(len(part) > 1 for part in sizes)
        (text,) = [text for text in said if "GiB" in text]
        assert text.startswith(f"{len(TEXTS)} utterances at once may need ") and f"searching {max(map(len, sizes))} at most" in text
        sizes.clear()


def test_several_decodings_share_one_encoding_and_keep_apart(zoo, models):
    names = ("ctc-greedy", "ctc", "labelwise")
    both = Recognizer(models, str(zoo["am"]), {n: decoding_of(n, ingredients(zoo)) for n in names})
    for name in names:
        one = Recognizer(models, str(zoo["am"]), {name: decoding_of(name, ingredients(zoo))})
        assert [r.text for r in recognized(both, zoo, name)] == [r.text for r in recognized(one, zoo, name)]


@pytest.mark.parametrize("name", ["sllm-greedy", "sllm+ctc-time", "sllm+ctc-label"])
def test_one_encoder_of_two_models_hears_once(zoo, models, monkeypatch, tmp_path, name):
    """A speech LLM on the acoustic model's own encoder: the same as each encoding for itself, and charged with the encoder's time."""
    torch.manual_seed(4)
    encoder = WhisperEncoder(WhisperDims(dim=16, layers=1, heads=2, positions=1500))
    CtcModel(encoder, models.acoustic(str(zoo["am"])).vocabulary).save(tmp_path / "am", card="", dtype=torch.float32)
    llm, sources = HFCausalLM.load(str(zoo["llm"])), {"ctc": str(tmp_path / "am")}
    heard = SpeechLlm(CtcModel.load(tmp_path / "am"), llm.model, llm.vocabulary, SpeechLlmDims(encoder="rest"), sources=sources)
    heard.save(tmp_path / "sllm", card="", dtype=torch.float32)
    shutil.copytree(tmp_path / "am", tmp_path / "copy")  # the same, and nobody knows
    decodings = {name: decoding_of(name, replace(ingredients(zoo), speech_llm=str(tmp_path / "sllm")))}
    apart = recognized(Recognizer(models, str(tmp_path / "copy"), decodings), zoo, name)
    model = models.acoustic(str(tmp_path / "sllm"))
    assert model is models.acoustic(str(tmp_path / "am")) and model is not models.acoustic(str(tmp_path / "copy"))
    calls, plainly = list[int](), CtcModel.of_encoded

    def slow(self: CtcModel, encoded: Any) -> Any:
        calls.append(len(encoded.lengths))
        time.sleep(0.7)
        return plainly(self, encoded)

    monkeypatch.setattr(CtcModel, "of_encoded", slow)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("am")
    for am in ("am", "sllm", "link"):
        together = recognized(Recognizer(models, am, decodings), zoo, name)
        assert calls == [len(TEXTS)]
        assert sum(r.seconds for r in together) >= 0.7
        for a, b in zip(together, apart, strict=True):
            assert (a.text, [h.labels for h in a.nbest]) == (b.text, [h.labels for h in b.nbest])
            assert [dict(h.parts) for h in a.nbest] == [pytest.approx(dict(h.parts), abs=1e-3) for h in b.nbest]
        calls.clear()


def test_fusion_at_the_end_equals_rescoring_the_file(zoo, models, tmp_path):
    x = ingredients(zoo)
    plain = Recognizer(models, str(zoo["am"]), {"it": TimeSynchronous(6)})
    fused = Recognizer(models, str(zoo["am"]), {"it": TimeSynchronous(6, {"llm": Language(x.lm[0], 0.4, AtEnd())})})
    lines = decode_to_files(plain, open_source(zoo["corpus"]).utterances, {"it": tmp_path / "nbest.jsonl"}, progress=False)["it"]
    lm = models.language(x.lm[0])
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
    lines = decode_to_files(recognizer, [*source[:2], *bad, *source[2:]], {"it": tmp_path / "out.jsonl"}, progress=False)["it"]
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


def test_a_killed_run_continues_and_loses_or_doubles_nothing(zoo, models, tmp_path, monkeypatch):
    utterances = open_source(zoo["corpus"]).utterances
    recognizer = Recognizer(models, str(zoo["am"]), {"it": TimeSynchronous(4)}, batch_seconds=1.0)
    whole = decode_to_files(recognizer, utterances, {"it": tmp_path / "whole.jsonl"}, progress=False)["it"]
    out = tmp_path / "killed.jsonl"

    with monkeypatch.context() as patched, pytest.raises(Killed):
        dying_after(3, patched)
        decode_to_files(recognizer, utterances, {"it": out}, progress=False)
    part = tmp_path / "killed.jsonl.part"
    assert not out.exists() and len(part.read_text().splitlines()) == 3
    with open(part, "a") as torn:
        torn.write('{"id": "u6", "pred_te')
    with pytest.raises(ResumeError, match=r"decoding.beam: 4 -> 5: name another --out"):
        decode_to_files(Recognizer(models, str(zoo["am"]), {"it": TimeSynchronous(5)}), utterances, {"it": out}, progress=False)
    again = decode_to_files(recognizer, utterances, {"it": out}, progress=False)["it"]
    assert [r.id for r in again] == [u.id for u in utterances]
    assert [r.text for r in again] == [r.text for r in whole]
    assert not part.exists()
    assert [r.text for r in read_hypotheses(out)] == [r.text for r in whole]


def test_what_is_finished_is_neither_made_again_nor_lost(zoo, models, tmp_path, monkeypatch):
    utterances = open_source(zoo["corpus"]).utterances
    out, said = tmp_path / "out.jsonl", []
    monkeypatch.setattr(models, "say", said.append)

    def made(beam=4, some=utterances, **options):
        return decode_to_files(
            Recognizer(models, str(zoo["am"]), {"it": TimeSynchronous(beam)}), some, {"it": out}, progress=False, **options
        )["it"]

    first = made(some=utterances[:3])
    whole = made()
    assert f"continuing {out}: 3 of 7 utterances are done" in said and [r.seconds for r in whole[:3]] == [r.seconds for r in first]
    before = out.read_bytes()
    assert made() == whole and f"{out}: finished already: nothing to recognize" in said
    for options, expected in [({"beam": 5}, "results of other settings: decoding.beam: 4 -> 5"), ({"some": utterances[:3]}, "has 4 utt")]:
        with pytest.raises(ResumeError, match=expected):
            made(**options)
    with monkeypatch.context() as patched:
        patched.setattr("duolect.recognize.files.source", lambda: "0.0.9")
        assert made() == whole and "0.0.9" in said[-1], "another version is said"
    assert out.read_bytes() == before
    os.utime(zoo["am"] / "model.safetensors")
    with pytest.raises(ResumeError, match="models"):
        made()
    assert [r.seconds for r in made(overwrite=True)] != [r.seconds for r in whole], "other weights, other results"
    assert made(beam=5, overwrite=True) != whole
    made(some=utterances[:3], overwrite=True, beam=5)
    assert len(list(read_hypotheses(out))) == 3
    with monkeypatch.context() as patched, pytest.raises(Killed):
        dying_after(2, patched)
        made(overwrite=True)
    assert len(list(read_hypotheses(out))) == 3, "the old file stays until the new one is whole"
    made()
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["out.jsonl", "out.jsonl.json"]
    out.write_bytes(b"RIFF is no hypotheses file")
    Path(f"{out}.json").unlink()
    with pytest.raises(ResumeError, match="nobody says what made it"):
        made()
    assert out.read_bytes().startswith(b"RIFF")


class Killed(BaseException):
    pass


def test_audio_that_was_replaced_is_said(zoo, models, tmp_path):
    shutil.copytree(zoo["corpus"], tmp_path / "corpus")
    utterances, said = open_source(tmp_path / "corpus").utterances, list[str]()
    recognizer = Recognizer(models, str(zoo["am"]), {"it": Greedy()})
    before = decode_to_files(recognizer, utterances, {"it": tmp_path / "out.jsonl"}, progress=False)
    models.say = said.append
    assert decode_to_files(recognizer, utterances, {"it": tmp_path / "out.jsonl"}, progress=False) == before
    assert not any("changed after" in text for text in said)
    os.utime(utterances[3].audio, (time.time() + 60,) * 2)
    assert decode_to_files(recognizer, utterances, {"it": tmp_path / "out.jsonl"}, progress=False) == before, "staged data is newer, too"
    assert said[-1].startswith("warning: 1 of the audio files changed after ") and "--overwrite" in said[-1]


def dying_after(count: int, monkeypatch) -> None:
    """From now on, recognition is killed when it has given so many utterances."""
    original = Recognizer.recognize

    def dying(self, utterances, *, progress=True):
        for number, found in enumerate(original(self, utterances, progress=progress)):
            if number == count:
                raise Killed
            yield found

    monkeypatch.setattr(Recognizer, "recognize", dying)


def test_decodings_side_by_side_continue_each_where_it_was(zoo, models, tmp_path, monkeypatch):
    utterances = open_source(zoo["corpus"]).utterances
    both = Recognizer(models, str(zoo["am"]), {"a": TimeSynchronous(4), "b": Greedy()}, batch_seconds=1.0)
    outs = {name: tmp_path / f"{name}.jsonl" for name in "ab"}
    with monkeypatch.context() as patched, pytest.raises(Killed):
        dying_after(3, patched)
        decode_to_files(both, utterances, outs, progress=False)
    lost = (tmp_path / "b.jsonl.part").read_text().splitlines()
    (tmp_path / "b.jsonl.part").write_text("\n".join(lost[:1]) + "\n")  # two lines of b never reached the disk
    other = json.loads(lost[0])
    heard = []
    original = Recognizer.recognize

    def listening(self, rest, *, progress=True):
        heard.append((sorted(self.decodings), len(rest)))
        return original(self, rest, progress=progress)

    monkeypatch.setattr(Recognizer, "recognize", listening)
    # Utterances of another corpus that only share their ids are not taken over.
    renamed = [replace(u, fields={**u.fields, "text": "x"}) if u.id == other["id"] else u for u in utterances]
    found = decode_to_files(both, renamed, outs, progress=False)
    assert sorted(heard) == [(["a", "b"], 5), (["b"], 2)]
    for name in "ab":
        assert [r.text for r in found[name]] == [r.text for r in recognized(both, zoo, name)]
        assert [r.id for r in read_hypotheses(outs[name])] == [u.id for u in utterances]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jsonl", "a.jsonl.json", "b.jsonl", "b.jsonl.json"]


def test_a_folder_of_transcripts_knows_what_it_has(tmp_path):
    audio = tmp_path / "a.wav"
    audio.write_bytes(b"1")
    folder = Transcripts(tmp_path / "t", {"beam": 4})
    assert not folder.has("a.txt", audio)
    folder.write("a.txt", audio, "one\n")
    with open(tmp_path / "t" / INDEX, "a") as torn:
        torn.write("\nb.t")
    folder.write("c.txt", audio, "three\n")
    again = Transcripts(tmp_path / "t", {"beam": 4})
    assert again.has("a.txt", audio) and again.has("c.txt", audio) and not again.has("b.txt", audio)
    assert not Transcripts(tmp_path / "t", {"beam": 5}).has("a.txt", audio)
    (tmp_path / "t" / "c.txt").unlink()
    assert not again.has("c.txt", audio)
    os.utime(audio, (1, 1))
    assert not again.has("a.txt", audio), "the recording is another one now"


def test_decodings_that_do_not_fit_the_models_are_told_before_work(zoo, models, tmp_path):
    shutil.copytree(zoo["am"], tmp_path / "am")
    (tmp_path / "am" / PRIORS_FILE).unlink()
    foreign = replace(ingredients(zoo), unit_lm=str(zoo["llm"]))
    names = ("ctc-greedy", "rescore", "labelwise", "delayed-prior", "unit-rescore")
    misfits = Recognizer(models, str(tmp_path / "am"), {n: decoding_of(n, foreign) for n in names}).misfits()
    assert sorted(misfits) == ["delayed-prior", "labelwise"]
    assert "duolect prior" in misfits["delayed-prior"]
    assert f"{zoo['llm']} cannot be fused label-wise: its labels (BPE " in misfits["labelwise"] and "--unit-lm" in misfits["labelwise"]


def test_long_audio_is_cut_at_pauses_and_joined(zoo, models, tmp_path):
    rng = np.random.default_rng(3)
    pieces = [rng.normal(0, 0.2, 16000 * 4) for _ in range(12)]
    soundfile.write(tmp_path / "long.wav", np.concatenate(pieces), 16000)
    (utterance,) = open_source(tmp_path / "long.wav").utterances
    model, audio = models.acoustic(str(zoo["am"])), load_audio(utterance)
    heard = model.log_probs_of([audio])
    parts = _segments(0, audio, replace(heard, frames=heard.log_probs), model)
    assert len(parts) > 1 and all(part.frames is None for part in parts), "a decoder hears each part anew"
    recognizer = Recognizer(models, str(zoo["am"]), {"it": TimeSynchronous(3)}, word_times=True)
    (found,) = [r["it"] for r in recognizer.recognize([utterance], progress=False)]
    assert found.error is None
    assert found.fields["duration"] == pytest.approx(48.0)
    starts = [w["start"] for w in found.extra["words"]]
    assert starts == sorted(starts) and all(0 <= w["start"] <= w["end"] <= 48.05 for w in found.extra["words"])
    assert starts and starts[-1] > 30, "words behind the first segment carry the recording's time"
    assert " ".join(w["text"] for w in found.extra["words"]) == " ".join(found.text.split())


def test_words_of_an_aed_keep_their_spelling_at_the_times_of_the_ctc(zoo, models):
    model = models.acoustic(str(zoo["am"]))
    audio = np.random.default_rng(0).normal(0, 0.1, 48_000).astype(np.float32)
    segment = Segment(0, 10.0, audio, model.log_probs_of([audio]).log_probs[0])
    plain = "ab bab abba ba"
    timed = timed_words(Hypothesis(tuple(model.vocabulary.encode(plain)), plain, {}), segment, model)
    spelled = timed_words(Hypothesis((1, 2, 3), " Ab, bab-Abba \u2014 'ba!' \u042f", {}), segment, model)
    assert [w.text for w in spelled] == ["Ab,", "bab-Abba", "\u2014", "'ba!'", "\u042f"]
    assert [w.text for w in timed] == plain.split()
    joined = timed_words(Hypothesis((1, 2, 3), "Ab Bab, abba ba.", {}), segment, model)
    assert [(w.start, w.end, w.confidence) for w in joined] == [(w.start, w.end, w.confidence) for w in timed]
    assert [w.text for w in joined] == ["Ab", "Bab,", "abba", "ba."]
    assert spelled[2].start == spelled[2].end == spelled[1].end
    found = Recognized({"id": "u"}, (), extra={"words": [asdict(w) for w in joined]})
    assert "Ab Bab, abba ba." in written(found, "srt") and "Ab Bab, abba ba." in written(found, "vtt")
    assert [line.split()[4] for line in written(found, "ctm").splitlines()] == ["Ab", "Bab,", "abba", "ba."]


def test_words_last_as_long_as_they_take_to_say(zoo, models):
    """CTC is sure of each of these labels in one frame, and of blank in all others."""
    model = models.acoustic(str(zoo["am"]))
    vocabulary, step = model.vocabulary, model.seconds_per_frame
    labels = vocabulary.encode("abba ab ba")
    frames = [4 + 3 * i for i in range(len(labels))]
    log_probs = torch.full((100, vocabulary.size), 1e-4).log()
    log_probs[:, vocabulary.blank] = math.log(0.9)
    log_probs[frames, vocabulary.blank] = math.log(1e-4)
    log_probs[frames, labels] = math.log(0.9)
    segment = Segment(0, 1.0, np.zeros(round(100 * step * 16_000), np.float32), log_probs)
    found = timed_words(Hypothesis(tuple(labels), "abba ab ba", {}), segment, model)
    last = [i for i, y in enumerate(labels) if i + 1 == len(labels) or vocabulary.starts_word(labels[i + 1])]
    for word, following, end in zip(found, [*found[1:], None], last, strict=True):
        later = following.start if following else 1.0 + 100 * step
        spike = 1.0 + (frames[end] + 1) * step
        assert word.end == pytest.approx(max(spike, min(word.start + LETTER_SECONDS * len(word.text), later)))
        assert spike - 1e-9 <= word.end <= later + 1e-9


def test_words_that_do_not_fit_into_the_frames_share_them(zoo, models):
    model = models.acoustic(str(zoo["am"]))
    audio = np.zeros(3200, np.float32)
    segment = Segment(0, 5.0, audio, model.log_probs_of([audio]).log_probs[0])
    found = timed_words(Hypothesis((), " ".join(["Abba."] * 40), {}), segment, model)
    assert len(found) == 40 and found[0].start == 5.0 and found[-1].end == pytest.approx(5.2)
    assert all(w.confidence == 0 for w in found)


def test_a_recording_that_was_mended_says_so_in_its_line(zoo, models, tmp_path):
    mono = np.random.default_rng(0).normal(0, 0.1, 16000)
    soundfile.write(tmp_path / "a.wav", np.stack([mono, -mono], axis=1), 16000)
    recognizer = Recognizer(models, str(zoo["am"]), {"it": Greedy()})
    (found,) = recognizer.recognize(open_source(tmp_path / "a.wav").utterances, progress=False)
    assert "cancel each other" in found["it"].to_json()["warning"]


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
    with pytest.raises(PriorError, match="it has counts, sampled, softmax"):
        list(
            Recognizer(models, str(zoo["am"]), {"it": TimeSynchronous(2, {"p": Prior("nonsense", -0.1)})}).recognize(
                open_source(zoo["corpus"]).utterances, progress=False
            )
        )


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("ctc", {"beam": "0"}),
        ("delayed", {"collapse": "-1"}),
        ("ctc", {"label_floor": "-1"}),
        ("sllm", {"repeats": "1"}),
        ("sllm+ctc-label", {"proposals": "0"}),
        ("sllm+ctc-label", {"terms.ctc.keep_labels": "0"}),
        ("sllm-draft", {"labels_per_second": "0"}),
        ("sllm-draft", {"terms": "{}"}),
        ("sllm", {"terms": "{}"}),
    ],
)
def test_settings_that_make_no_sense_are_said_before_anything_is_loaded(zoo, name, changes):
    decoding = decoding_of(name, ingredients(zoo))
    with pytest.raises(ConfigError, match=r"makes no sense: give|give it"):
        with_overrides(decoding, changes)


@pytest.mark.parametrize(
    ("kind", "name", "expected"),
    [
        (
            "language",
            "whisper-base",
            "an attention encoder-decoder or speech LLM, expected a causal language model: name duolect-lm",
        ),
        ("language", "{am}", "is a CTC acoustic model, expected a causal language model"),
        ("attention", "smollm2-135m", "is a causal language model, expected an attention encoder-decoder or speech LLM: name whisper-base"),
        ("attention", "{llm}", "is a causal language model, expected an attention"),
        ("acoustic", "{unit}", "is a causal language model, expected a CTC acoustic model: name duolect-ctc"),
        ("language", "smolm2-135m", "did you mean smollm2-135m?"),
        ("acoustic", "xyz", r"no embedded model \(duolect-ctc, .*\), no folder, no hub id \(owner/name\)"),
    ],
)
def test_wrong_names_are_refused_before_anything_is_loaded_or_fetched(zoo, models, monkeypatch, kind, name, expected):
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda *x, **y: pytest.fail("asked the hub"))
    monkeypatch.setattr("duolect.models.embedded.pull", lambda name: pytest.fail("pulled"))
    with pytest.raises(ModelError, match=expected) as refused:
        getattr(models, kind)(name.format(**zoo))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", ["language", "attention", "acoustic"])
def test_a_hub_that_is_out_of_reach_is_said_at_once(models, monkeypatch, kind):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{revision}/{filename}")
    begin = time.monotonic()
    with pytest.raises(ModelError, match=r"owner/nothing: no folder here, and the hub does not give it \(.*\): check name and network"):
        getattr(models, kind)("owner/nothing")
    assert time.monotonic() - begin < 4


def test_a_hub_that_breaks_while_a_model_comes_is_a_line(zoo, monkeypatch):
    class Disconnected(Exception):
        """As HTTP clients have them: of no built-in kind."""

    def broken(*_, **__):
        raise Disconnected("server\ndisconnected")

    monkeypatch.setattr(CtcModel, "load", broken)
    with pytest.raises(ModelError, match=r"cannot be loaded \(Disconnected: server disconnected\): try again"):
        Models(say=lambda text: None).acoustic(str(zoo["am"]))


IN_STEP = {"every 3": Every(3), "word end": AtWordEnd(), "end": AtEnd()}


@pytest.mark.parametrize("when", IN_STEP)
@pytest.mark.parametrize("kind", ["softmax", "counts", "sampled", "llm"])
def test_a_prior_in_step_with_a_language_model_is_the_sum_over_its_labels(zoo, models, kind, when):
    """Whenever it is asked, in whichever vocabulary, with or without a prompt: nothing is held back, lost or counted twice at the end."""
    am, llm = str(zoo["am"]), str(zoo["llm"])
    vocabulary, table = models.acoustic(am).vocabulary, models.prior(am, kind, of=llm * (kind == "llm")).tolist()
    for prompt in ("", "ab ba"):
        of = {"of": llm, "prompted": bool(prompt)} if kind == "llm" else {"words": True}
        terms = {"llm": Language(llm, 0.5, IN_STEP[when], prompt), "prior": Prior(kind, -0.3, IN_STEP[when], **of)}
        if kind != "llm":
            terms["immediate"] = Prior(kind, -0.1)
        found = recognized(Recognizer(models, am, {"it": TimeSynchronous(4, terms)}), zoo, "it")
        assert sum(len(h.labels) for r in found for h in r.nbest) > 50, "the test means texts"
        for h in (h for r in found for h in r.nbest):
            if kind == "llm":
                labels = labels_of_text(models.vocabulary(llm), begun=bool(prompt))(h)
            else:
                labels = [y for y in h.labels if y not in (vocabulary.blank, vocabulary.eos)]
                assert h.parts["immediate"] == pytest.approx(h.parts["prior"], abs=1e-3)
            assert h.parts["prior"] == pytest.approx(sum(table[y] for y in labels), abs=1e-3)


def test_a_prior_of_a_language_model_needs_its_name(zoo, models):
    for term in (Prior("llm", -0.1), Prior("softmax", -0.1, of=str(zoo["llm"]))):
        with pytest.raises(SearchError, match="kind llm, and no other, names a language model in `of`"):
            term.load(models, str(zoo["am"]))
    Prior("llm", -0.1, of=str(zoo["llm"])).load(models, str(zoo["am"]))
    assert not any(key[0] == "language" for key in models._loaded), "a tokenizer is all that a prior needs of the model"


def test_a_uniform_prior_is_a_bonus_per_label(zoo, models, tmp_path):
    """It needs no file; its part is -log V for each label, so a negative scale makes hypotheses longer."""
    shutil.copytree(zoo["am"], tmp_path / "am")
    (tmp_path / "am" / PRIORS_FILE).unlink()
    vocabulary = models.acoustic(str(zoo["am"])).vocabulary
    lengths = []
    for scale in (-2.0, 2.0):
        decodings = {"it": TimeSynchronous(4, {"length": Prior("uniform", scale)})}
        recognizer = Recognizer(models, str(tmp_path / "am"), decodings)
        found = [r["it"].nbest for r in recognizer.recognize(open_source(zoo["corpus"]).utterances, progress=False)]
        for h in (h for nbest in found for h in nbest):
            spoken = sum(label != vocabulary.eos for label in h.labels)
            assert h.parts["length"] == pytest.approx(-np.log(vocabulary.size) * spoken, rel=1e-5)
        lengths.append(sum(len(nbest[0].labels) for nbest in found))
    assert lengths[0] > lengths[1]


def test_words_are_written_as_the_model_says_unless_the_term_does(zoo, models):
    name, loud = str(zoo["llm"]), WRITTEN["upper"]
    plain = Recognizer(models, str(zoo["am"]), {"it": TimeSynchronous(6, {"llm": Language(name, 0.4, AtEnd())})})
    asked = replace(plain, decodings={"it": TimeSynchronous(6, {"llm": Language(name, 0.4, AtEnd(), policy=loud)})})
    before, wanted = ([[dict(h.parts) for h in r.nbest] for r in recognized(x, zoo, "it")] for x in (plain, asked))
    models.language(name).written = "upper"
    assert [[dict(h.parts) for h in r.nbest] for r in recognized(plain, zoo, "it")] == wanted != before


def test_a_tokenizer_that_merges_across_spaces_rescores_whole_texts(zoo, models, tmp_path):
    merging = Tokenizer(BPE())
    merging.train_from_iterator([*TEXTS, "the cat sat"] * 5, BpeTrainer(vocab_size=60, special_tokens=["</s>"], show_progress=False))
    vocabulary = TokenizerVocabulary(PreTrainedTokenizerFast(tokenizer_object=merging, eos_token="</s>"))
    assert vocabulary.word_joint == "none"
    lm = tiny_lm("llama", vocabulary)
    lm.model.save_pretrained(tmp_path / "lm")
    vocabulary.save(tmp_path / "lm")
    fused = Recognizer(models, str(zoo["am"]), {"it": TimeSynchronous(4, {"llm": Language(str(tmp_path / "lm"), 0.4, AtEnd())})})
    with pytest.raises(SearchError, match=r"merges across spaces.*decode with --decoding ctc, then `duolect rescore --lm"):
        recognized(fused, zoo, "it")
    text = "ab abba ba"
    (found,) = rescored([[Hypothesis((), text, {})]], name="llm", scorer=lm, labels=labels_for(vocabulary, []))
    assert found[0].parts["llm"] == pytest.approx(lm_from_scratch(lm, vocabulary.encode(text)), abs=1e-4)


def test_free_memory_is_that_of_the_machine():
    assert 2**20 < free_memory("cpu") <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_an_nbest_list_has_each_text_once() -> None:
    found = [Hypothesis((y,), text, {"sllm": -float(y)}) for y, text in enumerate(("a b", "c", " a b", "c ", "d"))]
    assert [h.text for h in of_other_words(found)] == ["a b", "c", "d"]


def test_phrases_are_rewarded_only_where_ctc_is_heard() -> None:
    told = Ingredients(context={"abba": 1.0})
    rewarded = {name for name in PRESETS if "context" in decoding_of(name, told).terms}
    alone = {"ctc-greedy", "aed-greedy", "aed", "sllm-greedy", "sllm", "sllm-length", "sllm-draft"}
    assert rewarded == PRESETS.keys() - alone
