from __future__ import annotations

import numpy as np
import pytest
import torch

from duolect.audio.features import HOP, WINDOW, log_mel, mel_filters, whisper_log_mel

CPU = torch.device("cpu")
FULL = 30 * 16000


def speech_like(samples: int, *, seed: int = 0) -> np.ndarray:
    """Noise bursts and harmonics between silences, fp32."""
    random = np.random.default_rng(seed)
    time = np.arange(samples) / 16000
    voice = sum(np.sin(2 * np.pi * 130 * k * time + k) / k for k in range(1, 30))
    envelope = np.clip(np.sin(2 * np.pi * 1.7 * time), 0, 1)
    return (0.1 * voice * envelope + 0.001 * random.standard_normal(samples)).astype(np.float32)


def by_definition(audio: np.ndarray, mels: int) -> np.ndarray:
    """Whisper's features of N samples that are followed by zeros, one frame after the other, in float64; [ceil(N / 160), mels]."""
    frames = -(-len(audio) // 160)
    padded = np.pad(np.pad(audio.astype(np.float64), (0, 1000)), (200, 0), mode="reflect")
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    power = np.array([np.abs(np.fft.rfft(padded[160 * t : 160 * t + 400] * window)) ** 2 for t in range(frames)])

    def mel(hertz: float) -> float:
        return hertz * 3 / 200 if hertz < 1000 else 15 + 27 * np.log(hertz / 1000) / np.log(6.4)

    def hertz(mel: float) -> float:
        return mel * 200 / 3 if mel < 15 else 1000 * 6.4 ** ((mel - 15) / 27)

    edges = [hertz(mel(8000) * i / (mels + 1)) for i in range(mels + 2)]
    filters = np.zeros((201, mels))
    for m in range(mels):
        low, centre, high = edges[m : m + 3]
        for k in range(201):
            f = 40.0 * k
            height = (f - low) / (centre - low) if f <= centre else (high - f) / (high - centre)
            filters[k, m] = max(0.0, height) * 2 / (high - low)
    log_mel = np.log10(np.maximum(power @ filters, 1e-10))
    return (np.maximum(log_mel, log_mel.max() - 8) + 4) / 4


@pytest.mark.parametrize("samples", [1, 100, 159, 160, 161, 200, 201, 320, 399, 400, 401, 1600, 16001, 48000])
def test_equals_the_definition(samples: int) -> None:
    audio = speech_like(samples, seed=samples)
    features = whisper_log_mel(torch.from_numpy(audio))
    assert features.dtype == torch.float32 and features.shape == (-(-samples // 160), 80)
    np.testing.assert_allclose(features.numpy(), by_definition(audio, 80), atol=1e-4)


def test_128_mels() -> None:
    audio = speech_like(8000)
    np.testing.assert_allclose(whisper_log_mel(torch.from_numpy(audio), mels=128).numpy(), by_definition(audio, 128), atol=1e-4)


def hugging_face(audio: np.ndarray, mels: int) -> np.ndarray:
    from transformers.models.whisper.feature_extraction_whisper import WhisperFeatureExtractor

    extract = WhisperFeatureExtractor(feature_size=mels)
    return extract(audio, sampling_rate=16000, return_tensors="np").input_features[0].T  # type: ignore[reportCallIssue]


@pytest.mark.parametrize("mels", [80, 128])
@pytest.mark.parametrize("samples", [90, 16000, 70001])
def test_equals_hugging_face_when_padded(samples: int, mels: int) -> None:
    audio = speech_like(samples)
    theirs = hugging_face(audio, mels)
    padded = whisper_log_mel(torch.from_numpy(np.pad(audio, (0, FULL - samples))), mels=mels).numpy()
    assert padded.shape == theirs.shape == (3000, mels)
    np.testing.assert_allclose(padded, theirs, atol=1e-4)
    ours = whisper_log_mel(torch.from_numpy(audio), mels=mels).numpy()
    np.testing.assert_allclose(ours, theirs[: len(ours)], atol=1e-4)


def test_the_last_frame_of_full_30_seconds_alone_differs() -> None:
    audio = speech_like(FULL)
    ours, theirs = whisper_log_mel(torch.from_numpy(audio)).numpy(), hugging_face(audio, 80)
    np.testing.assert_allclose(ours[:-1], theirs[:-1], atol=1e-4)
    assert ours.shape == theirs.shape


def log_mel_of_transformers(audio: np.ndarray, mels: int) -> np.ndarray:
    """The Conformer's features by transformers' numpy functions, of audio mirrored in front and zero behind; [ceil(N / 160), mels]."""
    from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

    filters = mel_filter_bank(257, mels, 0.0, 8000.0, 16000, norm=None, mel_scale="htk")
    frames = -(-len(audio) // 160)
    padded = np.pad(np.pad(audio.astype(np.float64), (0, 1000)), (200, 0), mode="reflect")[: 160 * (frames - 1) + 400]
    window = window_function(400, "hann", periodic=True)
    return spectrogram(
        padded,
        window,
        400,
        160,
        fft_length=512,
        power=2.0,
        center=False,
        mel_filters=filters,
        mel_floor=1e-10,
        log_mel="log10",
        dtype=np.float64,
    ).T  # type: ignore[reportCallIssue]


@pytest.mark.parametrize("mels", [80, 40])
@pytest.mark.parametrize("samples", [1, 159, 161, 400, 16001, 48000])
def test_log_mel_equals_transformers(samples: int, mels: int) -> None:
    audio = speech_like(samples, seed=samples)
    features = log_mel(torch.from_numpy(audio), mels=mels)
    assert features.dtype == torch.float32 and features.shape == (-(-samples // 160), mels)
    np.testing.assert_allclose(features.numpy(), log_mel_of_transformers(audio, mels), atol=1e-3)


def test_log_mel_equals_a_plain_fourier_sum() -> None:
    audio = speech_like(1000)
    mirrored = np.concatenate([audio[200:0:-1], audio, np.zeros(400)]).astype(np.float64)
    n, k = np.arange(400), np.arange(257)[:, None]
    frame = mirrored[320:720] * (0.5 - 0.5 * np.cos(2 * np.pi * n / 400))
    power = np.abs((frame * np.exp(-2j * np.pi * k * n / 512)).sum(1)) ** 2
    edges = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 8000 / 700), 82) / 2595) - 1)
    for m in (0, 7, 79):
        expected = sum(p * max(0.0, np.interp(31.25 * i, edges[m : m + 3], [0, 1, 0])) for i, p in enumerate(power))
        assert float(log_mel(torch.from_numpy(audio))[2, m]) == pytest.approx(np.log10(expected), abs=1e-3)


def test_log_mel_of_a_batch_of_silence_and_of_nothing() -> None:
    audios = [torch.from_numpy(speech_like(n, seed=n)) for n in (500, 3210, 1600)]
    batch = log_mel(torch.nn.utils.rnn.pad_sequence(audios, batch_first=True))
    for row, audio in zip(batch, audios, strict=True):
        alone = log_mel(audio)
        torch.testing.assert_close(row[: len(alone)], alone)
    torch.testing.assert_close(log_mel(torch.zeros(500)), torch.full((4, 80), -10.0))
    assert log_mel(torch.zeros(0)).shape == (0, 80) and log_mel(torch.zeros(3, 0)).shape == (3, 0, 80)
    filters = mel_filters(80, device=CPU, scale="htk", fft=512)
    assert (filters.sum(0) > 0).all(), "no filter falls between two bins"


def test_silence_and_nothing() -> None:
    with pytest.raises(ValueError, match=r"audio has shape \[1, 500\], expected \[N\]"):
        whisper_log_mel(torch.zeros(1, 500))
    assert whisper_log_mel(torch.zeros(0)).shape == (0, 80)
    silence = whisper_log_mel(torch.zeros(500))
    torch.testing.assert_close(silence, torch.full((4, 80), -1.5))


def test_other_types_and_autocast() -> None:
    audio = torch.from_numpy(speech_like(5000))
    expected = whisper_log_mel(audio)
    torch.testing.assert_close(whisper_log_mel(audio.double()), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(whisper_log_mel(audio), expected)


def test_filters_have_unit_area() -> None:
    filters = mel_filters(80, device=CPU)
    assert filters.shape == (WINDOW // 2 + 1, 80) and HOP == 160
    assert (filters >= 0).all() and (filters.sum(0) > 0).all()
    torch.testing.assert_close(filters[:, 60:].sum(0) * 40.0, torch.ones(20), atol=0.05, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_same_on_the_gpu() -> None:
    audio = torch.from_numpy(speech_like(48000))
    features = whisper_log_mel(audio.cuda())
    assert features.is_cuda
    torch.testing.assert_close(features.cpu(), whisper_log_mel(audio), atol=1e-4, rtol=0)
