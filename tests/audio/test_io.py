from __future__ import annotations

import io
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from duolect.audio.io import SAMPLE_RATE, AudioError, AudioWarning, duration_of, read_audio

RATE = 48000
SECONDS = 1.5


def tone(rate: int = RATE, *, channels: int = 1, seconds: float = SECONDS, seed: int = 0) -> np.ndarray:
    """A quiet sine with noise [N] or [N, channels], another level in each channel."""
    time = np.arange(round(rate * seconds)) / rate
    noise = np.random.default_rng(seed).standard_normal(len(time))
    mono = 0.3 * np.sin(2 * np.pi * 440 * time) + 0.01 * noise
    return mono if channels == 1 else mono[:, None] * np.linspace(0.2, 1.0, channels)


def write(path: Path, samples: np.ndarray, rate: int = RATE, **options: Any) -> Path:
    soundfile.write(path, samples, rate, **options)
    return path


FORMATS: dict[str, dict[str, Any]] = {
    "wav": {}, "flac": {}, "aiff": {}, "au": {}, "mp3": {}, "ogg": {}, "opus": {"format": "OGG", "subtype": "OPUS"},
}  # fmt: skip


@pytest.mark.parametrize("suffix", FORMATS)
def test_formats_by_path_and_bytes(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"a.{suffix}", tone(), **FORMATS[suffix])
    audio = read_audio(path)
    assert audio.dtype == np.float32 and audio.ndim == 1 and audio.flags.c_contiguous
    assert abs(len(audio) / SAMPLE_RATE - SECONDS) < 0.05
    assert 0.2 < np.abs(audio).max() < 0.45
    np.testing.assert_array_equal(audio, read_audio(path.read_bytes()))
    np.testing.assert_array_equal(audio, read_audio(str(path)))
    assert duration_of(path) == pytest.approx(SECONDS, abs=0.05)


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 44100, 48000, 96000])
def test_resampling_keeps_the_signal(tmp_path: Path, rate: int) -> None:
    time = np.arange(rate) / rate
    audio = read_audio(write(tmp_path / "a.wav", 0.5 * np.sin(2 * np.pi * 1000 * time), rate, subtype="FLOAT"))
    assert len(audio) == SAMPLE_RATE
    expected = 0.5 * np.sin(2 * np.pi * 1000 * np.arange(SAMPLE_RATE) / SAMPLE_RATE)
    np.testing.assert_allclose(audio[1000:-1000], expected[1000:-1000], atol=1e-3)


def test_nothing_is_changed_at_16_khz(tmp_path: Path) -> None:
    samples = tone(SAMPLE_RATE).astype(np.float32)
    np.testing.assert_array_equal(read_audio(write(tmp_path / "a.wav", samples, SAMPLE_RATE, subtype="FLOAT")), samples)


def test_eight_channels_are_averaged(tmp_path: Path) -> None:
    samples = tone(SAMPLE_RATE, channels=8).astype(np.float32)
    audio = read_audio(write(tmp_path / "a.wav", samples, SAMPLE_RATE, subtype="FLOAT"))
    np.testing.assert_allclose(audio, samples.mean(axis=1), atol=1e-6)
    assert len(read_audio(write(tmp_path / "b.wav", tone(RATE, channels=8)))) == round(SECONDS * SAMPLE_RATE)


@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3"])
def test_channels_that_cancel_are_not_averaged_to_silence(tmp_path: Path, suffix: str) -> None:
    mono = tone(SAMPLE_RATE).astype(np.float32)
    path = write(tmp_path / f"a.{suffix}", np.stack([0.97 * mono, -mono], axis=1), SAMPLE_RATE)
    with pytest.warns(AudioWarning, match="cancel each other: used channel 2 of 2"):
        audio = read_audio(path)
    assert np.sqrt(np.mean((audio[2000:20000] + mono[2000:20000]) ** 2)) < 0.1 * mono.std()


def test_integers_written_as_floats_are_scaled_and_clipping_is_said(tmp_path: Path) -> None:
    mono = tone(SAMPLE_RATE).astype(np.float32)
    with pytest.warns(AudioWarning, match=r"reach \d{4}, expected 1"):
        audio = read_audio(write(tmp_path / "a.wav", 20_000 * mono, SAMPLE_RATE, subtype="FLOAT"))
    np.testing.assert_allclose(audio, mono / np.abs(mono).max(), atol=1e-6)
    with pytest.warns(AudioWarning, match=r"\d\d% of its samples are clipped"):
        audio = read_audio(write(tmp_path / "b.wav", np.clip(9 * mono, -1, 1), SAMPLE_RATE, subtype="FLOAT"))
    assert np.abs(audio).max() == 1.0


