"""Audio files and bytes to float32 mono 16 kHz."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import subprocess
import tempfile
import threading
import warnings
from pathlib import Path

import numpy as np
import soundfile
import soxr

SAMPLE_RATE = 16000

BLOCK_FRAMES = 1 << 20  # mixed down block by block: an hour of 8 channels never lies in memory at once
MISSING_SECONDS, MISSING_SHARE = 0.5, 0.05  # headers of mp3 are estimates; what lacks more than this was cut off
LOUDEST = 2.0**31  # full scale is 1; beyond the largest integer format it is no audio, and its power would overflow fp32
CANCELLED = 0.01  # of the loudest channel's power: what the mean of the channels must keep (-20 dB)
INTEGERS = 8.0  # a peak beyond it is no loud recording but integers written as floats: models hear nothing in them
CLIPPED = 0.05  # share of the samples at full scale that costs words

# Containers that libsndfile opens: what starts like them and fails is broken, and ffmpeg is not the cure.
_KNOWN_STARTS = (b"RIFF", b"RF64", b"fLaC", b"OggS", b"ID3", b"FORM", b".snd", b"caff", b"\xff\xfb", b"\xff\xf3")
_UNREADABLE = (soundfile.SoundFileError, RuntimeError, OSError, ValueError, TypeError)  # TypeError: .raw, which has no header
_OURS = (".wav", ".flac", ".mp3", ".ogg", ".oga", ".opus", ".aif", ".aiff", ".au", ".caf")


class AudioError(ValueError):
    """Audio that cannot be used; the message is one line: file, cause, next step."""


class AudioWarning(UserWarning):
    """Audio that can be used, but may be understood badly: file, cause, what was done or is to do."""


def read_audio(source: str | Path | bytes, *, name: str | None = None) -> np.ndarray:
    """The samples [N] of a file or of a file's bytes, N > 0, finite: float32, mono, 16 kHz, full scale 1.

    Of all formats of libsndfile; of others (m4a, ...) where `ffmpeg` is on the PATH. Channels are averaged, or where they cancel each
    other, the loudest one is taken. name: how errors call the source. AudioWarning for such and clipped samples; raises AudioError.
    """
    where = name or ("audio bytes" if isinstance(source, bytes) else str(source))
    start = _start_of(source, where)
    try:
        sound = soundfile.SoundFile(io.BytesIO(source) if isinstance(source, bytes) else source)
    except _UNREADABLE as error:
        samples, rate = _decode_by_ffmpeg(source, where, start, error)
    else:
        with sound:
            rate = sound.samplerate
            if sound.format == "MP3" and not _mp3_states_length(frames := _mp3_frames(source)):
                samples = _decode_mp3_stream(frames, where)
            else:
                samples = _mixed_down(sound, where)
    _require_usable(samples, rate, where)
    samples = _at_full_scale(samples, where)
    if rate != SAMPLE_RATE:
        samples = soxr.resample(samples, rate, SAMPLE_RATE, quality="HQ")
        if not len(samples):
            raise AudioError(f"{where}: is shorter than one sample at {SAMPLE_RATE} Hz: record it again or leave it out")
    return np.ascontiguousarray(samples, dtype=np.float32)


def duration_of(path: str | Path) -> float:
    """Seconds of an audio file by its header, without decoding it; an estimate for mp3 that states no length. Raises AudioError."""
    start = _start_of(path, str(path))
    try:
        info = soundfile.info(str(path))
    except _UNREADABLE as error:
        return _duration_by_ffprobe(Path(path), start, error)
    return info.frames / info.samplerate


def _start_of(source: str | Path | bytes, where: str) -> bytes:
    """The first 16 bytes, which exist."""
    if isinstance(source, bytes):
        start = source[:16]
    else:
        try:
            with open(source, "rb") as file:
                start = file.read(16)
        except FileNotFoundError:
            raise AudioError(f"{where}: no such file: check the path; in a manifest it starts at the manifest's folder") from None
        except IsADirectoryError:
            raise AudioError(f"{where}: is a folder, expected an audio file: name a file in it") from None
        except (OSError, ValueError) as error:
            raise AudioError(f"{where}: cannot be opened ({_one_line(error)}): check its path and permissions") from error
    if not start:
        raise AudioError(f"{where}: is empty (0 bytes): fetch or record it again, or leave it out")
    return start


def _mixed_down(sound: soundfile.SoundFile, where: str, *, channel: int | None = None) -> np.ndarray:
    """Mono samples [N] at the file's own rate: the mean of the channels, or the one asked for."""
    blocks, power = [], np.zeros(sound.channels + 1)
    try:
        while len(block := sound.read(BLOCK_FRAMES, dtype="float32", always_2d=True)):
            blocks.append(block.mean(axis=1) if channel is None else block[:, channel].copy())
            power += [np.vdot(x, x) for x in (*block.T, blocks[-1])]
    except _UNREADABLE as error:
        raise AudioError(f"{where}: is corrupt behind its header ({_one_line(error)}): fetch it again or write it anew") from error
    if channel is None and power[-1] < CANCELLED * power[:-1].max() and sound.seekable():
        best = int(power[:-1].argmax())
        warnings.warn(f"{where}: its channels cancel each other: used channel {best + 1} of {sound.channels}", AudioWarning, stacklevel=3)
        sound.seek(0)
        return _mixed_down(sound, where, channel=best)
    samples = np.concatenate(blocks) if blocks else np.zeros(0, np.float32)
    got, declared = len(samples) / sound.samplerate, _declared_seconds(sound)
    if got < (1.0 - MISSING_SHARE) * declared - MISSING_SECONDS:
        raise AudioError(f"{where}: ends after {got:.2f} s of the {declared:.2f} s that its header declares: it is cut off, fetch it again")
    return samples


