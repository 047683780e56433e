"""The commands as a user types them, in this process: results, files, exit codes, and one line for every mistake."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pytest
import soundfile

from duolect.cli import main
from duolect.scorer import read_hypotheses


@pytest.fixture
def duolect(monkeypatch, capsys):
    """Runs a command line; gives (exit code, standard output, standard error)."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["duolect", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        return end.value.code, out, err

    return run


@pytest.fixture
def with_models(zoo):
    return ["--am", zoo["am"], "--lm", zoo["llm"], "--unit-lm", zoo["unit"], "--device", "cpu"]


def test_transcribe_prints_and_writes(duolect, zoo, with_models, tmp_path):
    code, out, _ = duolect("transcribe", zoo["corpus"] / "u0.wav", *with_models)
    assert code == 0 and len(out.splitlines()) == 1
    code, many, _ = duolect("transcribe", zoo["corpus"], *with_models, "--out", tmp_path / "t", "--format", "srt")
    assert code == 0 and not many
    assert sorted(p.name for p in (tmp_path / "t").iterdir()) == [f"u{i}.srt" for i in range(7)]
    code, text, _ = duolect("transcribe", zoo["corpus"] / "u1.wav", zoo["corpus"] / "u0.wav", *with_models)
    assert code == 0 and text.splitlines()[1].split("\t") == ["u0", out.strip()]


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
    assert sorted(p.stem for p in (tmp_path / "hypotheses").iterdir()) == sorted(names)


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
        (["decode", "--data", "{corpus}", "--out", "{tmp}/x.jsonl", "--beam", "0"], "beam of 0"),
        (["decode", "--data", "{corpus}", "--out", "{tmp}/x.jsonl", "--decoding", "ctc", "--set", "beam"], "field=value"),
        (["decode", "--data", "{corpus}", "--out", "{tmp}/x.jsonl", "--decoding", "ctc", "--am", "{corpus}"], "config.json"),
        (["decode", "--data", "{corpus}", "--out", "{tmp}/x.jsonl", "--decoding", "delayed", "--lm", "{tmp}/nothing"], "nothing"),
        (["decode", "--data", "{corpus}", "--out", "{tmp}/x.jsonl", "--decoding", "labelwise", "--unit-lm", "{llm}"], "words"),
        (["decode", "--data", "{corpus}", "--out", "{tmp}/x.jsonl", "--decoding", "ctc", "--device", "cuda:7"], "cuda"),
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
    assert expected in err
    assert "Traceback" not in err


def test_doctor_and_models_list(duolect):
    code, out, _ = duolect("models", "list")
    assert code == 0 and "smollm2-135m" in out and "whisper-base" in out
    code, out, _ = duolect("doctor")
    assert "torch" in out and "problem" in out


def test_a_prior_is_estimated_and_stored(duolect, zoo, tmp_path):
    code, out, _ = duolect("prior", "--data", zoo["corpus"], "--am", zoo["am"], "--out", tmp_path)
    assert code == 0 and "softmax, counts" in out
    stored = json.loads((tmp_path / "priors.json").read_text())
    assert all(np.isfinite(stored["priors"][k]).all() for k in ("softmax", "counts"))
