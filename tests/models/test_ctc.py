"""CTC models: a batch gives what each utterance gives alone, windows cover long audio once, folders load again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    HubertConfig,
    HubertForCTC,
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
)

from duolect.audio.features import whisper_log_mel
from duolect.models import ModelError
from duolect.models.conformer import ConformerDims, ConformerEncoder, sinusoids
from duolect.models.ctc import CtcModel, HuggingFaceCtc, load_acoustic_model
from duolect.models.encoders import WhisperDims, WhisperEncoder
from duolect.models.extended import ExtendedEncoder, TopDims
from duolect.vocabulary import CharacterVocabulary, with_blank
from tests.conftest import WORDS, byte_level, sentence_pieces

TOP = TopDims(dim=16, layers=1, kernel=3, stack=2)
CHARACTERS = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ABCDE"]


def tiny(*, stack: int = 2, window_seconds: float = 28.0, top: TopDims | None = None) -> CtcModel:
    torch.manual_seed(0)
    whisper = WhisperEncoder(WhisperDims(mels=80, dim=16, layers=2, heads=2, positions=1500))
    encoder = whisper if top is None else ExtendedEncoder(whisper, top)
    return CtcModel(encoder, CharacterVocabulary(CHARACTERS), stack=stack, window_seconds=window_seconds).eval()


def noise(seconds: float, seed: int) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(int(seconds * 16000)) * 0.1).astype(np.float32)


@pytest.mark.parametrize(("stack", "top"), [(2, None), (1, None), (1, TOP)])
def test_batch_gives_what_each_gives_alone(stack: int, top: TopDims | None) -> None:
    model = tiny(stack=stack, top=top)
    audios = [noise(s, i) for i, s in enumerate((1.0, 0.01, 2.33, 0.5))]
    together = model.log_probs_of(audios)
    assert together.log_probs.dtype == torch.float32
    assert model.seconds_per_frame == pytest.approx(0.02 if (stack, top) == (1, None) else 0.04)
    for i, audio in enumerate(audios):
        alone = model.log_probs_of([audio])
        n = int(alone.lengths[0])
        assert n == int(together.lengths[i]) == -(-len(audio) // round(16000 * model.seconds_per_frame))
        torch.testing.assert_close(together.log_probs[i, :n], alone.log_probs[0], atol=1e-4, rtol=1e-4)
        assert torch.equal(together.log_probs[i, n:].argmax(-1), torch.zeros(together.log_probs.shape[1] - n, dtype=torch.long))


def test_layers_on_top_join_frames() -> None:
    encoder = tiny(stack=1, top=TOP).encoder
    assert isinstance(encoder, ExtendedEncoder)
    features, lengths = torch.randn(1, 30, 80), torch.tensor([30])  # 15 frames of the base: the last one is joined with silence
    below = encoder.base(features, lengths).frames[0]
    pairs = [torch.cat((below[i], below[i + 1] if i + 1 < len(below) else torch.zeros(16))) for i in range(0, len(below), 2)]
    joined = encoder.top.linear(encoder.top.norm(torch.stack(pairs)[None]))
    distances = sinusoids(torch.arange(8, -8, -1), 16)
    naive = encoder.top.layers[0](joined, torch.ones(1, 8, dtype=torch.bool), distances)
    torch.testing.assert_close(encoder(features, lengths).frames, naive)
    with pytest.raises(ValueError, match=r"layer 2 is to be tapped, but only 3 \.\. 3 can be"):
        encoder(features, lengths, taps=(2,))


def test_nothing_is_nothing() -> None:
    assert tiny().log_probs_of([]).log_probs.shape == (0, 0, len(CHARACTERS))


@pytest.mark.parametrize("seconds", [28.0, 28.01, 40.0, 61.337])
def test_windows_cover_long_audio_once(seconds: float) -> None:
    model = tiny()
    frames = round(seconds * 100)
    windows = model.windowing().of(0, frames)
    assert [w.keep_from for w in windows] == [0, *(w.keep_to for w in windows[:-1])] and windows[-1].keep_to == frames
    for w in windows:
        assert w.start <= w.keep_from < w.keep_to <= w.end <= frames and w.end - w.start <= 2800
        assert w.start % 4 == w.keep_from % 4 == 0
        assert w.start == 0 or w.keep_from - w.start >= 196  # two seconds of context, less a frame of rounding
    output = model.log_probs_of([noise(seconds, 3)])
    assert output.lengths.tolist() == [-(-frames // 4)]


@pytest.mark.parametrize("seconds", [0.1, 0.5, 3.0, 4.0, 5.0])
def test_short_windows_cover_long_audio_once(seconds: float) -> None:
    windows = tiny(window_seconds=seconds).windowing().of(0, 3001)
    assert [w.keep_from for w in windows] == [0, *(w.keep_to for w in windows[:-1])] and windows[-1].keep_to == 3001
    assert all(w.start <= w.keep_from < w.keep_to <= w.end and w.end - w.start <= 100 * seconds for w in windows)


def test_stitched_windows_are_those_of_the_encoder() -> None:
    model, audio = tiny(window_seconds=6.0), noise(13.0, 4)
    features = whisper_log_mel(torch.from_numpy(audio))
    output = model.log_probs_of([audio])
    (first, *_) = windows = model.windowing().of(0, len(features))
    assert len(windows) > 2
    with torch.inference_mode():
        part = model(features[None, first.start : first.end], torch.tensor([first.end - first.start]))
    torch.testing.assert_close(output.log_probs[0, : first.keep_to // 4], part.log_probs[0, : first.keep_to // 4], atol=1e-4, rtol=1e-4)


def test_folder_loads_again(tmp_path: Path) -> None:
    model = tiny()
    model.save(tmp_path / "m", card="# a card\n", dtype=torch.float32)
    again = load_acoustic_model(tmp_path / "m")
    assert isinstance(again, CtcModel) and not again.training
    assert again.vocabulary.digest() == model.vocabulary.digest()
    torch.testing.assert_close(again.log_probs_of([noise(1, 0)]).log_probs, model.log_probs_of([noise(1, 0)]).log_probs)
    assert (tmp_path / "m" / "README.md").read_text() == "# a card\n"


def test_folder_in_half_precision_is_close(tmp_path: Path) -> None:
    model = tiny()
    model.save(tmp_path, card="")
    again = CtcModel.load(tmp_path)
    assert again.head.weight.dtype == torch.float32
    got, expected = (x.log_probs_of([noise(1, 0)]).log_probs for x in (again, model))
    torch.testing.assert_close(got, expected, atol=0.02, rtol=0.02)


def test_folder_errors_name_folder_and_next_step(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json: is missing.*no model folder"):
        load_acoustic_model(tmp_path)
    tiny().save(tmp_path, card="")
    CharacterVocabulary([*CHARACTERS, "Z"]).save(tmp_path)
    with pytest.raises(ModelError, match="files of two models are mixed"):
        load_acoustic_model(tmp_path)
    tiny().save(tmp_path, card="")
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ModelError, match="does not fit"):
        load_acoustic_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read"):
        load_acoustic_model(tmp_path)


def test_a_vocabulary_without_blank_is_refused() -> None:
    encoder = WhisperEncoder(WhisperDims(mels=80, dim=16, layers=1, heads=2))
    with pytest.raises(ModelError, match="has no blank"):
        CtcModel(encoder, CharacterVocabulary(CHARACTERS[1:], blank=None))


def with_aux() -> CtcModel:
    torch.manual_seed(0)
    dims = ConformerDims(dim=16, layers=3, heads=2, kernel=4, channels=(2, 2, 4))
    vocabulary, other = CharacterVocabulary(CHARACTERS), CharacterVocabulary([*CHARACTERS, "X"], blank="X")
    return CtcModel(ConformerEncoder(dims), vocabulary, aux={2: other, 1: vocabulary}).eval()


def test_all_heads_speak_of_one_encoder_pass() -> None:
    model, features, lengths = with_aux(), torch.randn(2, 50, 80), torch.tensor([50, 31])
    with torch.inference_mode():
        heads = model.heads(features, lengths)
        torch.testing.assert_close(heads.main.log_probs, model(features, lengths).log_probs)
    assert list(heads.aux) == [1, 2] and heads.encoded.frames.shape == (2, 9, 16)
    assert [heads.aux[n].log_probs.shape for n in (1, 2)] == [(2, 9, 10), (2, 9, 11)]
    assert heads.aux[2].lengths.tolist() == [9, 6]
    hidden = torch.rand(2, 50, 80) < 0.5
    assert not torch.allclose(model.heads(features, lengths, hidden=hidden).main.log_probs, heads.main.log_probs)


@pytest.mark.parametrize("layer", [1, 2])
def test_an_auxiliary_head_can_be_the_model(tmp_path: Path, layer: int) -> None:
    model, audios = with_aux(), [noise(0.7, 1), noise(1.1, 2)]
    model.save(tmp_path / "all", card="", dtype=torch.float32)
    again = CtcModel.load(tmp_path / "all")
    torch.testing.assert_close(again.log_probs_of(audios).log_probs, model.log_probs_of(audios).log_probs)
    assert {n: v.blank for n, v in again.aux_vocabularies.items()} == {1: 0, 2: 10}
    early = CtcModel.load(tmp_path / "all", head=layer)
    assert early.encoder.depth == layer and early.vocabulary.size == 9 + layer and not early.training
    for audio in audios:
        features = model.encoder.features(torch.from_numpy(audio))
        with torch.inference_mode():
            expected = model.heads(features[None], torch.tensor([len(features)])).aux[layer]
        torch.testing.assert_close(early.log_probs_of([audio]).log_probs, expected.log_probs)
    early.save(tmp_path / "early", card="", dtype=torch.float32)
    torch.testing.assert_close(CtcModel.load(tmp_path / "early").log_probs_of(audios).log_probs, early.log_probs_of(audios).log_probs)
    with pytest.raises(ModelError, match="no auxiliary head at layer 3; it has: 1, 2"):
        CtcModel.load(tmp_path / "all", head=3)


def test_an_auxiliary_head_of_whisper() -> None:
    torch.manual_seed(0)
    vocabulary = CharacterVocabulary(CHARACTERS)
    encoder = WhisperEncoder(WhisperDims(mels=80, dim=16, layers=3, heads=2, positions=100))
    model, features, lengths = CtcModel(encoder, vocabulary, aux={2: vocabulary}).eval(), torch.randn(1, 50, 80), torch.tensor([50])
    with torch.inference_mode():
        torch.testing.assert_close(model.ending_at(2)(features, lengths).log_probs, model.heads(features, lengths).aux[2].log_probs)
        hidden = torch.zeros(1, 50, 80, dtype=torch.bool)
        hidden[:, 10:20] = True
        expected = model(torch.where(hidden, features.mean(), features), lengths).log_probs
        torch.testing.assert_close(model.heads(features, lengths, hidden=hidden).main.log_probs, expected)
    with pytest.raises(ValueError, match=r"layer 4 is to be tapped, but only 1 \.\. 3"):
        CtcModel(encoder, vocabulary, aux={4: vocabulary}).heads(features, lengths)


SMALL = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "num_feat_extract_layers": 3,
    "conv_dim": (8, 8, 8),
    "conv_kernel": (10, 8, 4),
    "conv_stride": (5, 8, 8),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "vocab_size": len(CHARACTERS) + 2,
    "pad_token_id": 0,
}


def hugging_face(folder: Path, config: type, model: type, norm: str) -> Path:
    torch.manual_seed(3)
    model(config(**SMALL, feat_extract_norm=norm, do_stable_layer_norm=norm == "layer")).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({symbol: i for i, symbol in enumerate(CHARACTERS)}))
    Wav2Vec2CTCTokenizer(str(folder / "vocab.json")).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(return_attention_mask=norm == "layer").save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("config", "model"), [(Wav2Vec2Config, Wav2Vec2ForCTC), (HubertConfig, HubertForCTC)])
@pytest.mark.parametrize("norm", ["layer", "group"])
def test_hugging_face_models_do_not_hear_the_batch(tmp_path: Path, config: type, model: type, norm: str) -> None:
    am = load_acoustic_model(hugging_face(tmp_path, config, model, norm))
    assert isinstance(am, HuggingFaceCtc) and am.together == (norm == "layer")
    audios = [noise(s, i) for i, s in enumerate((0.7, 0.01, 1.3))]
    batch = am.log_probs_of(audios)
    for i, audio in enumerate(audios):
        alone = am.log_probs_of([audio])
        assert int(alone.lengths[0]) == int(batch.lengths[i])
        torch.testing.assert_close(batch.log_probs[i, : batch.lengths[i]], alone.log_probs[0], atol=1e-4, rtol=1e-4)
    assert am.seconds_per_frame == pytest.approx(0.02)


@pytest.mark.parametrize("norm", ["layer", "group"])
def test_hugging_face_models_hear_long_audio_in_windows(tmp_path: Path, norm: str) -> None:
    am = load_acoustic_model(hugging_face(tmp_path, Wav2Vec2Config, Wav2Vec2ForCTC, norm))
    assert isinstance(am, HuggingFaceCtc)
    long, short = noise(13.003, 5), noise(5.9, 6)
    whole = am.log_probs_of([long, short])
    am.window_seconds = 6.0
    output = am.log_probs_of([long, short])
    assert torch.equal(output.lengths, whole.lengths), "windows give as many frames as the whole"
    torch.testing.assert_close(output.log_probs[1, : output.lengths[1]], whole.log_probs[1, : whole.lengths[1]], atol=1e-4, rtol=1e-4)
    windows, parts = am.windowing().of(0, len(long)), []
    assert len(windows) > 3 and max(w.end - w.start for w in windows) <= 6 * 16000
    for w in windows:
        part = am.log_probs_of([long[w.start : w.end]])
        last = int(part.lengths[0]) if w.keep_to == w.end else (w.keep_to - w.start) // 320
        parts.append(part.log_probs[0, (w.keep_from - w.start) // 320 : last])
    torch.testing.assert_close(output.log_probs[0, : output.lengths[0]], torch.cat(parts), atol=1e-4, rtol=1e-4)
    am.seconds_per_frame = 0.04
    with pytest.raises(ModelError, match=r"gave 300 frames, but one should last 0\.040 s"):
        am.log_probs_of([long])


def test_hugging_face_tokenizer_becomes_characters(tmp_path: Path) -> None:
    vocabulary = load_acoustic_model(hugging_face(tmp_path, Wav2Vec2Config, Wav2Vec2ForCTC, "group")).vocabulary
    assert isinstance(vocabulary, CharacterVocabulary)
    assert vocabulary.blank == 0 and vocabulary.size == len(CHARACTERS) + 2
    assert vocabulary.encode("abe dad") == [5, 6, 9, 4, 8, 5, 8] and vocabulary.decode([5, 0, 4, 6]) == "A B"


def test_what_is_no_ctc_model_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match="does not load as a CTC model") as error:
        load_acoustic_model(tmp_path)
    assert "\n" not in str(error.value)


def test_parakeet_does_not_hear_the_batch() -> None:
    from transformers import ParakeetCTCConfig, ParakeetEncoderConfig, ParakeetFeatureExtractor, ParakeetForCTC

    torch.manual_seed(4)
    encoder = ParakeetEncoderConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_mel_bins=80, subsampling_conv_channels=8
    )
    model = ParakeetForCTC(ParakeetCTCConfig(vocab_size=len(CHARACTERS), pad_token_id=0, encoder_config=encoder.to_dict()))
    am = HuggingFaceCtc(model, ParakeetFeatureExtractor(feature_size=80), CharacterVocabulary(CHARACTERS))
    audios = [noise(s, i) for i, s in enumerate((0.7, 1.3, 0.31))]
    batch = am.log_probs_of(audios)
    for i, audio in enumerate(audios):
        alone = am.log_probs_of([audio])
        assert int(alone.lengths[0]) == int(batch.lengths[i])
        torch.testing.assert_close(batch.log_probs[i, : batch.lengths[i]], alone.log_probs[0], atol=1e-3, rtol=1e-3)
    assert am.seconds_per_frame == pytest.approx(0.08)


def test_a_model_is_given_heads_in_another_vocabulary(tmp_path: Path) -> None:
    pieces = sentence_pieces([WORDS] * 5)
    own, other = with_blank(pieces), with_blank(byte_level([WORDS] * 5))
    assert own.digest() == pieces.digest() and own.blank == pieces.size and other.blank == other.size - 1
    torch.manual_seed(0)
    encoder = ConformerEncoder(ConformerDims.of(layers=2, dim=32, kernel=5, channels=(4, 4, 4), subsampling=4))
    model = CtcModel(encoder, own, aux={1: own}).eval()
    both = model.with_heads({2: other})
    audios = [noise(0.7, 1)]
    assert torch.equal(both.log_probs_of(audios).log_probs, model.log_probs_of(audios).log_probs)
    assert torch.equal(both.aux["1"].weight, model.aux["1"].weight) and both.aux["2"].out_features == other.size
    both.save(tmp_path / "m", card="", dtype=torch.float32)
    head = load_acoustic_model(f"{tmp_path / 'm'}#2")
    assert head.vocabulary.digest() == other.digest() and head.log_probs_of(audios).log_probs.shape[2] == other.size
    with pytest.raises(ModelError, match="no auxiliary head at layer 7"):
        load_acoustic_model(f"{tmp_path / 'm'}#7")
    with pytest.raises(ModelError, match="expected the number of a layer behind #"):
        load_acoustic_model(f"{tmp_path / 'm'}#top")


def test_blank_loses_in_recognition_alone(tmp_path: Path) -> None:
    model = tiny()
    features, lengths = torch.randn(2, 60, 80), torch.tensor([60, 31])
    blank = model.vocabulary.blank
    with torch.no_grad():
        plain = model(features, lengths).log_probs
        model.blank_penalty = 1.5
        got = model(features, lengths).log_probs
        lost = plain.clone()
        lost[..., blank] -= 1.5
        torch.testing.assert_close(got, lost - lost.logsumexp(-1, keepdim=True))
        model.save(tmp_path, card="", dtype=torch.float32)
        torch.testing.assert_close(CtcModel.load(tmp_path)(features, lengths).log_probs, got)
        torch.testing.assert_close(CtcModel.load(tmp_path).with_heads({1: model.vocabulary})(features, lengths).log_probs, got)
        model.train()
        training = model(features, lengths).log_probs
        model.blank_penalty = 0.0
        torch.testing.assert_close(model(features, lengths).log_probs, training)


@pytest.mark.parametrize(
    ("field", "value"), [("blank_penalty", float("nan")), ("blank_penalty", "much"), ("window_seconds", 0), ("stack", 0)]
)
def test_odd_settings_are_refused(tmp_path: Path, field: str, value: object) -> None:
    tiny().save(tmp_path, card="")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, field: value}))
    with pytest.raises(ModelError, match=f"{field} is .*, expected a number in"):
        CtcModel.load(tmp_path)