@pytest.mark.filterwarnings("error::duolect.audio.io.AudioWarning")
def test_what_is_only_loud_stays_as_it_is(tmp_path: Path) -> None:
    loud = 3 * tone(SAMPLE_RATE).astype(np.float32) * np.linspace(0, 1, round(SECONDS * SAMPLE_RATE), dtype=np.float32) ** 4
    np.testing.assert_array_equal(read_audio(write(tmp_path / "a.wav", loud, SAMPLE_RATE, subtype="FLOAT")), loud)
    one_of_eight = np.zeros((SAMPLE_RATE, 8))
    one_of_eight[:, 5] = tone(SAMPLE_RATE)[:SAMPLE_RATE]
    np.testing.assert_allclose(read_audio(write(tmp_path / "b.wav", one_of_eight, SAMPLE_RATE)), one_of_eight[:, 5] / 8, atol=1e-4)


def test_long_audio_is_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.flac", tone(channels=2))
    whole = read_audio(path)
    monkeypatch.setattr("duolect.audio.io.BLOCK_FRAMES", 1000)
    np.testing.assert_array_equal(read_audio(path), whole)


def test_mp3_without_a_length_is_read_to_its_end() -> None:
    """libsndfile believes the first frame's bit rate: silence first, and it expects far more than comes; noise first, far less."""
    quiet, loud = np.zeros(2 * SAMPLE_RATE), 0.3 * np.random.default_rng(0).standard_normal(2 * SAMPLE_RATE)
    for samples in (np.concatenate([loud, quiet]), np.concatenate([quiet, loud])):
        file = io.BytesIO()
        soundfile.write(file, samples, SAMPLE_RATE, format="MP3", bitrate_mode="VARIABLE", compression_level=0.5)
        data = file.getvalue()
        mark = min(i for i in (data.find(b"Xing"), data.find(b"Info")) if i >= 0)
        data = data[:mark] + b"\0\0\0\0" + data[mark + 4 :]
        declared = soundfile.info(io.BytesIO(data)).duration
        assert abs(declared - 4.0) > 0.3, "no longer a case that libsndfile gets wrong"
        assert len(read_audio(data)) / SAMPLE_RATE == pytest.approx(4.0, abs=0.2)
        tag = b"ID3\x04\0\0" + bytes([0, 1, 0, 0]) + b"\0" * (1 << 14)  # 16 KiB of it
        assert len(read_audio(tag + data)) / SAMPLE_RATE == pytest.approx(4.0, abs=0.2)


def as_text(path: Path) -> None:
    path.write_text("this is a text, whatever its name says\n" * 20)


def as_nan(path: Path) -> None:
    samples = tone().astype(np.float32)
    samples[RATE] = np.nan
    write(path, samples, subtype="FLOAT")


