"""Encoders of transformers keep the contract of ours: no padding is heard, taps are layers, folders load."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    HubertConfig,
    HubertForCTC,
    ParakeetCTCConfig,
    ParakeetEncoderConfig,
    ParakeetFeatureExtractor,
    ParakeetForCTC,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    WavLMConfig,
    WavLMForCTC,
)

from duolect.models import ModelError
from duolect.models.ctc import CtcModel
from duolect.models.encoders import Encoder, encoder_from_settings
from duolect.models.hf_encoder import HuggingFaceEncoder
from duolect.vocabulary import SentencePieceVocabulary
from tests.conftest import WORDS, sentence_pieces
from tests.models.test_ctc import CHARACTERS, hugging_face, noise

SECONDS = (0.7, 0.05, 1.3)


def parakeet(folder: Path) -> Path:
    torch.manual_seed(4)
    dims = ParakeetEncoderConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_mel_bins=80, subsampling_conv_channels=8
    )
    config = ParakeetCTCConfig(vocab_size=len(CHARACTERS), pad_token_id=0, encoder_config=dims.to_dict())
    ParakeetForCTC(config).save_pretrained(folder)
    ParakeetFeatureExtractor(feature_size=80).save_pretrained(folder)
    return folder


@pytest.fixture(params=["wav2vec2", "wav2vec2 group", "hubert", "wavlm", "parakeet"])
def encoder(request: pytest.FixtureRequest, tmp_path: Path) -> Encoder:
    kinds = {"wav2vec2": (Wav2Vec2Config, Wav2Vec2ForCTC), "hubert": (HubertConfig, HubertForCTC), "wavlm": (WavLMConfig, WavLMForCTC)}
    name, _, norm = request.param.partition(" ")
    folder = parakeet(tmp_path) if name == "parakeet" else hugging_face(tmp_path, *kinds[name], norm or "layer")
    return HuggingFaceEncoder.load(folder).eval()


def run(encoder: Encoder, seconds: tuple[float, ...], **options):
    features = [encoder.features(torch.from_numpy(noise(s, i))) for i, s in enumerate(seconds)]
    lengths = torch.tensor([len(x) for x in features])
    with torch.no_grad():
        return encoder(nn.utils.rnn.pad_sequence(features, batch_first=True), lengths, **options)


def test_padding_is_not_heard(encoder: Encoder) -> None:
    batch = run(encoder, SECONDS, taps=(1, encoder.depth))
    assert batch.frames.shape[2] == encoder.dim
    for i, _ in enumerate(SECONDS):
        features = encoder.features(torch.from_numpy(noise(SECONDS[i], i)))
        with torch.no_grad():
            alone = encoder(features[None], torch.tensor([len(features)]))
        count = int(alone.lengths[0])
        assert int(batch.lengths[i]) == count == alone.frames.shape[1]
        torch.testing.assert_close(batch.frames[i, :count], alone.frames[0], atol=1e-3, rtol=1e-3)
        assert not batch.frames[i, count:].any()
    assert torch.equal(batch.taps[encoder.depth], batch.frames) and not torch.equal(batch.taps[1], batch.frames)


def test_frames_last_as_long_as_it_says(encoder: Encoder) -> None:
    count = int(run(encoder, (4.0,)).lengths[0])
    assert count * encoder.seconds_per_frame == pytest.approx(4.0, abs=2 * encoder.seconds_per_frame)


def test_it_is_an_encoder_of_a_ctc_model(encoder: Encoder, tmp_path: Path) -> None:
    vocabulary = SentencePieceVocabulary(sentence_pieces([WORDS] * 5).model, blank="last")
    model = CtcModel(encoder, vocabulary, aux={1: vocabulary}).eval()
    model.save(tmp_path / "own", card="", dtype=torch.float32)
    again, audios = CtcModel.load(tmp_path / "own"), [noise(s, i) for i, s in enumerate(SECONDS)]
    wanted, found = model.log_probs_of(audios), again.log_probs_of(audios)
    assert torch.equal(wanted.lengths, found.lengths)
    torch.testing.assert_close(wanted.log_probs, found.log_probs, atol=1e-5, rtol=1e-5)
    assert encoder_from_settings(encoder.settings()).depth == encoder.depth


def test_what_is_hidden_is_not_heard(encoder: Encoder) -> None:
    hidden = torch.zeros(1, 70, encoder.mels, dtype=torch.bool)
    same = run(encoder, (0.7,), hidden=hidden)
    hidden[:, 10:40] = True
    other = run(encoder, (0.7,), hidden=hidden)
    assert torch.equal(same.frames, run(encoder, (0.7,)).frames) and not torch.allclose(same.frames, other.frames)


def test_what_is_no_encoder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="does not load as a speech encoder") as error:
        HuggingFaceEncoder.load(tmp_path)
    assert "\n" not in str(error.value)
