"""`duolect guard` as a user types it: policies, files, failures, and one line for every mistake."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from duolect.cli import main
from duolect.scorer import read_hypotheses

ENDLESS = "ab " * 400
"""More labels than any recording of the corpus has frames: suspect whatever a random model hears."""


@pytest.fixture
def hypotheses(zoo, tmp_path):
    """A folder with the corpus and `h.jsonl`: its references as transcripts of another system, but u1 and u4 never end."""
    shutil.copytree(zoo["corpus"], tmp_path / "corpus")
    lines = [json.loads(line) for line in (tmp_path / "corpus" / "manifest.jsonl").read_text().splitlines()]
    for line in lines:
        line["pred_text"] = line["text"].upper() + "." if line["id"] not in ("u1", "u4") else line["text"] + " " + ENDLESS.strip()
    write(tmp_path / "corpus" / "h.jsonl", lines)
    return tmp_path / "corpus" / "h.jsonl"


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def read(path):
    return {line["id"]: line for line in map(json.loads, path.read_text().splitlines())}


@pytest.fixture
def guard(duolect, zoo, tmp_path):
    """Runs `duolect guard` with the tiny acoustic model; gives (exit code, stdout, stderr, lines by id)."""

    def run(file, *options):
        out = tmp_path / "out.jsonl"
        out.unlink(missing_ok=True)
        code, said, err = duolect("guard", "--hypotheses", file, "--out", out, "--am", zoo["am"], "--device", "cpu", *options)
        return code, said, err, read(out) if out.is_file() else {}

    return run


def test_warn_says_and_changes_nothing(guard, hypotheses):
    code, said, err, found = guard(hypotheses)
    before = read(hypotheses)
    assert code == 0 and list(found) == list(before)
    for id, line in found.items():
        assert line["pred_text"] == before[id]["pred_text"] and "unguarded_text" not in line
        assert {k: v for k, v in line.items() if k in before[id]} == before[id]
        assert line["guard"]["action"] == ("warned" if line["guard"]["causes"] else "none")
    for id in ("u1", "u4"):
        verdict = found[id]["guard"]
        assert not verdict["fits"] and verdict["loop"]["repeats"] >= 400 and verdict["condemned"]
        assert {"word", "start", "end", "cause"} == set(verdict["suspect"][0])
    suspect = sum(bool(line["guard"]["causes"]) for line in found.values())
    assert f"{suspect} of 7 transcripts are suspect: " in said and f"{suspect} warned" in said
    assert err.count("WER") == 2 and "before: WER" in err and "after:  WER" in err


def test_truncate_cuts_and_keeps_the_old_text(guard, hypotheses):
    code, said, _, found = guard(hypotheses, "--policy", "truncate")
    assert code == 0 and "truncated" in said
    for id, line in found.items():
        cut = line["guard"]["action"] == "truncated"
        assert cut == ("unguarded_text" in line) and (id not in ("u1", "u4") or cut)
        if cut:
            kept, words = line["pred_text"].split(), line["unguarded_text"].split()
            assert words == read(hypotheses)[id]["pred_text"].split() and len(kept) < len(words)
            assert [h["text"] for h in line["nbest"]] == [line["pred_text"]]
    (parsed,) = (r for r in read_hypotheses(hypotheses.parent.parent / "out.jsonl") if r.id == "u1")
    assert parsed.text == found["u1"]["pred_text"]


def test_truncating_again_changes_nothing_and_keeps_the_first_text(guard, duolect, hypotheses, zoo, tmp_path):
    first = guard(hypotheses, "--policy", "truncate")[3]
    shutil.copy(tmp_path / "out.jsonl", hypotheses.parent / "again.jsonl")
    second = guard(hypotheses.parent / "again.jsonl", "--policy", "truncate")[3]
    for id in ("u1", "u4"):
        assert second[id]["unguarded_text"] == first[id]["unguarded_text"]


def test_ctc_and_rejoint_give_what_decode_gives(guard, duolect, hypotheses, zoo, with_models, tmp_path):
    decoded = {}
    for decoding in ("ctc-greedy", "ctc", "delayed"):
        out = tmp_path / f"{decoding}.jsonl"
        assert duolect("decode", "--data", zoo["corpus"], "--out", out, *with_models, "--decoding", decoding)[0] == 0
        decoded[decoding] = read(out)
    found = guard(hypotheses, "--policy", "ctc")[3]
    assert all(found[id]["pred_text"] == decoded["ctc-greedy"][id]["pred_text"] for id in ("u1", "u4"))
    assert all((line["guard"]["action"] == "replaced") == line["guard"]["condemned"] for line in found.values())
    for options, decoding in (([], "ctc"), (["--decoding", "delayed", *with_models[2:6]], "delayed")):
        code, said, _, found = guard(hypotheses, "--policy", "rejoint", *options)
        assert code == 0 and "rejoint" in said
        for id, line in found.items():
            again = bool(line["guard"]["causes"])
            assert line["guard"]["action"] == ("rejoint" if again else "none")
            assert line["pred_text"] == (decoded[decoding] if again else read(hypotheses))[id]["pred_text"]
            assert not again or "unguarded_text" not in line or line["nbest"] == decoded[decoding][id]["nbest"]
        assert found["u1"]["guard"]["action"] == "rejoint"


def test_off_copies(guard, hypotheses):
    code, _, err, found = guard(hypotheses, "--policy", "off")
    assert code == 0 and "loading" not in err
    assert all("guard" not in line and line["pred_text"] == read(hypotheses)[id]["pred_text"] for id, line in found.items())


def test_batches_change_nothing(guard, hypotheses):
    one = guard(hypotheses, "--policy", "truncate", "--batch-seconds", "0.1")[3]
    assert one == guard(hypotheses, "--policy", "truncate")[3]


def test_a_bad_file_stops_nothing(guard, hypotheses):
    lines = list(read(hypotheses).values())
    (hypotheses.parent / "u2.wav").write_bytes(b"not audio")
    (hypotheses.parent / "u3.wav").unlink()
    lines[5] = {k: v for k, v in lines[5].items() if k != "pred_text"}
    lines[6] = {**lines[6], "pred_text": "", "error": "out of memory"}
    lines.append({"id": "u7", "audio_filepath": "u0.wav", "nbest": [{"text": 3}]})
    lines.append({"id": "u8", "audio_filepath": "u0.wav", "nbest": [{"text": "ab " * 500, "labels": [], "parts": {}}]})
    write(hypotheses, lines)
    with open(hypotheses, "a") as file:
        file.write('{"id": "u9", broken\n')
    code, _, err, found = guard(hypotheses, "--policy", "truncate")
    assert code == 1 and "5 failed" in err and "Traceback" not in err
    failed = err[err.index("5 failed") :].splitlines()[1:]
    assert [any(part in line for line in failed) for part in ("u2.wav", "u3.wav", "u5: no transcript", "u7: ", "h.jsonl:10")] == [True] * 5
    assert list(found) == ["u0", "u1", "u2", "u3", "u4", "u6", "u8"]
    assert all("guard" not in found[id] and found[id]["pred_text"] == lines[i]["pred_text"] for i, id in ((2, "u2"), (3, "u3"), (6, "u6")))
    assert found["u6"]["error"] == "out of memory"
    assert all(found[id]["guard"]["action"] == "truncated" for id in ("u1", "u4", "u8"))


def test_data_says_where_the_audio_is(guard, hypotheses, zoo, tmp_path):
    moved = shutil.move(hypotheses, tmp_path / "moved.jsonl")
    code, _, err, found = guard(moved)
    assert code == 1 and "7 failed" in err and "--data" in err and all("guard" not in line for line in found.values())
    code, _, _, found = guard(moved, "--data", zoo["corpus"])
    assert code == 0 and all("guard" in line for line in found.values())


def test_lines_without_references_have_no_wer(guard, hypotheses):
    lines = [{k: line[k] for k in ("audio_filepath", "pred_text")} for line in read(hypotheses).values()]
    write(hypotheses, lines)
    code, said, err, found = guard(hypotheses, "--policy", "truncate")
    assert code == 0 and "WER" not in err and "truncated" in said
    assert found["u1"]["unguarded_text"].endswith("ab ab")


@pytest.mark.parametrize(
    ("words", "expected", "code"),
    [
        (["--hypotheses", "{tmp}/nowhere.jsonl", "--out", "{tmp}/x.jsonl"], "nowhere.jsonl", 1),
        (["--hypotheses", "{tmp}/empty.jsonl", "--out", "{tmp}/x.jsonl"], "no usable line", 1),
        (["--hypotheses", "{h}", "--out", "{tmp}"], "is a folder, expected a file", 2),
        (["--hypotheses", "{h}", "--out", "{tmp}/x.jsonl", "--data", "{tmp}/nowhere"], "nowhere", 1),
        (["--hypotheses", "{h}", "--out", "{tmp}/x.jsonl", "--policy", "rejoint", "--decoding", "nonsense"], "ctc-greedy", 2),
        (["--hypotheses", "{h}", "--out", "{tmp}/x.jsonl", "--policy", "mend"], "truncate", 2),
        (["--hypotheses", "{h}", "--out", "{tmp}/x.jsonl", "--am", "{tmp}/none"], "none", 2),
    ],
)
def test_each_mistake_is_said_and_nothing_is_written(duolect, zoo, hypotheses, tmp_path, words, expected, code):
    (tmp_path / "empty.jsonl").write_text("")
    filled = [word.format(tmp=tmp_path, h=hypotheses) for word in words]
    am = [] if "--am" in words else ["--am", zoo["am"]]
    got, out, err = duolect("guard", *filled, *am, "--device", "cpu")
    assert got == code and expected in out + err and "Traceback" not in err
    assert not (tmp_path / "x.jsonl").exists()


def test_the_help_has_an_example_of_options_it_knows(duolect, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = duolect("guard", "--help")
    assert code == 0 and "Example: duolect guard --hypotheses" in out and "--policy" in out and "--batch-seconds" in out


@pytest.mark.slow
def test_the_shipped_model_believes_the_demo_and_finds_what_is_invented(duolect, tmp_path):
    demo = Path(main.__code__.co_filename).parents[1] / "embedded" / "demo" / "manifest.jsonl"
    lines = [json.loads(line) for line in demo.read_text().splitlines()]
    invented = " and this sentence was never said in any of the recordings"
    for name, extra in (("right", ""), ("tail", invented), ("loop", " over and over" * 30)):
        write(tmp_path / f"{name}.jsonl", [{**line, "pred_text": line["text"] + extra} for line in lines])
        options = ["--hypotheses", tmp_path / f"{name}.jsonl", "--data", demo.parent, "--out", tmp_path / "out.jsonl", "--overwrite"]
        assert duolect("guard", *options, "--policy", "truncate", "--device", "cpu")[0] == 0
        found = read(tmp_path / "out.jsonl")
        suspect = sum(bool(line["guard"]["causes"]) for line in found.values())
        mended = sum(found[line["id"]]["pred_text"] == line["text"] for line in lines)
        assert (suspect <= 1 and mended >= len(lines) - 1) if name == "right" else (suspect == len(lines) and mended >= 0.9 * len(lines))
