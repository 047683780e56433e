from __future__ import annotations

import json
from pathlib import Path

import pytest

import duolect.data.text as text_module
from duolect.data.text import HeldOut, TextError, TextLines, as_said

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


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("...to mute, or un-mute your party’s phone!", "to mute or un mute your party's phone"),
        ("Press 1, 'then' #. (a beep) <noise> [x]", "press one then"),
        ("dial 8500 or 28.8 & 1,234,567", "dial eight thousand five hundred or twenty eight point eight and one million two hundred "
         "thirty four thousand five hundred sixty seven"),
        ("0800 12345678: 100% of 90", "zero eight zero zero one two three four five six seven eight one hundred percent of ninety"),
        ("0, 13, 20.05", "zero thirteen twenty point zero five"),
        ("(10 seconds of silence)", ""),
    ],
)  # fmt: skip
def test_a_written_text_as_it_is_said(written: str, said: str) -> None:
    assert as_said(written) == said and as_said(said) == said


def test_what_is_tested_is_found_and_so_is_what_is_nearly() -> None:
    tested = HeldOut(["to lock or unlock the big conference", "has left the room", "thank you"], run=5)
    assert [tested.has(x) for x in ("has left the room", "thank you", "left the room")] == [True, True, False]
    near = ("or unlock the big conference now", "or unlock the big", "press one if he has left the room", "left the room")
    far = ("lock or unlock the conference", "the big", "thank you very much", "he left the house", "", "left the big room", "or the room")
    assert all(tested.near(x) for x in near) and not any(tested.near(x) for x in far)
