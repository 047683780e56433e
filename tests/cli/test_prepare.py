"""`duolect prepare` and `duolect units` as a user types them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from duolect.vocabulary import load_vocabulary

SENTENCES = ("the cat sat on the mat", "the dog ate the cat's dinner", "another man and another woman sat on the other mat")


def corpus(folder: Path, *, utterances: int = 9, seconds: float = 0.3) -> Path:
    folder.mkdir()
    lines = []
    for n in range(utterances):
        soundfile.write(folder / f"{n}.flac", 0.1 * np.sin(0.01 * (n + 5) * np.arange(round(16000 * seconds))), 16000)
        lines.append({"id": f"u{n}", "audio_filepath": f"{n}.flac", "duration": seconds, "text": SENTENCES[n % 3], "licence": "CC0"})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_prepare_and_check(duolect: Any, tmp_path: Path) -> None:
    source, out = corpus(tmp_path / "in"), tmp_path / "new" / "out"
    code, said, err = duolect("prepare", source, "--out", out, "--workers", 1, "--shard", 4)
    assert code == 0 and said.startswith(f"{out}/manifest.jsonl: 0.00 h, 0.0 MB (")
    assert "9 utterances, about 0.0 h in 3 shards: about 0.0 MB as ogg, 0.0 MB as opus, 0.1 MB as flac" in err
    lines = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [f"u{n}" for n in range(9)] and lines[0]["licence"] == "CC0"
    assert duolect("prepare", "--check", out) == (0, f"{out}: all files are as they were written\n", "")
    (out / "audio-00001.tar").write_bytes(b"")
    code, said, _ = duolect("prepare", "--check", out)
    assert code == 1 and said.startswith(f"{out}/audio-00001.tar: has SHA-256 e3b0c44298fc, expected ")


def test_units_do_not_spoil_a_model(duolect: Any, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("\n".join(SENTENCES))
    command = ("units", tmp_path / "t.txt", "--size", 28, "--out", tmp_path / "u")
    assert duolect(*command)[0] == 0
    before = (tmp_path / "u" / "sentencepiece.model").read_bytes()
    code, _, err = duolect(*command[:3], 27, *command[4:])
    assert code == 2 and "holds a model or units already (vocabulary.json)" in err
    assert (tmp_path / "u" / "sentencepiece.model").read_bytes() == before


def test_synthesize_says_what_it_spoke(duolect: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.txt").write_text("a sentence of six words here\n" * 9)
    told: dict[str, Any] = {}

    def spoken(text: Path, out: Path, **options: Any) -> dict[str, float]:
        told.update(options, text=text, out=out)
        return {"flite_rms": 0.5, "piper_joe": 0.0}

    monkeypatch.setattr("duolect.recipes.synthesize.synthesize", spoken)
    command = ("synthesize", tmp_path / "t.txt", "--out", tmp_path / "s", "--hours", 0.5)
    code, said, _ = duolect(*command, "--voices", "flite_rms", "piper_joe")
    assert code == 0 and said == f"{tmp_path / 's'}/manifest.jsonl: flite_rms 0.50 h\n"
    assert told["voices"] == {"flite_rms": 1.0, "piper_joe": 1.0} and told["hours"] == 0.5
    assert "voice 'flite' is unknown, is flite_" in duolect(*command, "--voices", "flite")[2]
    assert "--hours 0: expected more than 0" in duolect(*command[:-1], 0)[2]


def test_failures_give_exit_code_one(duolect: Any, tmp_path: Path) -> None:
    source = corpus(tmp_path / "in")
    (source / "3.flac").write_text("no audio")
    code, _, err = duolect("prepare", source, "--out", tmp_path / "out", "--workers", 1)
    assert code == 2 and "1 of 9 utterances cannot be used (corrupt: 1), such as u3 (" in err and "more than 5% is not accepted" in err
    assert "accept a larger share with --max-failed" in err
    code, _, err = duolect("prepare", source, "--out", tmp_path / "out", "--workers", 1, "--max-failed", 0.2)
    assert code == 1 and f"  1 left out: corrupt; see {tmp_path}/out/skipped.jsonl" in err
    assert len((tmp_path / "out" / "manifest.jsonl").read_text().splitlines()) == 8


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "expected sources and --out FOLDER, or --check FOLDER"),
        (("IN",), "expected sources and --out FOLDER"),
        (("IN", "--out", "OUT", "--workers", "0"), "--workers 0: expected more than 0"),
        (("IN", "--out", "OUT", "--hours", "-1"), "--hours -1.0: expected more than 0"),
        (("NONE", "--out", "OUT"), "no such file or folder"),
        (("IN", "--out", "IN"), "is not empty and has no plan.json"),
        (("--check", "IN"), "is no prepared corpus"),
        (("NONE:large/train", "--out", "OUT"), "NONE:large/train: is no file, and cannot be reached on the hub"),
    ],
)
def test_mistakes_are_one_line(duolect: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], said: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # or it tries for half a minute
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    corpus(tmp_path / "IN")
    code, _, err = duolect("prepare", *words)
    assert code == 2 and said in err and len(err.splitlines()) == 1
    assert not (tmp_path / "OUT").exists()


def test_killed_with_its_workers_at_work_it_continues(duolect: Any, tmp_path: Path) -> None:
    source = corpus(tmp_path / "in", utterances=12, seconds=15.0)
    words = ["prepare", str(source), "--workers", "2", "--shard", "2", "--out"]
    running = subprocess.Popen(
        [sys.executable, "-c", "from duolect.cli import main; main()", *words, str(tmp_path / "killed")], stderr=subprocess.PIPE
    )
    parts: list[Path] = []
    while not parts or not (tmp_path / "killed" / "audio-00000.json").exists():  # some shards are whole, some are being written
        assert running.poll() is None, running.communicate()[1].decode()
        parts = list((tmp_path / "killed").glob("*.tar.*.part"))
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.wait()
    workers = {int(path.name.split(".")[-2]) for path in parts}
    assert not (tmp_path / "killed" / "manifest.jsonl").exists()
    for _ in range(500):  # workers end when they are orphans
        workers = {pid for pid in workers if Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"}
        if not workers:
            break
        time.sleep(0.02)
    assert not workers
    assert duolect(*words, tmp_path / "killed")[0] == duolect(*words, tmp_path / "whole")[0] == 0
    killed, whole = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("killed", "whole"))
    assert killed == whole and len(whole) == 6 * 2 + 4 and os.listdir(tmp_path / "killed")


def test_units(duolect: Any, tmp_path: Path) -> None:
    source = corpus(tmp_path / "in")
    code, out, _ = duolect("units", source, "--size", 28, "--out", tmp_path / "new" / "units")
    vocabulary = load_vocabulary(tmp_path / "new" / "units")
    assert code == 0 and f"28 pieces ({vocabulary.digest()}), " in out and "labels per word" in out
    assert vocabulary.size == 29 and vocabulary.decode(vocabulary.encode(SENTENCES[0])) == SENTENCES[0]
    (tmp_path / "text.txt").write_text("\n".join(SENTENCES))
    assert duolect("units", tmp_path / "text.txt", "--size", 28, "--case", "upper", "--out", tmp_path / "upper")[0] == 0
    code, _, err = duolect("units", tmp_path / "text.txt", "--size", 3000, "--out", tmp_path / "many")
    assert code == 2 and "3000 pieces cannot be made of 3 sentences" in err and len(err.splitlines()) == 1
