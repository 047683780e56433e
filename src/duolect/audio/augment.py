"""Augmentation of training speech: speed, noise, masks; each a pure function of (seed, epoch, utterance)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import soxr

from duolect.audio.io import SAMPLE_RATE
from duolect.config import registered

SILENT = 0.25  # share of digital silence in what has no speech


@registered
@dataclass(frozen=True)
class SpecAugment:
    """Which share of the log-mel features is hidden (arXiv 1904.08779, with the counts of paper.md 1.2).

    ramp: updates from which one, two, all three of the stages are on. Widths are maxima, in frames of 10 ms and in mel bins.
    """

    ramp: tuple[int, int, int] = (5_000, 15_000, 25_000)
    time_width: int = 20
    mel_width: int = 16


@registered
@dataclass(frozen=True)
class Augmentation:
    """How strongly to augment. Chances in 0..1, SNR in dB. speechless: the chance that an utterance is replaced by noise or silence alone,
    where nothing is to be recognized."""

    speeds: tuple[float, ...] = (0.9, 1.0, 1.1)
    noise_chance: float = 0.5
    snr_db: tuple[float, float] = (5.0, 30.0)
    speechless: float = 0.0
    spec: SpecAugment | None = field(default_factory=SpecAugment)


def random_for(seed: int, epoch: int, utterance: str, purpose: str = "augment") -> np.random.Generator:
    """The generator that belongs to these four, the same on every machine and in every order of calls."""
    digest = hashlib.sha256(f"{seed}/{epoch}/{utterance}/{purpose}".encode()).digest()
    return np.random.default_rng(np.frombuffer(digest[:16], np.uint32))


def speed_for(seed: int, epoch: int, utterance: str, settings: Augmentation) -> float:
    """The speed at which an utterance is heard: known before its audio is, so that batches can be made of utterances equally long then."""
    speeds = settings.speeds
    return speeds[0] if len(speeds) == 1 else speeds[int(random_for(seed, epoch, utterance, "speed").integers(len(speeds)))]


def augment_audio(
    audio: np.ndarray, random: np.random.Generator, settings: Augmentation, *, speed: float = 1.0, others: Sequence[np.ndarray] = ()
) -> np.ndarray:
    """Samples [N'] at another speed, perhaps with noise; `others` are utterances to make babble of."""
    audio = change_speed(audio, speed)
    if random.random() < settings.noise_chance:
        audio = add_noise(audio, noise(len(audio), random, others=others), float(random.uniform(*settings.snr_db)))
    return audio


def change_speed(audio: np.ndarray, factor: float) -> np.ndarray:
    """Samples [N / factor], faster and higher for a factor above 1 (Ko et al., Interspeech 2015)."""
    if factor == 1.0:
        return audio
    return soxr.resample(audio, SAMPLE_RATE * factor, SAMPLE_RATE, quality="MQ").astype(np.float32)


def add_noise(audio: np.ndarray, noise: np.ndarray, snr_db: float) -> np.ndarray:
    """Samples [N] with noise [N] scaled to a signal-to-noise ratio over the whole utterance; silence stays as it is."""
    signal, power = float(np.mean(audio**2)), float(np.mean(noise**2))
    if signal <= 0 or power <= 0:
        return audio
    return (audio + noise * np.sqrt(signal / power * 10 ** (-snr_db / 10))).astype(np.float32)


def noise(samples: int, random: np.random.Generator, *, others: Sequence[np.ndarray] = ()) -> np.ndarray:
    """Noise [samples] of a random colour: white, pink, brown, or babble of one to four other utterances if there are any."""
    kind = random.choice(["white", "pink", "brown", *(["babble"] * 2 if others else [])])
    if kind == "babble":
        voices = [others[i] for i in random.integers(0, len(others), random.integers(1, 5))]
        return np.sum([np.resize(np.roll(v, random.integers(len(v))), samples) / (np.std(v) + 1e-6) for v in voices], axis=0)
    exponent = {"white": 0.0, "pink": 0.5, "brown": 1.0}[str(kind)]
    size = 1 << max(8, (samples - 1).bit_length())  # a power of two: the FFT of a prime length is slow
    spectrum = random.standard_normal(size // 2 + 1) + 1j * random.standard_normal(size // 2 + 1)
    spectrum /= np.maximum(np.arange(size // 2 + 1), size * 20 / SAMPLE_RATE) ** exponent  # flat below 20 Hz
    return np.fft.irfft(spectrum)[:samples].astype(np.float32)


def speechless(samples: int, random: np.random.Generator) -> np.ndarray:
    """Samples [N] without speech: digital silence, or noise of a random colour, -80 to -15 dB below full scale."""
    if random.random() < SILENT:
        return np.zeros(samples, np.float32)
    sound = noise(samples, random)
    return (sound / (np.std(sound) + 1e-12) * 10 ** (random.uniform(-80.0, -15.0) / 20)).astype(np.float32)


def hidden_features(frames: int, mels: int, random: np.random.Generator, settings: SpecAugment, *, step: int) -> np.ndarray:
    """Bool [frames, mels], true where update number `step` hides what is there: bands of time, more in longer audio, and of frequency."""
    first, second, third = (int(step >= start) for start in settings.ramp)
    hidden = np.zeros((frames, mels), bool)
    most_time, most_mel = max(frames // 100, 2) * (first + second + 2 * third), 2 * first + second + 2 * third
    for _ in range(int(random.integers(min(second + third, most_time), most_time + 1))):
        start, end = _band(frames, settings.time_width, random)
        hidden[start:end] = True
    for _ in range(int(random.integers(min(second + third, most_mel), most_mel + 1))):
        start, end = _band(mels, settings.mel_width, random)
        hidden[:, start:end] = True
    return hidden


def _band(size: int, widest: int, random: np.random.Generator) -> tuple[int, int]:
    width = int(random.integers(0, min(widest, size) + 1))
    start = int(random.integers(0, size - width + 1))
    return start, start + width
