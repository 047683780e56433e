"""Log-mel features, computed on the device of the samples."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from duolect.audio.io import SAMPLE_RATE

WINDOW, HOP = 400, 160  # samples: 25 ms every 10 ms
SECONDS_PER_FRAME = HOP / SAMPLE_RATE


def whisper_log_mel(audio: Tensor, *, mels: int = 80) -> Tensor:
    """Whisper's features [frames, mels] of samples [N] at 16 kHz, frames = ceil(N / 160): fp32, on the device of the samples.

    log10 of the mel power, not below its maximum - 8 over the utterance, then (x + 4) / 4. Frame t looks at samples 160t-200 .. 160t+199:
    before the first sample the audio is mirrored, behind the last one it is zero. These are the first frames of what Whisper computes from
    the audio padded with zeros to 30 s (which mirrors at 30 s instead, so the last frame of a full 30 s alone differs).
    """
    if audio.dim() != 1:
        raise ValueError(f"audio has shape {list(audio.shape)}, expected [N]: give one utterance at a time, mono")
    frames = -(-len(audio) // HOP)
    if not frames:
        return torch.zeros(0, mels, dtype=torch.float32, device=audio.device)
    with torch.autocast(audio.device.type, enabled=False):  # bf16 would cost whole decibels in the power
        power = _power(audio.float(), frames)
        log_mel = (power @ mel_filters(mels, device=audio.device)).clamp(min=1e-10).log10()
        return (torch.maximum(log_mel, log_mel.max() - 8.0) + 4.0) / 4.0


def log_mel(audio: Tensor, *, mels: int = 80) -> Tensor:
    """The Conformer's features [..., frames, mels] of samples [..., N] at 16 kHz, frames = ceil(N / 160): fp32, on the samples' device.

    log10(max(mel power, 1e-10)) of an FFT of 512, triangles of height 1 on HTK's mel scale over 0 .. 8000 Hz; neither mean nor maximum is
    taken out (paper.md 1.2). Frames lie as in `whisper_log_mel`, so an utterance's features are the same alone and in a batch padded with
    zeros.
    """
    frames = -(-audio.shape[-1] // HOP)
    if not frames:
        return torch.zeros(*audio.shape[:-1], 0, mels, dtype=torch.float32, device=audio.device)
    with torch.autocast(audio.device.type, enabled=False):
        filters = mel_filters(mels, device=audio.device, scale="htk", fft=512)
        return (_power(audio.float(), frames, fft=512) @ filters).clamp(min=1e-10).log10()


def _power(audio: Tensor, frames: int, *, fft: int = WINDOW) -> Tensor:
    """The power spectrum [..., frames, fft // 2 + 1]."""
    half = WINDOW // 2
    right = (frames - 1) * HOP + half + 1 - audio.shape[-1]  # > 0, and the mirror below always finds its `half` samples
    audio = torch.nn.functional.pad(audio, (0, right))
    audio = torch.cat([audio[..., 1 : half + 1].flip(-1), audio], -1)
    spectrum = torch.fft.rfft(audio.unfold(-1, WINDOW, HOP) * _window(audio.device), n=fft)
    return spectrum.real.square() + spectrum.imag.square()


@lru_cache(maxsize=8)
def _window(device: torch.device) -> Tensor:
    return torch.hann_window(WINDOW, dtype=torch.float32, device=device)


@lru_cache(maxsize=8)
def mel_filters(mels: int, *, device: torch.device, scale: Literal["slaney", "htk"] = "slaney", fft: int = WINDOW) -> Tensor:
    """The mel filterbank [fft // 2 + 1, mels] over 0 .. 8000 Hz: triangles, each of unit area in Hz (Slaney) or unit height (HTK)."""
    if scale == "slaney":
        # 15 mels per 1000 Hz up to 1000 Hz, then 27 mels per factor of 6.4.
        step = np.log(6.4) / 27.0
        points = np.linspace(0.0, 15.0 + np.log(SAMPLE_RATE / 2 / 1000.0) / step, mels + 2)
        edges = np.where(points < 15.0, points * 200.0 / 3.0, 1000.0 * np.exp(step * (points - 15.0)))  # Hz [mels + 2]
    else:
        edges = 700.0 * np.expm1(np.linspace(0.0, np.log1p(SAMPLE_RATE / 2 / 700.0), mels + 2))
    hertz = np.linspace(0.0, SAMPLE_RATE / 2, fft // 2 + 1)[:, None]
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    rising, falling = (hertz - low) / (centre - low), (high - hertz) / (high - centre)
    filters = np.maximum(0.0, np.minimum(rising, falling)) * (2.0 / (high - low) if scale == "slaney" else 1.0)
    return torch.tensor(filters, dtype=torch.float32, device=device)
