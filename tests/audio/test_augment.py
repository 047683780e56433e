"""Augmentation is a pure function of (seed, epoch, utterance) and does what its figures say."""

from __future__ import annotations

import numpy as np
import pytest

from duolect.audio.augment import (
    Augmentation,
    SpecAugment,
    add_noise,
    augment_audio,
    change_speed,
    hidden_features,
    noise,
    random_for,
    speechless,
    speed_for,
)

NO_AUGMENTATION = Augmentation(speeds=(1.0,), noise_chance=0.0, spec=None)
SPEECH = np.sin(np.arange(16000) * 0.05).astype(np.float32) * 0.3


def test_same_seed_epoch_and_utterance_give_the_same() -> None:
    draws = {key: random_for(*key).random() for key in ((0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b"))}
    assert len(set(draws.values())) == 4
    one, two = (augment_audio(SPEECH, random_for(0, 3, "a"), Augmentation(noise_chance=1.0), others=[SPEECH]) for _ in range(2))
    assert np.array_equal(one, two) and one.dtype == np.float32
    masked = [hidden_features(300, 80, random_for(0, 3, "a"), SpecAugment(), step=30_000) for _ in range(2)]
    assert np.array_equal(*masked) and masked[0].any()


def test_a_speed_is_known_before_the_audio() -> None:
    settings = Augmentation(speeds=(0.9, 1.0, 1.1))
    drawn = [speed_for(0, epoch, "a", settings) for epoch in range(60)]
    assert drawn == [speed_for(0, epoch, "a", settings) for epoch in range(60)] and set(drawn) == set(settings.speeds)
    assert {speed_for(0, 0, name, NO_AUGMENTATION) for name in "abc"} == {1.0}
    slow = augment_audio(SPEECH, random_for(0, 0, "a"), NO_AUGMENTATION, speed=0.9)
    assert np.array_equal(slow, change_speed(SPEECH, 0.9))


def test_no_augmentation_is_none() -> None:
    assert np.array_equal(augment_audio(SPEECH, random_for(0, 0, "a"), NO_AUGMENTATION), SPEECH)


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


@pytest.mark.parametrize(
    ("step", "times", "bands"), [(0, (0, 0), (0, 0)), (5_000, (0, 5), (0, 2)), (15_000, (1, 10), (1, 3)), (25_000, (2, 20), (2, 5))]
)
def test_masks_come_in_stages_and_within_their_widths(step: int, times: tuple[int, int], bands: tuple[int, int]) -> None:
    """Widths of 1 make the numbers of masks countable, up to those that fall on the same place or are empty."""
    settings, most = SpecAugment(time_width=1, mel_width=1), [0, 0]
    for seed in range(300):
        hidden = hidden_features(500, 80, random_for(seed, 0, "a"), settings, step=step)
        most = [max(old, int(hidden.all(axis).sum())) for old, axis in zip(most, (1, 0), strict=True)]
    assert most[0] <= times[1] and most[1] <= bands[1] and (most[0] > 0) == (times[1] > 0) and most[1] >= min(1, bands[1])


def test_masks_fit_into_short_audio() -> None:
    assert hidden_features(1, 80, random_for(0, 0, "a"), SpecAugment(ramp=(0, 0, 0)), step=0).shape == (1, 80)
    wide = [hidden_features(100, 80, random_for(i, 0, "a"), SpecAugment(ramp=(0, 10**9, 10**9)), step=0) for i in range(50)]
    assert max(int(x.all(1).sum()) for x in wide) <= 2 * 20 and max(int(x.all(0).sum()) for x in wide) <= 2 * 16


def test_speech_may_be_replaced_by_silence_or_noise_of_any_level() -> None:
    sounds = [speechless(16000, random_for(0, 0, str(i))) for i in range(200)]
    assert all(len(x) == 16000 and x.dtype == np.float32 and np.isfinite(x).all() for x in sounds)
    levels = np.array([20 * np.log10(np.std(x)) for x in sounds if x.any()])
    assert 110 < len(levels) < 180 and -81 < levels.min() < -70 and -25 < levels.max() < -14
