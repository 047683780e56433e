from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from duolect.audio.io import AudioError, read_audio
from duolect.data.sources import SourceError, named, open_source, read_folder, read_librispeech, read_manifest
from duolect.data.utterance import Problem, load_audio, stored_bytes


def sound(path: Path, *, seconds: float = 0.5) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, 0.1 * np.ones(round(16000 * seconds)), 16000)
    return path


def manifest(folder: Path, *lines: dict[str, Any] | str | bytes, end: bytes = b"\n") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    raw = [line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode() for line in lines]
    path = folder / "manifest.jsonl"
    path.write_bytes(b"\n".join(raw) + end)
    return path


def test_manifest(tmp_path: Path) -> None:
    sound(tmp_path / "audio" / "b.flac")
    first = {"text": "ja gut ö", "id": "x", "audio_filepath": "audio/b.flac", "duration": 0.5, "speaker": "s1", "unknown": {"a": [1]}}
    source = read_manifest(manifest(tmp_path, first, "", "  ", {"audio_filepath": str(tmp_path / "audio" / "b.flac")}, end=b""))
    assert source.problems == ()
    one, two = source.utterances
    assert (one.id, one.seconds, one.text) == ("x", 0.5, "ja gut ö")
    assert list(one.fields) == list(first) and dict(one.fields) == first
    assert (two.id, two.seconds, two.text) == ("b", None, None) and two.fields["id"] == "b"
    for utterance in source.utterances:
        assert len(read_audio(utterance.audio)) == 8000


