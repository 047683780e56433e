"""`duolect report` as a user types it."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile


@pytest.fixture
def report(zoo: dict[str, Path], duolect):
    """Runs `duolect report attention` on the model and the first recording of the zoo; gives (exit code, stdout, stderr)."""

    def run(*words: object, model: Path = zoo["sllm"], audio: Path = zoo["corpus"] / "u0.wav") -> tuple[Any, str, str]:
        return duolect("report", "attention", "--model", model, "--audio", audio, "--device", "cpu", *words)

    return run


def test_report_draws_chosen_heads(report, tmp_path: Path) -> None:
    out = tmp_path / "new" / "maps.png"
    code, said, _ = report("--text", "Ab, abba!", "--heads", "2:1", "1:2", "--out", out)
    assert code == 0 and str(out) in said and "2:1 1:2" in said
    assert out.read_bytes().startswith(b"\x89PNG")
    written = json.loads(Path(f"{out}.json").read_text())
    assert written["text"] == "ab abba" and written["heads"] == ["2:1", "1:2"]
    for name in ("audio", "audio_but_first", "own_word"):
        share = np.array(written["share_by_layer_and_head"][name])
        assert share.shape == (2, 2) and (share >= 0).all() and (share <= 1).all()


def test_report_recognizes_itself_and_chooses_heads(report, zoo: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "maps.png"
    assert report("--out", out)[0] == 0
    written = json.loads(Path(f"{out}.json").read_text())
    share = np.array(written["share_by_layer_and_head"]["audio_but_first"])
    assert [share[tuple(int(n) - 1 for n in head.split(":"))] for head in written["heads"]] == sorted(share.ravel(), reverse=True)[:3]
    assert report("--out", tmp_path / "none.png", "--text", "")[0] == 0, "a transcript without words has maps too"


def test_mistakes_get_one_line(report, zoo: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / "long.wav"
    soundfile.write(long, np.zeros(16000 * 31, np.float32), 16000)
    for words, places, expected in (
        (["--heads", "3:1"], {}, "--heads 3:1: there is none"),
        (["--heads", "1:1", "2:0"], {}, "layers 1 to 2 of heads 1 to 2"),
        (["--heads", "seven"], {}, "--heads seven: expected layer:head"),
        ([], {"model": zoo["am"]}, "is a model of type ctc, expected speech_llm"),
        ([], {"model": tmp_path}, "is no model folder"),
        ([], {"audio": tmp_path / "none.wav"}, "none.wav"),
        ([], {"audio": long}, "31.0 s of audio are longer than the 30 s"),
        (["--out", tmp_path], {}, "is a folder"),
    ):
        code, _, err = report(*words, **places)
        assert code == 2 and expected in err and "Traceback" not in err, err
    plain = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return plain(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    code, _, err = report(model=tmp_path)
    assert code == 2 and "pip install 'duolect[plots]'" in err, "said before anything is loaded"
