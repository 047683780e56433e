"""Augmentation is a pure function of (seed, epoch, utterance) and does what its figures say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from duolect.audio.augment import NO_AUGMENTATION, Augmentation, add_noise, augment_audio, change_speed, noise, random_for, spec_augment

SPEECH = np.sin(np.arange(16000) * 0.05).astype(np.float32) * 0.3


def test_same_seed_epoch_and_utterance_give_the_same() -> None:
    draws = {key: random_for(*key).random() for key in ((0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b"))}
    assert len(set(draws.values())) == 4
    one, two = (augment_audio(SPEECH, random_for(0, 3, "a"), Augmentation(noise_chance=1.0), others=[SPEECH]) for _ in range(2))
    assert np.array_equal(one, two) and one.dtype == np.float32
    masked = [spec_augment(torch.ones(300, 80), random_for(0, 3, "a"), Augmentation()) for _ in range(2)]
    assert torch.equal(*masked)


def test_no_augmentation_is_none() -> None:
    assert np.array_equal(augment_audio(SPEECH, random_for(0, 0, "a"), NO_AUGMENTATION), SPEECH)
    features = torch.randn(50, 80)
    assert torch.equal(spec_augment(features, random_for(0, 0, "a"), NO_AUGMENTATION), features)


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_speed_shortens_and_raises_the_pitch(factor: float) -> None:
    faster = change_speed(SPEECH, factor)
    assert abs(len(faster) - len(SPEECH) / factor) <= 2
    peak = np.argmax(np.abs(np.fft.rfft(faster[:14000]))) / np.argmax(np.abs(np.fft.rfft(SPEECH[:14000])))
    assert peak == pytest.approx(factor, rel=0.02)


def test_noise_has_the_asked_ratio() -> None:
    added = add_noise(SPEECH, noise(len(SPEECH), random_for(0, 0, "a")), 10.0) - SPEECH
    assert 10 * np.log10(np.mean(SPEECH**2) / np.mean(added**2)) == pytest.approx(10.0, abs=0.01)
    silence = np.zeros(100, np.float32)
    assert np.array_equal(add_noise(silence, np.ones(100, np.float32), 10.0), silence)


@pytest.mark.parametrize("samples", [1, 777, 20000])
def test_every_colour_is_finite_and_as_long_as_asked(samples: int) -> None:
    for seed in range(12):
        made = noise(samples, random_for(seed, 0, "a"), others=[SPEECH])
        assert made.shape == (samples,) and np.isfinite(made).all() and np.abs(made).max() > 0


def test_masks_stay_within_their_widths_and_leave_the_input() -> None:
    settings = Augmentation(time_masks=1, time_width=10, mel_masks=1, mel_width=5)
    features = torch.arange(100.0)[:, None] + torch.rand(100, 80)
    kept = features.clone()
    for seed in range(20):
        changed = spec_augment(features, random_for(seed, 0, "a"), settings) != features
        assert int(changed.all(1).sum()) <= 10 and int(changed.all(0).sum()) <= 5
    assert torch.equal(features, kept)
    assert spec_augment(torch.ones(1, 80), random_for(0, 0, "a"), Augmentation()).shape == (1, 80)