def _declared_seconds(sound: soundfile.SoundFile) -> float:
    """What the header says, 0 where it says nothing. libsndfile puts the length of a wav that was cut off right, and only logs it."""
    if not sound.seekable():
        return 0.0
    log = re.search(r"data : (\d+) \(should be (\d+)\)", sound.extra_info)
    declared, there = (int(log[1]), int(log[2])) if log else (1, 1)
    if there <= 0 or declared > 0x7FFF0000:  # the size a stream's header has, whose end nobody knew
        declared = there = 1
    return sound.frames / sound.samplerate * max(1.0, declared / there)


def _mp3_frames(source: str | Path | bytes) -> bytes:
    """An mp3 without the ID3 tags that it may begin with."""
    data = source if isinstance(source, bytes) else Path(source).read_bytes()
    while data.startswith(b"ID3") and len(data) > 10:
        size = sum((byte & 0x7F) << shift for byte, shift in zip(data[6:10], (21, 14, 7, 0), strict=True))
        data = data[10 + size :]
    return data


def _mp3_states_length(frames: bytes) -> bool:
    """Whether the first frame of an mp3 is the one that counts the others (Xing, Info, VBRI)."""
    return any(mark in frames[:4096] for mark in (b"Xing", b"Info", b"VBRI"))


def _decode_mp3_stream(frames: bytes, where: str) -> np.ndarray:
    """Mono samples [N] of an mp3 that states no length.

    libsndfile would guess it from the first frame's bit rate and stop there: where that rate is above the average, the end of the
    recording is lost without a word. From a pipe it reads to the end.
    """
    reading, writing = os.pipe()

    def feed() -> None:
        with contextlib.suppress(BrokenPipeError), os.fdopen(writing, "wb") as pipe:
            pipe.write(frames)

    feeder = threading.Thread(target=feed, daemon=True)
    feeder.start()
    try:
        with soundfile.SoundFile(reading, closefd=False) as sound:
            return _mixed_down(sound, where)
    except soundfile.SoundFileError as error:
        raise AudioError(f"{where}: cannot be decoded as mp3 ({_one_line(error)}): fetch it again or convert it to wav or flac") from error
    finally:
        os.close(reading)
        feeder.join()


def _require_usable(samples: np.ndarray, rate: int, where: str) -> None:
    if not len(samples):
        raise AudioError(f"{where}: has no samples (zero length): record it again or leave it out")
    with np.errstate(invalid="ignore"):
        bad = np.flatnonzero(~(np.abs(samples) <= LOUDEST))  # NaN and inf are not <= either
    if len(bad):
        raise AudioError(
            f"{where}: {len(bad)} of {len(samples)} samples are not audio (the first is {samples[bad[0]]} at {bad[0] / rate:.3f} s, "
            "expected finite values with full scale 1): write the file again from its source"
        )