BAD_LINES: dict[str, tuple[dict[str, Any] | str | bytes, str]] = {
    "broken JSON": ('{"audio_filepath": "a.wav", ', "broken JSON (.*): expected one JSON object on the line"),
    "torn": ('{"audio_filepath": "a.w', "broken JSON"),
    "deep": ("[" * 100_000, "broken JSON"),
    "huge number": ('{"audio_filepath": "a.wav", "id": ' + "9" * 5000 + "}", "broken JSON"),
    "half a pair": ('{"audio_filepath": "a.wav", "text": "\\ud800"}', "broken JSON .*surrogates not allowed"),
    "no object": ("[1, 2]", "got a JSON list, expected an object with audio_filepath"),
    "null": ("null", "got a JSON NoneType, expected an object"),
    "text without audio": ({"id": "t", "text": "hello"}, "audio_filepath is missing: name the audio file, or remove the line"),
    "audio of wrong type": ({"audio_filepath": ["a.wav"]}, r"audio_filepath is \['a.wav'\], expected the path of a file"),
    "audio empty": ({"audio_filepath": " "}, "audio_filepath is ' ', expected the path of a file"),
    "null byte": ({"audio_filepath": "a\0.wav"}, "expected the path"),
    "folder itself": ({"audio_filepath": "."}, "expected the path of a file"),
    "folder by detour": ({"audio_filepath": "audio/.."}, "expected the path of a file"),
    "upwards": ({"audio_filepath": "../secret.wav"}, "leaves .*set, the manifest's folder: move it there, or write an absolute path"),
    "deep upwards": ({"audio_filepath": "audio/../../../etc/passwd"}, "the manifest's folder"),
    "link of file": ({"audio_filepath": "link.wav"}, "the manifest's folder"),
    "link of folder": ({"audio_filepath": "linked/secret.wav"}, "the manifest's folder"),
    "duration text": ({"audio_filepath": "a.wav", "duration": "3.2"}, "duration is '3.2', expected seconds > 0"),
    "duration bool": ({"audio_filepath": "a.wav", "duration": True}, "duration is True"),
    "duration zero": ({"audio_filepath": "a.wav", "duration": 0}, "duration is 0"),
    "duration negative": ({"audio_filepath": "a.wav", "duration": -1.5}, "duration is -1.5"),
    "duration NaN": ('{"audio_filepath": "a.wav", "duration": NaN}', "duration is nan"),
    "duration infinite": ('{"audio_filepath": "a.wav", "duration": Infinity}', "duration is inf"),
    "text number": ({"audio_filepath": "a.wav", "text": 7}, "text is 7, expected a string"),
    "text list": ({"audio_filepath": "a.wav", "text": ["word"] * 1000}, r"text is \['word'.*\.\.\., expected a string"),
    "id list": ({"audio_filepath": "a.wav", "id": []}, r"id is \[\], expected a string"),
    "id empty": ({"audio_filepath": "a.wav", "id": ""}, "id is '', expected a string"),
    "span text": ({"audio_filepath": "a.wav", "audio_bytes": "0-9"}, r"audio_bytes is '0-9', expected \[offset, size\] in bytes"),
    "span short": ({"audio_filepath": "a.wav", "audio_bytes": [512]}, "audio_bytes is"),
    "span of nothing": ({"audio_filepath": "a.wav", "audio_bytes": [0, 0]}, "audio_bytes is"),
    "span backwards": ({"audio_filepath": "a.wav", "audio_bytes": [-1, 10]}, "audio_bytes is"),
    "span float": ({"audio_filepath": "a.wav", "audio_bytes": [0.5, 10]}, "audio_bytes is"),
    "segment": ({"audio_filepath": "a.wav", "offset": 3.5, "duration": 1}, "offset is 3.5, and segments .* not supported: cut"),
    "same id": ({"audio_filepath": "a.wav", "id": "first"}, r"id 'first' was used before, in .*manifest.jsonl:1: give each line an id"),
    "latin-1": (b'{"audio_filepath": "a.wav", "text": "\xe4"}', "is not UTF-8"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_a_bad_line_is_a_problem_and_the_rest_goes_on(tmp_path: Path, case: str) -> None:
    folder, outside = tmp_path / "set", tmp_path / "outside"
    sound(outside / "secret.wav")
    sound(folder / "a.wav")
    (folder / "link.wav").symlink_to(outside / "secret.wav")
    (folder / "linked").symlink_to(outside)
    line, expected = BAD_LINES[case]
    path = manifest(folder, {"audio_filepath": "a.wav", "id": "first"}, line, {"audio_filepath": "a.wav", "id": "last"})
    source = read_manifest(path)
    assert [utterance.id for utterance in source.utterances] == ["first", "last"]
    (problem,) = source.problems
    assert problem.where == f"{path}:2"
    assert re.search(expected, problem.cause), problem.cause
    assert "\n" not in str(problem) and len(str(problem)) < 500


def test_missing_ids_come_from_the_file_names(tmp_path: Path) -> None:
    names = ["a/1.wav", "b/1.wav", "c/2.wav", "b/1.flac"]
    source = read_manifest(manifest(tmp_path, *({"audio_filepath": name} for name in names)))
    assert [utterance.id for utterance in source.utterances] == ["a/1", "b/1", "2"]
    assert "id 'b/1' was used before" in source.problems[0].cause
    assert source.utterances[0].fields == {"audio_filepath": "a/1.wav", "id": "a/1"}


def test_number_as_id_and_byte_order_mark(tmp_path: Path) -> None:
    path = manifest(tmp_path, {"audio_filepath": "a.wav", "id": 17})
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert [utterance.id for utterance in read_manifest(path).utterances] == ["17"]


def test_manifest_through_a_linked_folder(tmp_path: Path) -> None:
    sound(tmp_path / "real" / "a.wav")
    manifest(tmp_path / "real", {"audio_filepath": "a.wav"}, {"audio_filepath": "../real/a.wav", "id": "back"})
    (tmp_path / "alias").symlink_to(tmp_path / "real")
    assert len(read_manifest(tmp_path / "alias" / "manifest.jsonl").utterances) == 2


def test_audio_inside_a_file(tmp_path: Path) -> None:
    one, two = sound(tmp_path / "one.wav"), sound(tmp_path / "two.flac", seconds=0.7)
    start, size = one.stat().st_size, two.stat().st_size
    (tmp_path / "both.bin").write_bytes(one.read_bytes() + two.read_bytes())
    spans: list[Any] = [[0, start], [start, size], [start, size + 1], [2**80, 1], [0, 2**80]]
    source = read_manifest(manifest(tmp_path, *({"audio_filepath": "both.bin", "audio_bytes": span} for span in spans[:2])))
    assert [utterance.id for utterance in source.utterances] == ["both:0", f"both:{start}"]
    for utterance, path in zip(source.utterances, (one, two), strict=True):
        np.testing.assert_array_equal(load_audio(utterance), read_audio(path))
        assert stored_bytes(utterance) == path.read_bytes()
    lines = [{"audio_filepath": "both.bin", "audio_bytes": span, "id": "x"} for span in spans[2:]]
    for line in (*lines, {"audio_filepath": "none.bin", "audio_bytes": [0, 1], "id": "x"}):
        utterance = read_manifest(manifest(tmp_path, line)).utterances[0]
        with pytest.raises(AudioError, match=r"cut off or another file|No such file"):
            load_audio(utterance)
    whole = read_manifest(manifest(tmp_path, {"audio_filepath": "one.wav"})).utterances[0]
    np.testing.assert_array_equal(load_audio(whole), read_audio(one))
    assert stored_bytes(whole) == one.read_bytes()


@pytest.mark.parametrize("lines", [(), ("{",), ({"text": "a"},)])
def test_manifest_without_a_usable_line(tmp_path: Path, lines: tuple[Any, ...]) -> None:
    with pytest.raises(SourceError, match=r"manifest\.jsonl: no usable line: expected one JSON object a line"):
        read_manifest(manifest(tmp_path, *lines))


def test_folder(tmp_path: Path) -> None:
    for name in ("b.wav", "a.flac", "deep/er/c.ogg", ".hidden.wav", ".git/d.wav", "e.wav", "e.flac"):
        sound(tmp_path / name)
    (tmp_path / "b.txt").write_text(" Hello \n world \n")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xe4")
    (tmp_path / "broken.mp3").write_text("no mp3")
    (tmp_path / "notes.md").write_text("x")
    source = read_folder(tmp_path)
    assert [utterance.id for utterance in source.utterances] == ["b", "broken", "deep/er/c", "e.flac", "e.wav"]
    hello, broken = source.utterances[:2]
    assert (hello.text, hello.seconds) == ("Hello world", 0.5)
    assert hello.fields == {"id": "b", "audio_filepath": "b.wav", "duration": 0.5, "text": "Hello world"}
    assert broken.seconds is None and broken.text is None
    with pytest.raises(AudioError):
        read_audio(broken.audio)
    assert source.problems == (Problem(str(tmp_path / "a.txt"), "cannot be read (UnicodeDecodeError): save it as UTF-8, or remove it"),)


def librispeech(root: Path) -> Path:
    for speaker, chapter in (("84", "121"), ("84", "99"), ("1089", "7")):
        folder = root / "dev-clean" / speaker / chapter
        ids = [f"{speaker}-{chapter}-{n:04}" for n in range(2)]
        for id in ids:
            sound(folder / f"{id}.flac")
        (folder / f"{speaker}-{chapter}.trans.txt").write_text("".join(f"{id} HELLO IT'S {id[-1]}\n" for id in ids))
    return root


@pytest.mark.parametrize(("below", "count"), [("", 6), ("dev-clean", 6), ("dev-clean/84", 4), ("dev-clean/84/99", 2)])
def test_librispeech(tmp_path: Path, below: str, count: int) -> None:
    source = open_source(librispeech(tmp_path) / below)
    assert len(source.utterances) == count and source.problems == ()
    utterance = source.utterances[-1]
    assert utterance.text == "hello it's 1" and utterance.seconds == 0.5
    assert utterance.fields["speaker"] == utterance.id.split("-")[0]
    assert len({utterance.id for utterance in source.utterances}) == count
    assert all(utterance.audio.is_file() for utterance in source.utterances)


def test_librispeech_problems(tmp_path: Path) -> None:
    librispeech(tmp_path)
    folder = tmp_path / "dev-clean" / "84" / "99"
    (folder / "84-99-0000.flac").unlink()
    sound(folder / "84-99-0007.flac")
    with open(folder / "84-99.trans.txt", "a") as out:
        out.write("84-99-0009\n84-99-0001 AGAIN\n")
    source = read_librispeech(tmp_path)
    assert len(source.utterances) == 5
    assert [problem.where.removeprefix(str(folder)) for problem in source.problems] == [
        "/84-99.trans.txt:1", "/84-99.trans.txt:3", "/84-99.trans.txt:4", "/84-99-0007.flac"
    ]  # fmt: skip
    with pytest.raises(SourceError, match="no LibriSpeech utterance"):
        read_librispeech(folder.parent.parent.parent / "nowhere")


def test_open_source_looks_at_what_is_there(tmp_path: Path) -> None:
    audio = sound(tmp_path / "one" / "a.wav")
    odd = audio.rename(tmp_path / "one" / "recording")
    assert open_source(odd).utterances[0].id == "recording"
    audio = sound(tmp_path / "one" / "a.wav")
    audio.with_suffix(".txt").write_text("hello")
    assert [(u.id, u.text) for u in open_source(str(audio)).utterances] == [("a", "hello")]
    assert len(open_source(tmp_path / "one").utterances) == 1
    path = manifest(tmp_path / "one", {"audio_filepath": "a.wav", "id": "m"})
    assert [u.id for u in open_source(tmp_path / "one").utterances] == ["m"]
    assert [u.id for u in open_source(path.rename(path.with_name("list.txt"))).utterances] == ["m"]


@pytest.mark.parametrize("name", ["missing", "empty", "notes.md", "nothing.wav/x"])
def test_nothing_usable(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.md").write_text("some text")
    with pytest.raises(SourceError, match="expected") as caught:
        open_source(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)


def test_text_named_wav_fails_alone_when_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_text("no audio")
    source = open_source(tmp_path / "a.wav")
    assert source.utterances[0].seconds is None
    with pytest.raises(AudioError, match=r"a\.wav"):
        read_audio(source.utterances[0].audio)


def test_demo_set_that_comes_with_the_package() -> None:
    import duolect

    source = open_source(Path(duolect.__file__).parent / "embedded" / "demo")
    assert source.problems == () and len(source.utterances) >= 35
    assert sum(utterance.fields["domain"] != "prompts" for utterance in source.utterances) >= 20
    total = 0.0
    for utterance in source.utterances:
        seconds = len(read_audio(utterance.audio)) / 16000
        assert utterance.seconds == pytest.approx(seconds, abs=1e-3)
        assert utterance.text and re.fullmatch(r"[a-z']+( [a-z']+)*", utterance.text)
        assert {"speaker", "licence", "source"} <= utterance.fields.keys()
        total += seconds
    assert total < 240


def test_sources_have_short_names_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "v1.2").mkdir()
    monkeypatch.chdir(tmp_path / "v1.2")
    assert list(named(["dev/manifest.jsonl", "shared/data/other", "x/clean.jsonl", "a.txt"])) == ["dev", "other", "clean", "a"]
    assert named(["manifest.jsonl"]) == {"v1.2": "manifest.jsonl"} and named(["."]) == {"v1.2": "."}
    same = ["real/dev/manifest.jsonl", "synth/dev/manifest.jsonl", "dev-1"]
    assert list(named(same)) == same