def as_inf(path: Path) -> None:
    samples = tone(channels=8).astype(np.float32)
    samples[RATE // 2, 3] = -np.inf
    write(path, samples, subtype="FLOAT")


def as_garbage_floats(path: Path) -> None:
    write(path, tone().astype(np.float32) * np.float32(1e30), subtype="FLOAT")


def as_half(path: Path) -> None:
    options = FORMATS[path.suffix[1:]]
    data = write(path, tone(), **options).read_bytes()
    path.write_bytes(data[: len(data) // 2])


def as_header(path: Path) -> None:
    as_half(path)
    path.write_bytes(path.read_bytes()[:40])


def as_damaged(path: Path) -> None:
    data = bytearray(write(path, tone()).read_bytes())
    data[len(data) // 2 : len(data) // 2 + 400] = bytes(range(200)) * 2
    path.write_bytes(data)


def as_noise(path: Path) -> None:
    path.write_bytes(np.random.default_rng(0).bytes(5000))


BAD: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "missing": ("a.wav", lambda path: None, "no such file: check the path; in a manifest it starts at the manifest's folder$"),
    "empty": ("a.wav", lambda path: path.touch(), r"is empty \(0 bytes\): "),
    "folder": ("a.wav", lambda path: path.mkdir(), "is a folder, expected an audio file: "),
    "zero length": ("a.wav", lambda path: write(path, np.zeros(0)), r"has no samples \(zero length\): "),
    "zero length flac": ("a.flac", lambda path: write(path, np.zeros(0)), r"is empty \(0 bytes\)"),  # that is what libsndfile writes
    "nan": ("a.wav", as_nan, r"1 of 72000 samples are not audio \(the first is nan at 1.000 s, expected finite.*: write the file again"),
    "inf": ("a.wav", as_inf, r"1 of 72000 samples are not audio \(the first is -inf at 0.500 s"),
    "huge": ("a.wav", as_garbage_floats, "samples are not audio"),
    "text as wav": ("a.wav", as_text, r"cannot be decoded \(Format not recognised; .*b'this is '.*: it is corrupt or not"),
    "text as raw": ("a.raw", as_text, "install ffmpeg"),
    "noise": ("a.flac", as_noise, "cannot be decoded.*: it is corrupt"),
    "half a wav": ("a.wav", as_half, "ends after 0.75 s of the 1.50 s that its header declares: it is cut off"),
    "half a flac": ("a.flac", as_half, "is corrupt behind its header"),
    "half an mp3": ("a.mp3", as_half, "ends after .* of the 1.50 s"),
    "header of ogg": ("a.ogg", as_header, "cannot be decoded"),
    "header of mp3": ("a.mp3", as_header, r"cannot be decoded \(it holds no audio; "),
    "damaged flac": ("a.flac", as_damaged, "is corrupt behind its header"),
    "m4a": ("a.m4a", lambda path: path.write_bytes(b"\0\0\0\x1cftypM4A \0\0\2\0"), "install ffmpeg.*or convert it to wav or flac"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_audio_is_one_line_with_file_cause_and_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    name, make, expected = BAD[case]
    monkeypatch.setenv("PATH", str(tmp_path))  # no ffmpeg
    path = tmp_path / name
    make(path)
    with pytest.raises(AudioError, match=expected) as caught:
        read_audio(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    if path.is_file() and path.stat().st_size:
        with pytest.raises(AudioError, match=expected) as caught:
            read_audio(path.read_bytes(), name=f"upload {name}")
        assert str(caught.value).startswith(f"upload {name}: ")


@pytest.mark.parametrize("case", ["missing", "empty", "folder", "text as wav", "text as raw", "noise", "header of ogg", "m4a"])
def test_duration_of_bad_audio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    name, make, expected = BAD[case]
    monkeypatch.setenv("PATH", str(tmp_path))
    make(tmp_path / name)
    with pytest.raises(AudioError, match=expected):
        duration_of(tmp_path / name)


def test_empty_bytes() -> None:
    with pytest.raises(AudioError, match=r"^audio bytes: is empty \(0 bytes\): "):
        read_audio(b"")


def test_path_with_null_byte() -> None:
    with pytest.raises(AudioError, match="cannot be opened"):
        read_audio("a\0b.wav")


def test_streamed_wav_of_unknown_length(tmp_path: Path) -> None:
    data = bytearray(write(tmp_path / "a.wav", tone()).read_bytes())
    data[4:8] = data[40:44] = b"\xff\xff\xff\xff"
    assert len(read_audio(bytes(data))) == round(SECONDS * SAMPLE_RATE)


def program(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_ffmpeg_unpacks_what_libsndfile_cannot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for ffmpeg: it checks that it was given the file and writes a wav where it was told to."""
    wav = write(tmp_path / "ready.wav", tone(channels=2))
    packed = tmp_path / "-a b.m4a"
    packed.write_bytes(b"\0\0\0\x1cftypM4A ")
    tools = tmp_path / "tools"
    tools.mkdir()
    program(tools, "ffmpeg", f'for last; do :; done; case "$*" in *"-i file:/"*) exec /bin/cp {wav} "${{last#file:}}";; esac; exit 3')
    program(tools, "ffprobe", "echo 1.5")
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.chdir(tmp_path)
    np.testing.assert_array_equal(read_audio("-a b.m4a"), read_audio(wav))
    np.testing.assert_array_equal(read_audio(packed.read_bytes()), read_audio(wav))
    assert duration_of(packed) == 1.5


def test_ffmpeg_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = tmp_path / "a.m4a"
    packed.write_bytes(b"\0\0\0\x1cftypM4A ")
    program(tmp_path, "ffmpeg", "echo '[in#0 @ 0x55fe] moov atom'  >&2; echo ' not found' >&2; exit 1")
    program(tmp_path, "ffprobe", "echo N/A")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(AudioError, match=r"neither libsndfile nor ffmpeg can decode it \(moov atom not found\): .*convert or replace it"):
        read_audio(packed)
    with pytest.raises(AudioError, match="neither libsndfile nor ffprobe"):
        duration_of(packed)