def _at_full_scale(samples: np.ndarray, where: str) -> np.ndarray:
    """The samples, divided by their peak where they are integers written as floats."""
    loud = np.abs(samples)
    if (peak := float(loud.max())) > INTEGERS:
        warnings.warn(f"{where}: its samples reach {peak:.0f}, expected 1 at most: divided by that", AudioWarning, stacklevel=3)
        return samples / np.float32(peak)
    if (clipped := float((loud >= 0.999).mean())) > CLIPPED:
        warnings.warn(f"{where}: {clipped:.0%} of its samples are clipped: record it with less gain", AudioWarning, stacklevel=3)
    return samples


def _decode_by_ffmpeg(source: str | Path | bytes, where: str, start: bytes, error: Exception) -> tuple[np.ndarray, int]:
    """(mono samples [N], their rate): ffmpeg only unpacks, so that mixing and resampling are the same for all formats."""
    program = _program("ffmpeg", where, start, error)
    with tempfile.TemporaryDirectory() as folder:
        packed, unpacked = Path(folder, "packed"), Path(folder, "unpacked.wav")
        if isinstance(source, bytes):
            packed.write_bytes(source)  # a file and not a pipe: the index of an m4a may stand at its end
        else:
            packed = Path(source).absolute()
        # -xerror: half a file is an error here too. The whitelist: a playlist in disguise must not reach the network.
        before, after = "-nostdin -v error -xerror -protocol_whitelist file,pipe -i", "-vn -c:a pcm_f32le -rf64 auto"
        command = [program, *before.split(), f"file:{packed}", *after.split(), f"file:{unpacked}"]
        done = subprocess.run(command, capture_output=True, check=False)
        if done.returncode:
            why = _one_line(done.stderr.decode(errors="replace")) or f"exit status {done.returncode}"
            raise AudioError(f"{where}: neither libsndfile nor ffmpeg can decode it ({why}): is it audio, and whole? convert or replace it")
        try:
            with soundfile.SoundFile(unpacked) as sound:
                return _mixed_down(sound, where), sound.samplerate
        except soundfile.SoundFileError as unusable:
            raise AudioError(f"{where}: ffmpeg found no audio in it ({_one_line(unusable)}): convert or replace it") from unusable


def _duration_by_ffprobe(path: Path, start: bytes, error: Exception) -> float:
    program = _program("ffprobe", str(path), start, error)
    options = "-v error -protocol_whitelist file,pipe -show_entries format=duration -of csv=p=0"
    command = [program, *options.split(), f"file:{path.absolute()}"]
    done = subprocess.run(command, capture_output=True, check=False, text=True, errors="replace")
    try:
        return float(done.stdout)
    except ValueError:
        why = _one_line(done.stderr) or "it states no duration"
        raise AudioError(f"{path}: neither libsndfile nor ffprobe can read it ({why}): is it audio, and whole? replace it") from None


def _program(name: str, where: str, start: bytes, error: Exception) -> str:
    """The path of ffmpeg's program that may open what libsndfile could not (`error`); AudioError where it is not installed."""
    if (program := shutil.which(name)) is not None:
        return program
    if start.startswith(_KNOWN_STARTS) or Path(where).suffix.lower() in _OURS:
        raise AudioError(
            f"{where}: cannot be decoded ({_one_line(error)}; it starts with {start[:8]!r}): "
            "it is corrupt or not what its name says; fetch it again or convert it to wav or flac"
        )
    raise AudioError(
        f"{where}: its format is unknown to libsndfile ({_one_line(error)}; it starts with {start[:8]!r}): "
        "install ffmpeg (m4a, mp4, webm, wma, ...), or convert it to wav or flac"
    )


def _one_line(error: Exception | str) -> str:
    text = re.sub(r"\[[^]]* @ 0x[0-9a-f]+\] ", "", " ".join(str(getattr(error, "error_string", error)).split())).rstrip(".")
    # libsndfile's words for an mp3 without a single frame
    return "it holds no audio" if text.startswith("File does not exist or is not a regular file") else text[:150]
