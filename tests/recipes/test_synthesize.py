"""The spoken corpus: the same whatever the kills and workers, honest about what it left out. No engine is needed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from duolect.data.prepare import PrepareError
from duolect.recipes.synthesize import SPEEDS, SynthesisError, Voice, open_voice, plan, synthesize

SENTENCES = [f"{'word ' * (1 + number % 9)}{number}" for number in range(40)]
VOICES = {"sine_low": 0.7, "sine_high": 0.3}
ALL = 100.0  # hours: more than the sentences give


class Sine(Voice):
    """A tone of 0.1 s per word; `spoken` notes every text since the run began."""

    licence = "CC0-1.0"
    spoken: list[str] = []  # noqa: RUF012 - shared by all voices on purpose

    def __init__(self, hertz: float) -> None:
        self._hertz = hertz

    def speak(self, text: str) -> np.ndarray:
        self.spoken.append(text)
        seconds = np.arange(1600 * len(text.split())) / 16_000
        return (1.5 * np.sin(2 * np.pi * self._hertz * seconds)).astype(np.float32)


def open_sine(name: str) -> Voice:
    return Sine({"sine_low": 200.0, "sine_high": 400.0}[name])


class Killed(BaseException):
    """Not an Exception: like a kill, nothing may catch it."""


class Mortal(Voice):
    """Speaks 12 lines, then dies."""

    licence = "CC0-1.0"

    def __init__(self, name: str) -> None:
        self._voice = open_sine(name)

    def speak(self, text: str) -> np.ndarray:
        if len(Sine.spoken) == 12:
            raise Killed
        return self._voice.speak(text)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "sentences.txt"
    file.write_text("\n".join([*SENTENCES, "", "   "]) + "\n", "utf-8")
    return file


def run(text: Path, out: Path, **options) -> dict[str, float]:
    Sine.spoken.clear()
    options = {"hours": ALL, "voices": VOICES, "seconds": (0.2, 0.85), "open_voice": open_sine} | options
    return synthesize(text, out, **options)


def entries(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def test_manifest_names_what_is_there(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "corpus"
    hours = run(text, out)
    manifest = entries(out / "manifest.jsonl")
    for entry in manifest:
        assert list(entry) == ["id", "audio_filepath", "duration", "text", "speaker", "domain", "speed", "licence"]
        audio, rate = soundfile.read(out / entry["audio_filepath"])
        assert rate == 16_000 and audio.ndim == 1
        assert len(audio) / rate == pytest.approx(entry["duration"], abs=1e-4)
        assert entry["duration"] == pytest.approx(0.1 * len(entry["text"].split()) / entry["speed"], abs=1e-3)
        assert 0.5 < np.abs(audio).max() <= 1.0  # the sine of 1.5 was turned down, not clipped
        assert SPEEDS[0] <= entry["speed"] <= SPEEDS[1]
        assert entry["text"] in SENTENCES and entry["speaker"] in VOICES
        assert entry["domain"] == "synth_sine" and entry["licence"] == "CC0-1.0"
    assert len(manifest) == len({entry["id"] for entry in manifest}) == len(list(out.glob("audio/*/*.ogg")))
    for voice in VOICES:
        assert hours[voice] * 3600 == pytest.approx(sum(e["duration"] for e in manifest if e["speaker"] == voice))


def test_lines_too_long_or_short_are_left_out_and_noted(text: Path, tmp_path: Path) -> None:
    run(text, tmp_path / "corpus", seconds=(0.3, 0.7))
    manifest, skipped = entries(tmp_path / "corpus/manifest.jsonl"), entries(tmp_path / "corpus/skipped.jsonl")
    assert all(0.3 <= entry["duration"] <= 0.7 for entry in manifest)
    assert {entry["duration"] < 0.3 for entry in skipped} == {True, False}
    assert not any(0.3 <= entry["duration"] <= 0.7 for entry in skipped)
    assert sorted(entry["text"] for entry in manifest + skipped) == sorted(SENTENCES)


def test_killed_run_continues_with_no_line_lost_or_doubled(text: Path, tmp_path: Path) -> None:
    run(text, tmp_path / "straight")
    with pytest.raises(Killed):
        run(text, tmp_path / "killed", open_voice=Mortal)
    with (tmp_path / "killed/manifest.jsonl").open("a") as file:
        file.write('{"id": "synth_0000')  # torn by the kill
    run(text, tmp_path / "killed")
    assert len(Sine.spoken) == len(SENTENCES) - 12
    for name in ("manifest.jsonl", "skipped.jsonl"):
        assert (tmp_path / "killed" / name).read_text() == (tmp_path / "straight" / name).read_text()
    run(text, tmp_path / "killed")
    assert Sine.spoken == []  # nothing is left to say, skipped lines included


def test_hours_bound_the_corpus_and_more_hours_extend_it(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "corpus"
    assert 5 <= 3600 * sum(run(text, out, hours=5 / 3600).values()) < 5.85
    first = (out / "manifest.jsonl").read_text()
    run(text, out, hours=5 / 3600)
    assert (out / "manifest.jsonl").read_text() == first
    run(text, out)
    assert (out / "manifest.jsonl").read_text().startswith(first)


def test_workers_write_the_same_corpus(text: Path, tmp_path: Path) -> None:
    run(text, tmp_path / "one", hours=6 / 3600)
    run(text, tmp_path / "two", hours=6 / 3600, workers=2)
    assert (tmp_path / "two/manifest.jsonl").read_text() == (tmp_path / "one/manifest.jsonl").read_text()
    for entry in entries(tmp_path / "one/manifest.jsonl"):
        one, two = (soundfile.read(tmp_path / part / entry["audio_filepath"])[0] for part in ("one", "two"))
        np.testing.assert_array_equal(one, two)
    assert len(list(tmp_path.glob("two/audio/*/*"))) == len(entries(tmp_path / "two/manifest.jsonl"))


def test_the_seed_alone_decides_voice_speed_and_order() -> None:
    def said(seed: int, sentences: list[str] = SENTENCES) -> dict[str, tuple[str, float]]:
        return {line.text: (line.speaker, line.speed) for line in plan(sentences, voices=VOICES, seed=seed)}

    assert list(said(1).items()) == list(said(1).items())
    assert list(said(1)) != list(said(2)) and said(1) != said(2)
    assert sorted(said(1)) == sorted(SENTENCES)
    assert said(1, SENTENCES[:10]).items() <= said(1).items()  # a line's dice do not depend on the other lines


def test_voices_get_their_parts() -> None:
    lines = list(plan([f"{number}" for number in range(2000)], voices=VOICES, seed=3))
    assert sum(line.speaker == "sine_low" for line in lines) / 2000 == pytest.approx(0.7, abs=0.04)
    assert sum(line.speaker == "sine_low" for line in lines[:300]) / 300 == pytest.approx(0.7, abs=0.1)
    assert [line.audio_filepath.split("/")[1] for line in lines] == ["000"] * 1000 + ["001"] * 1000


def test_another_corpus_in_the_folder_is_refused(text: Path, tmp_path: Path) -> None:
    run(text, tmp_path / "corpus", hours=1 / 3600)
    with pytest.raises(PrepareError, match=r"holds other .*seed 1 != 2.*another folder"):
        run(text, tmp_path / "corpus", seed=2)
    text.write_text("something else\n")
    with pytest.raises(PrepareError, match="text_sha256"):
        run(text, tmp_path / "corpus")


def test_errors_name_the_remedy(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SynthesisError, match=r"no voice 'flite_bob'.*flite_slt"):
        open_voice("flite_bob")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SynthesisError, match="apt-get install -y flite"):
        run(text, tmp_path / "corpus", voices={"flite_slt": 1.0}, open_voice=open_voice)
    monkeypatch.setitem(__import__("sys").modules, "hibari", None)
    with pytest.raises(SynthesisError, match="pip install hibari-tts"):
        open_voice("hibari_heart")
    monkeypatch.setattr(Sine, "speak", lambda self, text: 1 / 0)
    with pytest.raises(SynthesisError, match=r"sine_\w+ failed on synth_0000\d\d_sine.*division by zero"):
        run(text, tmp_path / "other")
