"""Encoders: padding never changes a result, and Hugging Face's Whisper weights mean here what they mean there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn.utils.rnn import pad_sequence
from transformers import WhisperConfig, WhisperForConditionalGeneration

from duolect.models import ModelError
from duolect.models.embedded import where
from duolect.models.encoders import WhisperDims, WhisperEncoder, encoder_from_settings, frame_mask, stack_frames

LENGTHS = (100, 37, 1, 64, 99, 2)


def tiny_whisper(folder: Path, *, mels: int = 20, positions: int = 50) -> WhisperForConditionalGeneration:
    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=64,
        num_mel_bins=mels,
        d_model=16,
        encoder_layers=3,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_source_positions=positions,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=1,
    )
    model = WhisperForConditionalGeneration(config).eval()
    config.save_pretrained(folder)
    weights = {k: v.clone() for k, v in model.state_dict().items() if k != "proj_out.weight"}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return model


def test_gives_what_hugging_face_gives_on_full_length(tmp_path: Path) -> None:
    theirs = tiny_whisper(tmp_path).model.encoder
    features = torch.randn(2, 100, 20)
    with torch.inference_mode():
        expected = theirs(features.transpose(1, 2)).last_hidden_state
        got = WhisperEncoder.from_whisper(tmp_path).eval()(features, torch.tensor([100, 100]))
    assert got.lengths.tolist() == [50, 50]
    torch.testing.assert_close(got.frames, expected, atol=1e-5, rtol=1e-5)


def test_padding_changes_nothing() -> None:
    torch.manual_seed(1)
    encoder = WhisperEncoder(WhisperDims(mels=20, dim=16, layers=3, heads=2, positions=50)).eval()
    _require_padding_invariant(encoder, [torch.randn(n, 20) for n in LENGTHS])


def test_what_lies_beyond_the_length_is_not_heard() -> None:
    encoder = WhisperEncoder(WhisperDims(mels=20, dim=16, layers=2, heads=2, positions=50)).eval()
    features = torch.randn(1, 60, 20)
    other = features.clone()
    other[:, 41:] = 100.0
    with torch.inference_mode():
        torch.testing.assert_close(encoder(features, torch.tensor([41])).frames, encoder(other, torch.tensor([41])).frames)


def test_settings_build_the_same_encoder() -> None:
    encoder = WhisperEncoder(WhisperDims(mels=20, dim=16, layers=2, heads=2, positions=50))
    again = encoder_from_settings(encoder.settings())
    again.load_state_dict(encoder.state_dict())
    assert again.settings() == encoder.settings()
    with pytest.raises(ValueError, match="'rnn' is unknown"):
        encoder_from_settings({"type": "rnn"})


@pytest.mark.parametrize(
    "settings",
    [
        {"type": "whisper", "dim": 16, "heads": 2, "layers": 1, "merge_after": 3},
        {"type": "extended", "base": {"type": "whisper"}, "top": {"dim": 8, "layers": 1, "heads": 2}, "merge_after": 3},
        {"type": "extended", "base": {"type": "whisper"}, "top": {"merge_after": 3}},
        {"type": "extended", "base": 3, "top": {}},
        {"type": "extended"},
        {"type": "recurrent"},
    ],
)
def test_settings_of_another_version_are_refused_in_a_line(settings: dict[str, object]) -> None:
    with pytest.raises(ModelError, match=r"^config.json describes an encoder that this version of duolect does not have"):
        encoder_from_settings(settings)


def test_too_long_is_refused_with_the_seconds() -> None:
    encoder = WhisperEncoder(WhisperDims(mels=20, dim=16, layers=1, heads=2, positions=50))
    with pytest.raises(ValueError, match=r"1\.2 s of audio > the encoder's 1 s"):
        encoder(torch.randn(1, 120, 20), torch.tensor([120]))


def test_stacking_zeroes_what_is_no_frame() -> None:
    frames, lengths = stack_frames(torch.ones(2, 5, 3), torch.tensor([5, 2]), 2)
    assert frames.shape == (2, 3, 6) and lengths.tolist() == [3, 1]
    assert frames[0, 2].tolist() == [1, 1, 1, 0, 0, 0] and frames[1, 1:].abs().sum() == 0
    assert frame_mask(lengths, 3).tolist() == [[True] * 3, [True, False, False]]


@pytest.mark.slow
def test_padding_changes_nothing_on_real_whisper() -> None:
    folder = where("whisper-tiny.en") or where("whisper-base")
    if folder is None:
        pytest.skip("no Whisper in the cache: duolect models pull whisper-tiny.en")
    torch.manual_seed(2)
    features = [torch.randn(n, 80) * 0.4 for n in (500, 33, 250)]
    encoder = WhisperEncoder.from_whisper(folder).eval()
    _require_padding_invariant(encoder, features, tolerance=1e-4)
    # In fp64 nothing is left of the difference: it was rounding in matrix products of other shapes, not a leak through a mask.
    _require_padding_invariant(encoder.double(), [x.double() for x in features], tolerance=1e-10)


def _require_padding_invariant(encoder: WhisperEncoder, features: list[torch.Tensor], *, tolerance: float = 1e-5) -> None:
    with torch.inference_mode():
        batch = encoder(pad_sequence(features, batch_first=True, padding_value=7.0), torch.tensor([len(x) for x in features]))
        for row, x in enumerate(features):
            alone = encoder(x[None], torch.tensor([len(x)]))
            n = int(alone.lengths[0])
            assert n == int(batch.lengths[row])
            torch.testing.assert_close(batch.frames[row, :n], alone.frames[0, :n], atol=tolerance, rtol=tolerance)
            assert batch.frames[row, n:].abs().sum() == 0
