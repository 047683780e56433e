from __future__ import annotations

import json
from pathlib import Path

import pytest

import duolect.data.text as text_module
from duolect.data.text import TextError, TextLines

TEXT = "the cat\n\n  \t\n\ufeffa  dog sät\r\nLAST"


@pytest.mark.parametrize("block", [1, 2, 3, 7, 1 << 24])
@pytest.mark.parametrize("text", [TEXT, TEXT + "\n", TEXT + "\n\n", "\n", "", "one", "\none\n two \n"])
def test_lines_equal_those_of_a_plain_reader(text: str, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "_BLOCK", block)
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    lines = TextLines(path)
    assert list(lines) == [" ".join(line.removeprefix("\ufeff").split()) for line in text.split("\n") if line.strip()]
    assert lines.sizes.tolist() == [len(line.encode()) for line in text.split("\n") if line.strip()]
    assert list(TextLines(path, case="upper")) == [line.upper() for line in lines]
    assert lines[1:] == list(lines)[1:]


def test_a_manifest(tmp_path: Path) -> None:
    manifest = tmp_path / "manifest.jsonl"
    texts = ["the  cat", "", None, "dogs"]
    manifest.write_text("".join(json.dumps({"audio_filepath": "a.wav", "text": x, "domain": "d"}) + "\n" for x in texts))
    assert list(TextLines(manifest)) == list(TextLines(tmp_path)) == ["the cat", "dogs"]
    assert TextLines(manifest).fields(1) == {"audio_filepath": "a.wav", "text": "dogs", "domain": "d"}


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    (tmp_path / "manifest.jsonl").write_text("[1]\n")
    (tmp_path / "latin.txt").write_bytes(b"abc\n\xe4")
    (tmp_path / "number.jsonl").write_text('{"text": 5}\n')
    for name, said in (
        ("manifest.jsonl", "no line of a manifest"),
        ("number.jsonl", "its text is 5, expected a string"),
        ("none.txt", "No such file"),
        ("latin.txt", "not UTF-8"),
    ):
        with pytest.raises(TextError, match=said):
            TextLines(tmp_path / name)
    (tmp_path / "a.txt").write_text("one")
    with pytest.raises(IndexError):
        TextLines(tmp_path / "a.txt")[1]
