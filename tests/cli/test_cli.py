"""The commands as a user types them, in this process: results, files, exit codes, and one line for every mistake."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile
from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

from duolect.recognize.presets import PRESETS
from duolect.recognize.recognizer import Recognizer
from duolect.run import source
from duolect.scorer import read_hypotheses
from duolect.search.rescore import rescored
from duolect.vocabulary import load_vocabulary
from tests.arpa import write_arpa
from tests.hub import hub
from tests.models.test_ctc import hugging_face
from tests.recognize.conftest import TEXTS


def stopped_after(done, duolect, command, monkeypatch):
    """What a command gives that Ctrl-C stops when so many utterances are recognized."""
    recognize = Recognizer.recognize

    def interrupted(self, utterances, *, progress=True):
        for count, found in enumerate(recognize(self, utterances, progress=progress)):
            if count == done:
                raise KeyboardInterrupt
            yield found

    with monkeypatch.context() as patched:
        patched.setattr(Recognizer, "recognize", interrupted)
        return duolect(*command)


def test_transcribe_prints_and_writes(duolect, zoo, with_models, tmp_path):
    code, out, _ = duolect("transcribe", zoo["corpus"] / "u0.wav", *with_models)
    assert code == 0 and len(out.splitlines()) == 1
    code, many, _ = duolect("transcribe", zoo["corpus"], *with_models, "--out", tmp_path / "t", "--format", "srt")
    assert code == 0 and not many
    assert sorted(p.name for p in (tmp_path / "t").glob("[!.]*")) == [f"u{i}.srt" for i in range(7)]
    (tmp_path / "u0.txt").write_text("a reference")
    code, _, err = duolect("transcribe", zoo["corpus"], *with_models, "--out", tmp_path)
    assert code == 2 and "u0.txt is there and not by duolect" in err and (tmp_path / "u0.txt").read_text() == "a reference"
    code, text, _ = duolect("transcribe", zoo["corpus"] / "u1.wav", zoo["corpus"] / "u0.wav", *with_models)
    assert code == 0 and text.splitlines()[1].split("\t") == ["u0", out.strip()]


def test_transcribe_makes_no_file_twice(duolect, zoo, with_models, tmp_path, monkeypatch):
    command = ["transcribe", zoo["corpus"], zoo["corpus"] / "u0.wav", *with_models, "--out", tmp_path]
    code, _, err = stopped_after(3, duolect, command, monkeypatch)
    assert code == 130 and "the same command continues" in err
    assert len(list(tmp_path.glob("*.txt"))) == 3
    code, _, err = duolect(*command)
    assert code == 0 and "3 of 7 transcripts" in err
    assert sorted(p.name for p in tmp_path.glob("[!.]*")) == ["u0-2.txt", *(f"u{i}.txt" for i in range(7))]
    whole = {p.name: p.read_text() for p in tmp_path.glob("*.txt")}
    (tmp_path / "u3.txt").unlink()
    (tmp_path / "u4.txt").write_text("corrected by hand")
    code, _, err = duolect(*command)
    assert code == 0 and "6 of 7" in err and "1 of 1" in err
    assert {p.name: p.read_text() for p in tmp_path.glob("*.txt")} == {**whole, "u4.txt": "corrected by hand"}
    code, _, err = duolect(*command, "--beam", "2")
    assert code == 0 and "already" not in err, "another setting makes all files anew"


def test_what_cannot_continue_does_not_say_it_would(duolect, zoo, with_models, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("duolect.recognize.models.Models.language", stopped)
    code, _, err = duolect("transcribe", zoo["corpus"] / "u0.wav", *with_models)
    assert code == 130 and err.endswith("duolect: stopped\n")


def test_several_recordings_on_standard_output(duolect, zoo, with_models):
    for form in ("srt", "vtt"):
        code, out, err = duolect("transcribe", zoo["corpus"], *with_models, "--format", form)
        assert code == 2 and not out and f"7 recordings in one {form} file" in err and "--out" in err
    code, out, _ = duolect("transcribe", zoo["corpus"], *with_models, "--format", "json")
    assert code == 0 and [json.loads(line)["id"] for line in out.splitlines()] == [f"u{i}" for i in range(7)]


def test_audio_that_was_mended_is_listed_at_the_end(duolect, zoo, with_models, tmp_path):
    mono = np.random.default_rng(0).normal(0, 0.1, 16000)
    soundfile.write(tmp_path / "a.wav", np.stack([mono, -mono], axis=1), 16000)
    code, _, err = duolect("transcribe", tmp_path / "a.wav", *with_models)
    assert code == 0 and err.splitlines()[-1].startswith(f"warning: {tmp_path / 'a.wav'}: its channels cancel")


def test_the_decoding_is_chosen_by_what_fits(duolect, zoo, tmp_path):
    fitting = ["--am", zoo["am"], "--lm", zoo["llm"], "--unit-lm", zoo["unit"], "--device", "cpu"]
    _, _, err = duolect("transcribe", zoo["corpus"] / "u0.wav", *fitting)
    assert "scales unit+llm" in err
    other = ["--am", zoo["am"], "--lm", zoo["llm"], "--unit-lm", zoo["llm"], "--device", "cpu"]
    code, out, err = duolect("transcribe", zoo["corpus"] / "u0.wav", *other)
    assert code == 0 and out and "scales llm:" in err


def test_decode_rescore_tune_score_make_a_chain(duolect, zoo, with_models, tmp_path):
    code, _, err = duolect(
        "decode", "--data", zoo["corpus"], "--out", tmp_path / "a.jsonl", *with_models, "--decoding", "ctc", "--nbest", "5"
    )
    assert code == 0 and "WER" in err
    code, _, _ = duolect(
        "rescore", "--hypotheses", tmp_path / "a.jsonl", "--out", tmp_path / "b.jsonl", "--lm", zoo["llm"], "--device", "cpu"
    )
    assert code == 0
    code, out, _ = duolect("tune", "--hypotheses", tmp_path / "b.jsonl", "--out", tmp_path / "scales" / "llm.json")
    assert code == 0 and "cross-validated" in out
    assert json.loads((tmp_path / "scales" / "llm.json").read_text())["scales"]["ctc"] == 1.0
    assert all({"ctc", "llm"} == set(h.parts) for r in read_hypotheses(tmp_path / "b.jsonl") for h in r.nbest)
    code, out, _ = duolect("score", tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--errors", "1", "--json", tmp_path / "s.json")
    assert code == 0 and "REF:" in out and "norm:whisper-english" in out
    assert json.loads((tmp_path / "s.json").read_text())
    code, _, err = duolect(
        "decode",
        "--data",
        zoo["corpus"],
        "--out",
        tmp_path / "c.jsonl",
        *with_models,
        "--decoding",
        "delayed",
        "--scales",
        tmp_path / "scales",
        "--set",
        "beam=3",
    )
    assert code == 0 and "tuned on" in err


def test_rescore_continues_where_it_was_killed(duolect, zoo, with_models, tmp_path, monkeypatch):
    a, straight, killed = (tmp_path / name for name in ("a.jsonl", "straight.jsonl", "killed.jsonl"))
    assert duolect("decode", "--data", zoo["corpus"], "--out", a, *with_models, "--decoding", "ctc", "--nbest", "5")[0] == 0
    command = ["rescore", "--hypotheses", a, "--lm", zoo["llm"], "--device", "cpu", "--batch", "2", "--scale", "0.5"]
    assert duolect(*command, "--out", straight)[0] == 0
    batches: list[int] = []

    def dying(lists, **more):
        batches.append(len(lists))
        if len(batches) == 3:
            raise KeyboardInterrupt
        return rescored(lists, **more)

    with monkeypatch.context() as patched:
        patched.setattr("duolect.search.rescore.rescored", dying)
        code, _, err = duolect(*command, "--out", killed)
        assert code == 130 and "the same command continues" in err
        part = tmp_path / "killed.jsonl.part"
        assert not killed.exists() and timeless(part) == timeless(straight)[:4]
        part.write_text(part.read_text()[:-20])  # the fourth line is torn, so the second batch is not whole
        for other in (["--scale", "0.6"], ["--prompt", "ab"], ["--name", "other"], ["--lm", zoo["unit"]], ["--precision", "bfloat16"]):
            code, _, err = duolect(*command, "--out", killed, *other)
            assert code == 2 and "an unfinished run of other settings: " in err and len(err.splitlines()) == 1 + ("ranking" in err)
        text = a.read_text()
        a.write_text(text.replace('"labels": [', '"labels": [0, ', 1))
        code, _, err = duolect(*command, "--out", killed)
        assert code == 2 and "rescored.llm.of" in err, "other hypotheses by the same name"
        a.write_text(text)
        code, _, err = duolect(*command, "--out", killed)
        assert code == 0 and "2 of 7 utterances are done" in err and batches[3:] == [2, 2, 1]
    assert timeless(killed) == timeless(straight) and Path(f"{killed}.json").read_text() == Path(f"{straight}.json").read_text()
    assert not list(tmp_path.glob("*.part*"))
    assert all(new.seconds > old.seconds for new, old in zip(read_hypotheses(straight), read_hypotheses(a), strict=True)), "the LM's too"
    before = straight.read_bytes()
    code, _, err = duolect(*command, "--out", straight)
    assert code == 0 and "finished already" in err and straight.read_bytes() == before
    assert duolect(*command[:-1], "0.6", "--out", straight)[0] == 2 and straight.read_bytes() == before
    assert duolect(*command[:-1], "0.6", "--out", straight, "--overwrite")[0] == 0 and straight.read_bytes() != before
    code, _, err = duolect(*command, "--out", a)
    assert code == 2 and "is what is to be read" in err and a.read_text() == text


def timeless(hypotheses):
    return [replace(line, seconds=0.0) for line in read_hypotheses(hypotheses)]


def test_the_alignment_shown_is_the_one_that_was_counted(duolect, tmp_path):
    line = {"id": "a", "text": "the white paper is here", "pred_text": "the whitepaper was here"}
    (tmp_path / "h.jsonl").write_text(json.dumps(line) + "\n")
    marks = {}
    for compounds in ("apart", "merged"):
        code, out, _ = duolect("score", tmp_path / "h.jsonl", "--errors", "1", "--compounds", compounds)
        assert code == 0
        marks[compounds] = out.splitlines()[-1].split()
    assert sorted(marks["apart"]) == ["D", "S", "S"] and marks["merged"] == ["S"]


def test_scales_tuned_on_the_very_corpus_are_warned_of(duolect, zoo, with_models, tmp_path, monkeypatch):
    monkeypatch.chdir(zoo["corpus"])
    data = ["--data", "manifest.jsonl", *with_models]
    code, _, err = duolect("decode", *data, "--out", tmp_path / "a.jsonl", "--decoding", "ctc", "--nbest", "5")
    assert code == 0 and "|corpus:corpus|" in err, "a bare file name has a folder, too"
    llm = ["--lm", zoo["llm"], "--device", "cpu"]
    assert duolect("rescore", "--hypotheses", tmp_path / "a.jsonl", "--out", tmp_path / "b.jsonl", *llm)[0] == 0
    scales = tmp_path / "scales" / "llm.json"
    assert duolect("tune", "--hypotheses", tmp_path / "b.jsonl", "--out", scales)[0] == 0
    warning = "warning: llm.json: the scales were tuned on these same 7 utterances"
    code, _, err = duolect("decode", *data, "--out", tmp_path / "c.jsonl", "--decoding", "delayed", "--scales", scales.parent)
    assert code == 0 and warning in err
    code, _, err = duolect("rescore", "--hypotheses", tmp_path / "a.jsonl", "--out", tmp_path / "d.jsonl", *llm, "--scales", scales)
    assert code == 0 and warning in err
    tuned = json.loads(scales.read_text())["scales"]
    for line in read_hypotheses(tmp_path / "d.jsonl"):
        assert [h.score(tuned) for h in line.nbest] == sorted((h.score(tuned) for h in line.nbest), reverse=True)
    again = ["rescore", "--hypotheses", tmp_path / "a.jsonl", "--out", tmp_path / "e.jsonl", *llm, "--name", "other", "--scales", scales]
    code, _, err = duolect(*again)
    assert code == 2 and "has a scale for llm, the hypotheses only ctc" in err


def test_decode_can_be_repeated_to_the_bit(duolect, zoo, with_models, tmp_path):
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path in files:
        assert duolect("decode", "--data", zoo["corpus"], "--out", path, *with_models, "--decoding", "labelwise-delayed")[0] == 0
    a, b = ([r.nbest for r in read_hypotheses(path)] for path in files)
    assert a == b


def test_compare_writes_a_table_of_all_that_was_asked(duolect, zoo, with_models, tmp_path):
    names = ["ctc-greedy", "ctc", "rescore", "delayed-prior", "labelwise"]
    code, out, _ = duolect(
        "compare", "--data", zoo["corpus"], *with_models, "--decodings", *names, "--out", tmp_path, "--nbest", "4", "--beam", "3"
    )
    assert code == 0
    assert "CTC greedy" in out and "label-wise" in out
    assert (tmp_path / "table.md").read_text().count("\n| ") >= len(names)
    table = json.loads((tmp_path / "table.json").read_text())
    assert table["env"]
    assert sorted(p.stem for p in (tmp_path / "hypotheses").glob("*.jsonl")) == sorted(names)


def test_compare_continues_and_leaves_out_what_does_not_fit(duolect, zoo, tmp_path, monkeypatch):
    shutil.copytree(zoo["am"], tmp_path / "am")
    (tmp_path / "am" / "priors.safetensors").unlink()
    foreign = ["--am", tmp_path / "am", "--lm", zoo["llm"], "--unit-lm", zoo["llm"], "--device", "cpu", "--beam", "3", "--nbest", "3"]
    command = ["compare", "--data", zoo["corpus"], *foreign, "--speech-llm", zoo["sllm"], "--out", tmp_path / "out"]
    names = {name: preset for name, preset in PRESETS.items() if "aed" not in name}
    monkeypatch.setattr("duolect.recognize.presets.PRESETS", names)
    code, _, err = stopped_after(2, duolect, command, monkeypatch)
    assert code == 130 and "the same command continues" in err
    code, out, err = duolect(*command)
    assert code == 0 and "2 of 7 utterances are done" in err
    assert err.count("left out: CTC + unit LM - prior, label-wise: ") == 1 and "left out: " not in out, "said once"
    assert "its labels (BPE " in err and "--unit-lm" in err and "EveryLabel" not in err
    table = (tmp_path / "out" / "table.md").read_text()
    assert "\n- left out: CTC + unit LM, label-wise: " in table and "| CTC + LLM, delayed to word ends |" in table
    assert "delayed-prior" in json.loads((tmp_path / "out" / "table.json").read_text())["left_out"]
    assert not list((tmp_path / "out" / "hypotheses").glob("*.part*"))
    code, _, err = duolect(*command, "--decodings", "ctc-greedy", "delayed-prior")
    assert code == 2 and "duolect prior" in err, "what was named is not left out"


def test_a_corpus_with_bad_lines_goes_on_and_ends_with_1(duolect, zoo, with_models, tmp_path):
    shutil.copytree(zoo["corpus"], tmp_path / "corpus")
    (tmp_path / "corpus" / "u2.wav").write_bytes(b"not audio")
    nan = np.full(8000, np.nan, dtype=np.float32)
    soundfile.write(tmp_path / "corpus" / "u3.wav", nan, 16000, subtype="FLOAT")
    soundfile.write(tmp_path / "corpus" / "u4.wav", np.random.default_rng(0).normal(0, 0.1, (24000, 8)), 48000)
    lines = (tmp_path / "corpus" / "manifest.jsonl").read_text().splitlines()
    lines[5] = "{broken"
    lines[6] = json.dumps({"audio_filepath": "../../etc/passwd", "text": "x"})
    (tmp_path / "corpus" / "manifest.jsonl").write_text("\n".join(lines))
    code, _, err = duolect(
        "decode", "--data", tmp_path / "corpus" / "manifest.jsonl", "--out", tmp_path / "o.jsonl", *with_models, "--decoding", "ctc"
    )
    assert code == 1
    assert "4 failed" in err and "manifest.jsonl:6" in err and "manifest.jsonl:7" in err and "u2" in err and "u3" in err
    found = {r.id: r for r in read_hypotheses(tmp_path / "o.jsonl")}
    assert sorted(found) == ["u0", "u1", "u2", "u3", "u4"]
    assert [k for k, r in found.items() if r.error] == ["u2", "u3"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["transcribe", "{corpus}/nowhere.wav"], "nowhere.wav"),
        (["decode", "--data", "{corpus}", "--out", "{tmp}/x.jsonl", "--decoding", "nonsense"], "ctc-greedy"),
        (["decode", "--data", "{corpus}", "--out", "{tmp}/x.jsonl", "--beam", "0"], "--beam 0: expected 1 or more"),
        (["decode", "--data", "{corpus}", "--out", "{tmp}/x.jsonl", "--interval", "0"], "--interval 0: expected 1 or more"),
        (["decode", "--data", "{corpus}", "--out", "{tmp}/x.jsonl", "--batch-seconds", "0"], "--batch-seconds 0: expected more than 0"),
        (["decode", "--data", "{corpus}", "--out", "{tmp}/x.jsonl", "--lm", "no.arpa"], "--lm no.arpa: there is no such file"),
        (["decode", "--data", "{corpus}", "--out", "{tmp}/x.jsonl", "--context", "no.txt"], "--context no.txt: there is no such file"),
        (["decode", "--data", "{corpus}", "--out", "{tmp}/x.jsonl", "--context", "{tmp}/no"], "--context {tmp}/no: there is no such file"),
        (["decode", "--data", "{corpus}", "--out", "{tmp}/x.jsonl", "--decoding", "ctc", "--set", "beam"], "field=value"),
        (["decode", "--data", "{corpus}", "--out", "{tmp}/x.jsonl", "--decoding", "ctc", "--am", "{corpus}"], "config.json"),
        (["decode", "--data", "{corpus}", "--out", "{tmp}/x.jsonl", "--decoding", "delayed", "--lm", "{tmp}/nothing"], "nothing"),
        (
            ["decode", "--data", "{corpus}", "--out", "{tmp}/x.jsonl", "--decoding", "labelwise", "--unit-lm", "{llm}"],
            "that has them with --unit-lm",
        ),
        (["decode", "--data", "{corpus}", "--out", "{tmp}/x.jsonl", "--decoding", "ctc", "--device", "cuda:7"], "cuda"),
        (["decode", "--data", "{corpus}", "--out", "{tmp}", "--decoding", "ctc"], "--out {tmp}: is a folder, expected a file"),
        (["decode", "--data", "{corpus}", "--out", "{tmp}/plain.jsonl/x", "--decoding", "ctc"], "{tmp}/plain.jsonl is no folder"),
        (["decode", "--data", "{corpus}", "--out", "{tmp}/x.jsonl", "--decoding", "ctc", "--keep", "0"], "--keep 0: expected 1 or more"),
        (["decode", "--data", "{corpus}", "--out", "{tmp}/x.jsonl", "--decoding", "ctc", "--keep", "-1"], "--keep -1: expected 1 or more"),
        (["decode", "--data", "{corpus}", "--out", "{tmp}/x.jsonl", "--decoding", "delayed", "--lm", "whisper-base"], "smollm2-135m"),
        (["transcribe", "{corpus}/u0.wav", "--out", "{tmp}/plain.jsonl"], "is a file, expected a folder"),
        (["compare", "--data", "{corpus}", "--out", "{tmp}/plain.jsonl"], "is a file, expected a folder"),
        (["compare", "--data", "{corpus}", "--out", "{tmp}/c", "--limit", "0"], "--limit 0: expected 1 or more"),
        (["compare", "--data", "{corpus}", "--out", "{tmp}/c", "--limit", "-1"], "--limit -1: expected 1 or more"),
        (["prior", "--data", "{corpus}", "--am", "{am}", "--limit", "0"], "--limit 0: expected 1 or more"),
        (["prior", "--data", "{corpus}", "--am", "{am}", "--out", "{tmp}/plain.jsonl"], "is a file, expected a folder"),
        (["tune", "--hypotheses", "{tmp}/plain.jsonl", "--out", "{tmp}"], "is a folder, expected a file"),
        (["rescore", "--hypotheses", "{tmp}/plain.jsonl", "--out", "{tmp}"], "is a folder, expected a file"),
        (["rescore", "--hypotheses", "{tmp}/plain.jsonl", "--out", "{tmp}/x.jsonl", "--batch", "0"], "--batch 0: expected 1 or more"),
        (["score", "{tmp}/plain.jsonl", "--json", "{tmp}"], "is a folder, expected a file"),
        (["score", "{tmp}/plain.jsonl", "--errors", "-1"], "--errors -1: expected 0 or more"),
        (["score", "{tmp}/nowhere.jsonl"], "nowhere.jsonl"),
        (["tune", "--hypotheses", "{tmp}/plain.jsonl"], "rescore"),
        (["tune", "--hypotheses", "{tmp}/plain.jsonl", "--parts", "llm"], "llm"),
        (["rescore", "--hypotheses", "{tmp}/broken.jsonl", "--out", "{tmp}/x.jsonl", "--lm", "{llm}"], "broken.jsonl:1"),
    ],
)
def test_each_mistake_is_one_line_that_says_what_to_do(duolect, zoo, with_models, tmp_path, words, expected):
    plain = {"id": "a", "text": "ab", "pred_text": "ab", "nbest": [{"text": "ab", "labels": [1], "parts": {"ctc": -1.0}}]}
    (tmp_path / "plain.jsonl").write_text(json.dumps(plain) + "\n")
    (tmp_path / "broken.jsonl").write_text("{broken\n")
    filled = [w.format(tmp=tmp_path, **{k: str(v) for k, v in zoo.items()}) for w in words]
    extra = with_models if words[0] in ("decode", "transcribe") and not {"--am", "--lm", "--unit-lm", "--device"} & set(words) else []
    if words[0] == "decode" and not extra:
        given = {filled[i] for i in range(len(filled)) if filled[i].startswith("--")}
        extra = [x for k, v in zip(with_models[::2], with_models[1::2], strict=True) if k not in given for x in (k, v)]
    code, _, err = duolect(*filled, *extra)
    assert code in (1, 2)
    assert expected.format(tmp=tmp_path) in err
    assert "Traceback" not in err
    if any(said in expected for said in ("expected a f", "or more", "more than 0", "no such file", "ctc-greedy")):
        assert "loading" not in err, "said before any work"


@pytest.mark.parametrize("command", ["transcribe", "decode", "rescore", "compare", "tune", "score", "explain", "prior", "models"])
def test_the_help_of_a_command_has_an_example_of_options_it_knows(duolect, command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = duolect(command, "--help")
    plain = re.sub(r"\x1b\[[0-9;]*m", "", out)
    example = re.search(rf"Example: duolect {command} (.*)", plain)
    assert code == 0 and example
    assert all(f"{option} " in plain.replace(example[0], "") for option in re.findall(r"--[\w-]+", example[1]))


@pytest.mark.parametrize("words", [[], ["lm"]])
def test_a_bare_command_prints_its_help(duolect, words):
    code, out, err = duolect(*words)
    assert code == 0 and "train" in out and not err


def test_the_version_and_no_bars_of_transformers():
    code = "from transformers.utils import logging as x; print(x.is_progress_bar_enabled(), x.get_verbosity() == x.ERROR)"
    command = f"import sys; from duolect.cli import main\nsys.argv[1:] = ['--version']\ntry: main()\nexcept SystemExit: {code}"
    said = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True).stdout.splitlines()
    assert said == [f"duolect {source()}", "False True"]


def test_doctor_and_models_list(duolect):
    code, out, _ = duolect("models", "list")
    assert code == 0 and "smollm2-135m" in out and "whisper-base" in out
    code, out, _ = duolect("doctor")
    assert "torch" in out and "problem" in out


def test_a_speech_llm_recognizes_by_its_folder_alone(duolect, zoo, tmp_path):
    audio, one = zoo["corpus"] / "u0.wav", ["--device", "cpu", "--model", zoo["sllm"]]
    code, out, err = duolect("transcribe", audio, *one)
    assert code == 0 and len(out.splitlines()) == 1 and "scales sllm" in err
    outs = {}
    for decoding in ("sllm-greedy", "sllm-draft"):
        code, _, _ = duolect("decode", "--data", zoo["corpus"], "--out", tmp_path / f"{decoding}.jsonl", "--decoding", decoding, *one)
        assert code == 0
        outs[decoding] = [line.text for line in read_hypotheses(tmp_path / f"{decoding}.jsonl")]
    assert outs["sllm-greedy"] == outs["sllm-draft"]
    # The same folder without audio is a language model, and can rescore what it heard.
    parts = ["--hypotheses", tmp_path / "sllm-greedy.jsonl", "--out", tmp_path / "lm.jsonl", "--lm", zoo["sllm"], "--name", "lm"]
    assert duolect("rescore", *parts, "--device", "cpu")[0] == 0
    assert all("lm" in h.parts for line in read_hypotheses(tmp_path / "lm.jsonl") for h in line.nbest)


@pytest.mark.slow
def test_two_models_of_the_hub_by_their_names(zoo, tmp_path):
    """Any CTC model and any LM, by the real clients over HTTP from a hub on this machine; then without it, from their cache."""
    hugging_face(tmp_path / "models" / "owner" / "hear", Wav2Vec2Config, Wav2Vec2ForCTC, "layer")
    shutil.copytree(zoo["llm"], tmp_path / "models" / "owner" / "speak")
    load_vocabulary(zoo["llm"]).tokenizer.save_pretrained(tmp_path / "models" / "owner" / "speak")
    command = [sys.executable, "-m", "duolect", "transcribe", zoo["corpus"] / "u0.wav", "--format", "json", "--lm", "owner/speak", "--am"]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}

    def run(am, address):
        return subprocess.run([*map(str, command), am], env={**environment, "HF_ENDPOINT": address}, capture_output=True, text=True)

    with hub(tmp_path) as address:
        first = run("owner/hear", address)
        assert first.returncode == 0, first.stderr
        assert {"ctc", "llm"} == set(json.loads(first.stdout)["nbest"][0]["parts"])
        wrong = run("owner/heer", address)
        assert wrong.returncode == 2 and "owner/heer: no folder here, and the hub does not give it" in wrong.stderr
    again = run("owner/hear", address)
    assert again.returncode == 0 and json.loads(again.stdout)["nbest"] == json.loads(first.stdout)["nbest"], again.stderr


def test_what_a_speech_llm_needs_is_said(duolect, zoo, tmp_path):
    audio = zoo["corpus"] / "u0.wav"
    code, _, err = duolect("transcribe", audio, "--model", zoo["am"], "--aed", zoo["sllm"], "--decoding", "aed", "--device", "cpu")
    assert code == 0 and err.count(f"aed: {zoo['sllm']}, as {zoo['am']} is none (--aed names another)") == 1
    code, _, err = duolect("transcribe", audio, "--model", zoo["llm"], "--device", "cpu")
    assert code == 2 and "expected ctc, aed or speech_llm" in err
    code, _, err = duolect("transcribe", audio, "--speech-llm", zoo["am"], "--am", zoo["am"], "--decoding", "sllm", "--device", "cpu")
    assert code == 2 and "is a CTC acoustic model, expected an attention encoder-decoder or speech LLM" in err


FUSED = [
    ("delayed", "delayed every 20 frames"),
    ("rescore", "n-best rescoring"),
    ("word-end", "delayed to word ends"),
    ("shortest", "delayed until the shortest hypothesis has 4 more labels"),
    ("auto", "delayed every 20 frames"),
]


@pytest.mark.parametrize(("fusion", "when"), FUSED)
def test_any_language_model_is_joined_in_one_line_that_is_explained(duolect, zoo, with_models, fusion, when):
    code, out, err = duolect("transcribe", zoo["corpus"] / "u0.wav", *with_models, "--fusion", fusion)
    assert code == 0 and out
    size = load_vocabulary(zoo["am"]).size - 1
    assert f"fusion: {when}; {zoo['llm']} reads words (BPE " in err and f") of {zoo['am']} (SentencePiece {size})" in err
    assert "prior: none (`duolect prior`" in err


def test_language_models_together_each_by_its_labels(duolect, zoo, with_models, tmp_path):
    alone = [*with_models[:2], *with_models[4:]]
    data = ["decode", "--data", zoo["corpus"], *alone]
    both = [*data, "--lm", zoo["unit"], "--lm", zoo["llm"], "--fusion", "auto", "--out", tmp_path / "a.jsonl"]
    code, _, err = duolect(*both)
    assert code == 0 and "scales llm: llm 0.3, llm2 0.3 (not tuned" in err and "writes llm+llm2.json" in err
    assert f"fusion: label-wise; {zoo['unit']} reads the labels of" in err and f"fusion: delayed every 20 frames; {zoo['llm']} reads" in err
    assert {frozenset(h.parts) for r in read_hypotheses(tmp_path / "a.jsonl") for h in r.nbest} == {frozenset({"ctc", "llm", "llm2"})}
    (tmp_path / "llm+llm2.json").write_text(json.dumps({"scales": {"ctc": 1.0, "llm": 0.1, "llm2": 0.2}}))
    code, _, err = duolect(*both[:-1], tmp_path / "b.jsonl", "--scales", tmp_path, "--set", "terms.llm2.scale=0.25")
    assert code == 0 and "llm 0.1, llm2 0.2, ctc 1 (tuned on" in err
    code, _, err = duolect("transcribe", *alone, "--lm", zoo["unit"], "--lm", zoo["llm"], zoo["corpus"] / "u0.wav")
    assert code == 0 and "scales llm: llm 0.3, llm2 0.3" in err, "whoever names several means these"
    # Label-wise fusion of one in the same labels is what the unit LM's preset does.
    for out, how in (("c", ["--fusion", "labelwise", "--lm", zoo["unit"]]), ("d", ["--decoding", "labelwise"])):
        assert duolect(*data, *how, "--out", tmp_path / f"{out}.jsonl")[0] == 0
    c, d = ([[h.score({p: 1.0 for p in h.parts}) for h in r.nbest] for r in read_hypotheses(tmp_path / f"{x}.jsonl")] for x in "cd")
    assert c == d


def test_pairs_that_cannot_be_fused_say_what_can(duolect, zoo, with_models):
    audio = zoo["corpus"] / "u0.wav"
    code, _, err = duolect("transcribe", audio, *with_models, "--fusion", "labelwise")
    assert code == 2 and "cannot be fused label-wise: its labels (BPE " in err and "--fusion delayed, word-end" in err
    code, _, err = duolect("transcribe", audio, *with_models, "--fusion", "delayed", "--decoding", "ctc")
    assert code == 2 and "name one of the two" in err


def test_the_prior_that_is_used_is_said(duolect, zoo, with_models):
    _, _, err = duolect("transcribe", zoo["corpus"] / "u0.wav", *with_models, "--decoding", "delayed-prior")
    assert f"prior: softmax of {zoo['am']}, scale -0.2" in err and "prior: none" not in err
    _, _, err = duolect("transcribe", zoo["corpus"] / "u0.wav", *with_models, "--decoding", "ctc")
    assert "prior:" not in err and "fusion:" not in err


@pytest.mark.parametrize("units", ["words", "labels"])
def test_an_ngram_works_wherever_a_language_model_does(duolect, zoo, with_models, tmp_path, units):
    pytest.importorskip("kenlm")
    vocabulary = load_vocabulary(zoo["am"])
    sentences = [t.split() if units == "words" else [vocabulary.piece(y) for y in vocabulary.encode(t)] for t in TEXTS * 3]
    lm = ["--lm", write_arpa(tmp_path / "lm.arpa", sentences)]
    alone = [*with_models[:2], *with_models[4:]]
    data = ["--data", zoo["corpus"], *alone, *lm, "--nbest", "6"]
    code, _, err = duolect("decode", *data, "--fusion", "rescore", "--out", tmp_path / "a.jsonl")
    assert code == 0 and ("reads words (3-gram) of" if units == "words" else "reads the labels of") in err
    assert duolect("decode", *data, "--decoding", "ctc", "--out", tmp_path / "ctc.jsonl")[0] == 0
    am = ["--am", zoo["am"]] if units == "labels" else []
    code, _, _ = duolect("rescore", "--hypotheses", tmp_path / "ctc.jsonl", "--out", tmp_path / "b.jsonl", *lm, *am, "--scale", "0.4")
    assert code == 0
    a, b = ([{h.labels: round(h.parts["llm"], 3) for h in r.nbest} for r in read_hypotheses(tmp_path / f"{x}.jsonl")] for x in "ab")
    assert [x.keys() for x in a] == [x.keys() for x in b]
    for x, y in zip(a, b, strict=True):
        assert x == pytest.approx(y, abs=2e-3), "rescoring in the search and of the file are one"
    text = ["--fusion", "labelwise"] if units == "labels" else ["--fusion", "delayed"]
    assert duolect("transcribe", zoo["corpus"] / "u0.wav", *alone, *lm, *text)[0] == 0
    (tmp_path / "d.json").write_text(
        json.dumps(
            {"type": "TimeSynchronous", "terms": {"llm": {"type": "Language", "model": str(lm[1]), "oov": 2.0, "when": {"type": "AtEnd"}}}}
        )
    )
    out = ["--decodings", "ctc", "rescore", tmp_path / "d.json", "--out", tmp_path / "table"]
    assert duolect("compare", *data, *out)[0] == 0


def test_context_phrases_are_rewarded_in_any_search(duolect, zoo, with_models, tmp_path):
    (tmp_path / "words.txt").write_text("bab aa\t2.0\n\nabba\n")
    data = ["decode", "--data", zoo["corpus"], *with_models, "--decoding", "ctc"]
    code, _, _ = duolect(
        *data, "--out", tmp_path / "a.jsonl", "--context", tmp_path / "words.txt", "--context", "bb", "--context-scale", "3"
    )
    assert code == 0
    for line in read_hypotheses(tmp_path / "a.jsonl"):
        for h in line.nbest:
            words = h.text.split()
            wanted = 2.0 * 5 * sum(p == ("bab", "aa") for p in pairwise(words)) + 4 * words.count("abba") + 2 * words.count("bb")
            assert h.parts["context"] == pytest.approx(wanted, abs=1e-4)
        assert [h.parts["ctc"] + 3 * h.parts["context"] for h in line.nbest] == sorted(
            (h.parts["ctc"] + 3 * h.parts["context"] for h in line.nbest), reverse=True
        )
    assert sum(line.nbest[0].parts["context"] > 0 for line in read_hypotheses(tmp_path / "a.jsonl")) > 2
    code, _, err = duolect(*data[:-1], "ctc-greedy", "--out", tmp_path / "b.jsonl", "--context", "Krige")
    assert code == 0 and "--context does nothing in ctc-greedy" in err
    told = ["--speech-llm", zoo["sllm"], "--context", "abba"]
    code, _, err = duolect(*data[:-1], "sllm-draft", "--out", tmp_path / "e.jsonl", *told)
    assert code == 0 and "--context does nothing in sllm-draft" in err
    config = json.loads((zoo["sllm"] / "config.json").read_text())
    shutil.copytree(zoo["sllm"], tmp_path / "told")
    (tmp_path / "told" / "config.json").write_text(json.dumps({**config, "dims": {**config["dims"], "before": "ab {context}"}}))
    code, _, err = duolect(*data[:-1], "sllm-draft", "--out", tmp_path / "f.jsonl", "--speech-llm", tmp_path / "told", *told[2:])
    assert code == 0 and "--context does nothing" not in err
    code, _, err = duolect(*data, "--out", tmp_path / "c.jsonl", "--context", "Krige")
    assert code == 0 and "never writes some letters of these phrases: krige" in err
    for weight in ("much", "nan", "inf"):
        (tmp_path / "words.txt").write_text(f"abba\t{weight}\n")
        code, _, err = duolect(*data, "--out", tmp_path / "d.jsonl", "--context", tmp_path / "words.txt")
        assert code == 2 and f"words.txt:1: {weight!r} is no weight" in err


def test_explain_knows_what_made_the_file(duolect, zoo, with_models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = ["--data", zoo["corpus"], *with_models]
    assert duolect("decode", *out, "--out", "a.jsonl", "--decoding", "labelwise", "--beam", "4")[0] == 0
    assert (
        duolect("rescore", "--hypotheses", "a.jsonl", "--out", "b.jsonl", "--lm", zoo["llm"], "--device", "cpu", "--scale", "0.5")[0] == 0
    )
    (tmp_path / "flat.json").write_text('{"scales": {"ctc": 1.0, "unit": 0.0, "llm": 2.0}}')
    lines = {r.id: r for r in read_hypotheses(tmp_path / "b.jsonl")}
    where = ["--data", zoo["corpus"] / "manifest.jsonl", "--device", "cpu", "--json", "x.json"]
    for id, line in lines.items():
        for options, scales in (([], {"ctc": 1.0, "unit": 1.0, "llm": 0.5}), (["--scales", "flat.json"], {"ctc": 1.0, "llm": 2.0})):
            code, shown, err = duolect("explain", "b.jsonl", id, *where, *options)
            found = json.loads((tmp_path / "x.json").read_text())
            ranked = sorted((h.score(scales) for h in line.nbest), reverse=True)
            assert code == 0 and f"{id}: score = 1 ctc" in shown and found["verdict"] in shown, err
            assert found["difference"] == pytest.approx(ranked[0] - ranked[1], abs=2e-3)
            assert sum(sum(row["difference"].values()) for row in found["rows"]) == pytest.approx(found["difference"], abs=1e-4)
            assert not any("do not fit" in note or "(whole)" in note for note in found["notes"]), "the file says by which model"
    code, shown, _ = duolect("explain", "b.jsonl", "u0", *where, "--against", "reference", "--all")
    assert code == 0 and "B (the reference): ab abba" in shown and "in the list" in shown
    code, shown, _ = duolect("explain", "b.jsonl", "u0", *where, "--against", lines["u0"].nbest[2].text)
    assert code == 0 and "B (rank 3): " in shown
    assert duolect("rescore", "--hypotheses", "a.jsonl", "--out", "n.jsonl", "--lm", zoo["llm"], "--device", "cpu")[0] == 0
    code, shown, _ = duolect("explain", "n.jsonl", "u0", *where)
    assert code == 0 and "score = 1 ctc +0.4 unit;" in shown and "llm: scale 0 or none in this ranking (rescored without" in shown
    shutil.copy("b.jsonl", "c.jsonl")
    named = ["--decoding", "labelwise", *with_models[:2], *with_models[4:]]
    code, shown, _ = duolect("explain", "c.jsonl", "u0", *where, *named)
    assert code == 0 and "(whole)" in shown and "llm: no part of the decoding" in shown
    code, shown, _ = duolect("explain", "c.jsonl", "u0", *where, *named, "--lm", zoo["llm"])
    assert code == 0 and "(whole)" not in shown and "llm A" in shown
    mistakes = [
        (["b.jsonl", "u10"], "no line has id 'u10', is u1 meant?"),
        (["b.jsonl", "u0", "--against", "99"], "--against 99: u0 has 4 hypotheses: name a rank from 2 to 4"),
        (["b.jsonl", "u0", "--against", "1"], "name a rank from 2 to 4"),
        (["b.jsonl", "u0", "--against", lines["u0"].nbest[0].text, *where], "that is the best hypothesis itself"),
        (["b.jsonl", "u0"], "u0.wav: is not there; if the paths of b.jsonl start elsewhere, name the manifest with --data"),
        (["c.jsonl", "u0", *where], "c.jsonl.json, which says what made c.jsonl, is not there: name it with --decoding"),
        (["b.jsonl", "u0", "--scales", "nowhere.json"], "--scales nowhere.json: expected a scales file"),
        (["b.jsonl", "u0", "--name", "unit", *where], "--name unit: expected a part that the decoding does not know: llm"),
        (["nowhere.jsonl", "u0"], "nowhere.jsonl"),
        (["b.jsonl", "u0", "--decoding", "ctc-gredy", *where], "there is no decoding 'ctc-gredy', is ctc-greedy meant?"),
    ]
    for words, expected in mistakes:
        code, _, err = duolect("explain", *words)
        assert code == 2 and expected in err and "Traceback" not in err, words
        assert "loading" not in err or "best hypothesis itself" in expected or "--name" in words, "said before models are loaded"
    assert "for `duolect explain` also one of them" in " ".join(duolect("explain", "--help")[1].replace("│", "").split())


def test_tune_says_what_parts_of_a_corpus_gain_and_what_is_wrong(duolect, tmp_path):
    def line(i, **fields):
        nbest = [
            {"text": t, "labels": [], "parts": {"ctc": c, "llm": m}} for t, c, m in (("ab b", -1.0, -9.0 + i), ("ab a", -2.0, -3.0 - i))
        ]
        return {"id": f"u{i}", "text": "ab a" if i % 3 else "ab b", "nbest": nbest, **fields}

    def written(*lines):
        (tmp_path / "h.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
        return ["tune", "--hypotheses", tmp_path / "h.jsonl"]

    good = written(*(line(i, domain="xy"[i % 2]) for i in range(12)), line(12), {"id": "bad", "text": "a", "error": "corrupt"})
    code, out, err = duolect(*good, "--by", "domain", "--out", tmp_path / "s.json", "--plot", tmp_path / "s.png", "--search", "grid")
    assert code == 0 and "held out: common" in out and "|tune:grid|" in out and (tmp_path / "s.png").stat().st_size > 1000
    assert list(json.loads((tmp_path / "s.json").read_text())["by"]["domain"]) == ["other", "x", "y"]
    assert "warning: 1 of 14 utterances have no hypothesis" in err
    for options, expected in [
        (["--by", "speaker"], "--by speaker: no line of"),
        (["--folds", "1"], "--folds 1: expected 2 or more"),
        (["--draws", "0"], "--draws 0: expected 1 or more"),
        (["--largest", "0"], "--largest 0: expected a number above 0"),
        (["--largest", "nan"], "--largest nan: expected a number above 0"),
        (["--parts", "ctc", "llm"], "--parts ctc: its scale is fixed to 1"),
        (["--reference", "aed"], "have no part aed, only ctc, llm"),
    ]:
        code, _, err = duolect(*good, *options)
        assert code == 2 and expected in err
    for lines, expected in [
        ([], "has no line: expected"),
        ([{"id": "a", "text": "a", "nbest": []}], "no line has pred_text or nbest"),
        ([{"id": "a", "text": "a", "pred_text": "a"}], "no hypothesis has parts"),
        ([line(0), {**line(1), "text": None}], "utterance u1 has no reference"),
        ([line(0), {**line(1), "nbest": [{"text": "a", "parts": {"ctc": -1.0}}]}], "utterance u1, hypothesis 1: no part 'llm'"),
        ([line(0), {**line(1), "nbest": [{"text": "a", "parts": {"ctc": -1.0, "llm": float("nan")}}]}], "part 'llm' is nan"),
        ([{**line(0), "text": ""}], "no reference has a word"),
    ]:
        code, _, err = duolect(*written(*lines))
        assert code == 2 and expected in err, (expected, err)


def test_a_file_that_is_not_there_is_named(duolect, tmp_path):
    code, out, err = duolect("score", tmp_path / "none.jsonl")
    assert (code, out, err) == (2, "", f"duolect: {tmp_path / 'none.jsonl'}: No such file or directory: check the path and its rights\n")


def test_settings_are_said_together_or_one_by_one(duolect):
    code, shown, _ = duolect("train", "tiny", "--show", "--set", "training.log_every=3", "training.save_every=7", "--set", "units.size=9")
    made = json.loads(shown)
    assert code == 0 and (made["training"]["log_every"], made["training"]["save_every"], made["units"]["size"]) == (3, 7, 9)


def test_a_corpus_is_not_written_over(duolect, zoo, with_models, tmp_path):
    shutil.copytree(zoo["corpus"], tmp_path / "corpus")
    manifest = next((tmp_path / "corpus").glob("*.jsonl"))
    before = manifest.read_bytes()
    code, _, errors = duolect("decode", "--data", manifest, "--out", manifest, *with_models, "--decoding", "ctc-greedy")
    assert code != 0 and "is what is to be read" in errors and manifest.read_bytes() == before


@pytest.mark.parametrize("command", [["score"], ["tune", "--hypotheses"], ["rescore", "--out", "{tmp}/o.jsonl", "--hypotheses"]])
def test_files_that_are_no_hypotheses_are_refused(duolect, tmp_path, command):
    good = '{"id": "a", "text": "a b", "pred_text": "a b", "nbest": [{"text": "a b", "parts": {"ctc": -1.0}}]}\n'
    for content, expected in [
        (b"", "has no line"),
        (b"\x00\xff\xfe binary\n", "h.jsonl:1: not a hypotheses line (UnicodeDecodeError"),
        (good.encode() * 2, "1 ids stand in several lines, such as a"),
        (b'{"id": "a", "text": "a", "pred_text": 5}\n', "h.jsonl:1: not a hypotheses line (TypeError: pred_text is 5"),
        (b'{"id": "a", "text": "a", "nbest": [{"text": null}]}\n', "a text of nbest is none"),
        (b'{"id": "a", "text": "a", "audio_filepath": "a.wav"}\n', "no line has pred_text or nbest"),
    ]:
        (tmp_path / "h.jsonl").write_bytes(content)
        code, _, err = duolect(*(word.format(tmp=tmp_path) for word in command), tmp_path / "h.jsonl")
        assert code == 2 and expected in err and "Traceback" not in err, err
    assert [p.name for p in tmp_path.iterdir()] == ["h.jsonl"]


def test_score_says_what_is_torn_few_or_of_others(duolect, tmp_path):
    line = '{"id": "%s", "text": "a b", "pred_text": "a c"}\n'
    (tmp_path / "h.jsonl").write_bytes(b"\xef\xbb\xbf" + (line % "a" + line % "b" + line % "c").encode()[:-20])
    code, out, err = duolect("score", tmp_path / "h.jsonl")
    assert code == 0 and "h.jsonl:3: the last line is torn" in err and "|utts:2|" in out and "fewer than 20 utterances" in out
    (tmp_path / "many.jsonl").write_text("".join(line % i for i in range(20)))
    code, out, err = duolect("score", tmp_path / "many.jsonl")
    assert code == 0 and "fewer than 20" not in out and not err
    code, _, err = duolect("score", tmp_path / "many.jsonl", tmp_path / "h.jsonl")
    assert code == 2 and "many and h were not scored on the same utterances: 20 only in many (0, 1, 2, ...), 2 only in h (a, b)" in err
    before = (tmp_path / "h.jsonl").read_bytes()
    assert duolect("score", tmp_path / "h.jsonl", "--json", tmp_path / "h.jsonl")[0] == 2 and (tmp_path / "h.jsonl").read_bytes() == before


def test_what_a_file_holds_is_known_or_refused(duolect, zoo, with_models, tmp_path):
    out = tmp_path / "a.jsonl"
    command = ["decode", "--data", zoo["corpus"], "--out", out, *with_models, "--decoding", "ctc"]
    assert duolect(*command, "--limit", "3")[0] == 0 and len(list(read_hypotheses(out))) == 3
    assert "3 of 7 utterances are done" in duolect(*command)[2] and len(list(read_hypotheses(out))) == 7
    for options in (["score", out, "--json"], ["tune", "--hypotheses", out, "--out"]):
        for name, expected in (("a.jsonl.json", "is where a hypotheses file keeps"), ("m.jsonl", "expected a name that ends in .json")):
            code, _, err = duolect(*options, tmp_path / name)
            assert code == 2 and expected in err
    # Of another system's file that guard wrote in its place, nobody says it is CTC's.
    lines = [
        {"id": line.id, "audio_filepath": str(zoo["corpus"] / f"{line.id}.wav"), "text": "a", "pred_text": "ab"}
        for line in read_hypotheses(out)
    ]
    (tmp_path / "other.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    guarded = ["guard", "--hypotheses", tmp_path / "other.jsonl", "--out", out, "--am", zoo["am"], "--device", "cpu"]
    assert duolect(*guarded)[0] == 2 and duolect(*guarded, "--overwrite")[0] == 0
    code, _, err = duolect(*command)
    assert code == 2 and "results of other settings" in err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--decoding", "delayed", "--set", "terms.llm.scale=inf"], "the scale of llm is inf"),
        (["--device", "foo"], "--device foo: expected auto, cpu, cuda"),
        (["--context", "{corpus}/u0.wav"], "u0.wav: is not UTF-8: expected a text with a phrase a line"),
    ],
)
def test_more_mistakes_get_one_line(duolect, zoo, with_models, tmp_path, words, expected):
    models = with_models[:-2] if "--device" in words else with_models
    filled = [word.format(corpus=zoo["corpus"]) for word in words]
    code, _, err = duolect("decode", "--data", zoo["corpus"], "--out", tmp_path / "x.jsonl", *models, *filled)
    assert code == 2 and expected in err and "Traceback" not in err


def test_a_speech_llm_that_is_named_is_used(duolect, zoo, with_models):
    code, _, err = duolect("transcribe", zoo["corpus"] / "u0.wav", *with_models, "--speech-llm", zoo["sllm"])
    assert code == 0 and "scales sllm" in err
