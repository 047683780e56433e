"""The spotter: Whisper's decoder layers, one frame at a time and each in its window, is what all frames at once must equal."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import WhisperConfig, WhisperForConditionalGeneration

from duolect.models import ModelError
from duolect.models.copying import AGO, PLACES, CopyingHead, within
from duolect.models.ctc import CtcModel
from duolect.models.embedded import SHIPPED
from duolect.models.encoders import Encoded, encoder_from_settings
from duolect.models.extended import ExtendedEncoder, TopDims
from duolect.models.lora import Lora
from duolect.models.spotter import END, PROMPT, Spotter, SpotterDims, SpottingEncoder
from duolect.vocabulary import CharacterVocabulary, load_vocabulary
from tests.models.test_encoders import tiny_whisper


def whisper_with_tokenizer(folder: Path, words: tuple[str, ...] = PROMPT, **sizes: int) -> WhisperForConditionalGeneration:
    model = tiny_whisper(folder, **sizes)
    pieces = ["ab", " Ab", " it's", "a1", END, *(f"{i}" for i in range(5, 64 - len(words))), *words]
    tokenizer = Tokenizer(WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="ab"))
    tokenizer.decoder = Fuse()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.save(str(folder / "tokenizer.json"))
    return model


def one_by_one(model: WhisperForConditionalGeneration, labels: list[int], frames: Tensor, *, step: int, back: int, ahead: int) -> Tensor:
    """[N, D]: for every frame the decoder's own layers over the prompt, whose last label sees the window alone."""
    decoder, count = model.model.decoder, len(labels)
    causal = torch.full((count, count), -torch.inf).triu(1)[None, None]
    states = []
    for place in range(0, len(frames), step):
        seen = torch.zeros(count, len(frames))
        seen[-1] = -torch.inf
        seen[-1, max(0, place - back) : place + ahead] = 0.0
        x = (decoder.embed_tokens.weight[labels] + decoder.embed_positions.weight[:count])[None]
        for layer in decoder.layers:
            out = layer(x, attention_mask=causal, encoder_hidden_states=frames[None], encoder_attention_mask=seen[None, None])
            x = out[0] if isinstance(out, tuple) else out
        states.append(decoder.layer_norm(x)[0, -1])
    return torch.stack(states)


@pytest.mark.parametrize(("step", "back", "ahead"), [(2, 4, 12), (1, 0, 1), (3, 7, 40)])
def test_all_frames_at_once_are_each_alone_in_its_window(tmp_path: Path, step: int, back: int, ahead: int) -> None:
    model = whisper_with_tokenizer(tmp_path)
    spotter = Spotter.from_whisper(tmp_path, step=step, back=back, ahead=ahead).eval()
    lengths = torch.tensor([23, 1, 14])
    frames = torch.randn(3, 23, 16)
    with torch.inference_mode():
        got = spotter(Encoded(frames, lengths))
        labels = [60, 63] if model.config.vocab_size <= 51864 else [60, 61, 62, 63]
        for row, n in enumerate(lengths.tolist()):
            expected = one_by_one(model, labels, frames[row, :n], step=step, back=back, ahead=ahead)
            expected = torch.nn.functional.layer_norm(expected, (16,))
            torch.testing.assert_close(got[row, : len(expected), :16], expected, atol=1e-5, rtol=1e-5)


def test_a_window_that_sees_nothing_is_refused() -> None:
    for wrong in ({"ahead": 0}, {"back": -1}, {"step": 0}):
        with pytest.raises(ValueError, match="sees nothing"):
            Spotter(SpotterDims(dim=16, layers=1, heads=2, **wrong))


def told(frame: Tensor) -> list[tuple[float, int]]:
    chances, high, low = frame.chunk(3)
    return [(float(c), round(float(h)) * 256 + round(float(x))) for c, h, x in zip(chances, high, low, strict=True)]


def test_what_it_names_are_the_likeliest_words(tmp_path: Path) -> None:
    model = whisper_with_tokenizer(tmp_path)
    spotter = Spotter.from_whisper(tmp_path).eval()
    assert spotter.texts == ("", "ab", " ab", " it's")  # the end and what is spelled with letters, "a1" is not
    states = torch.randn(1, 7, 16) * 5
    chances = (states[0] @ model.model.decoder.embed_tokens.weight[[4, 0, 1, 2]].T).softmax(-1)
    with torch.inference_mode():
        for half in (False, True):
            got = spotter.named(states)[0]
            for frame, expected in zip(got.half() if half else got, chances.tolist(), strict=True):
                pairs = told(frame)
                assert [word for _, word in pairs] == sorted(range(4), key=lambda i: -expected[i])
                assert [chance for chance, _ in pairs] == pytest.approx(sorted(expected, reverse=True), abs=1e-3)


def test_numbers_of_words_survive_half_precision() -> None:
    spotter = Spotter(SpotterDims(dim=16, layers=1, heads=2))
    spotter.words = torch.randn(40_000, 16)
    states = torch.randn(1, 50, 16) * 3
    best = (states[0] @ spotter.words.T).topk(32).indices
    for dtype in (torch.float16, torch.bfloat16):
        assert [[word for _, word in told(frame)] for frame in spotter.named(states)[0].to(dtype)] == best.tolist()


@pytest.mark.parametrize("weighed", [False, True])
def test_a_head_copies_pieces_of_what_is_named(weighed: bool) -> None:
    torch.manual_seed(0)
    vocabulary = CharacterVocabulary(list("abcdefghijklmnopqrstuvwxyz'|_"), delimiter="|", blank="_")
    texts = ["", " cab", "ab", " abcabcabcabc"]
    spotter = Spotter(SpotterDims(dim=16, layers=1, heads=2))
    spotter.texts, spotter.words = tuple(texts), torch.randn(len(texts), 16)
    head = CopyingHead(6, vocabulary, spotter)
    if weighed:
        torch.nn.init.normal_(head.look.weight, std=0.3)
    count = 6
    frames, chances = torch.randn(2, count, 6), torch.rand(2, count, 2) / 2
    words = torch.randint(4, (2, count, 2))
    got = head(torch.cat([frames, chances, words // 256, words % 256], -1)).exp()
    for b in range(2):
        anew = chances[b] * (spotter.words[words[b]] @ head.look(frames[b])[..., None])[..., 0].exp()
        anew = anew * (chances[b].sum(-1) / anew.sum(-1))[:, None]
        for t in range(count):
            choice = (head.choice.weight @ frames[b, t] + head.choice.bias).softmax(0)
            expected = choice[0] * (head.weight @ frames[b, t] + head.bias).softmax(0)
            expected[vocabulary.blank] += choice[1]
            for number, (ago, place) in enumerate(itertools.product(AGO, range(2 * PLACES)), start=2):
                named = [] if t < ago else list(zip(anew[t - ago], words[b, t - ago].tolist(), strict=True))
                missing = choice[number]
                for chance, word in named:
                    text = texts[word].strip()
                    labels = vocabulary.encode(text) if place < PLACES else within(vocabulary, text)
                    if place % PLACES < len(labels):
                        expected[labels[place % PLACES]] += choice[number] * chance
                        missing = missing - choice[number] * chance
                expected[vocabulary.blank] += missing
            torch.testing.assert_close(got[b, t], expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(got.sum(-1), torch.ones(2, count))
    assert head(torch.zeros(1, 0, 12)).shape == (1, 0, vocabulary.size)


def test_pieces_inside_of_a_word_have_no_word_in_front() -> None:
    vocabulary = load_vocabulary(SHIPPED / "unit-lm")
    for text in ("position", "ing", "able", "x"):
        labels = within(vocabulary, text)
        assert labels and not any(vocabulary.starts_word(x) for x in labels)
        assert vocabulary.decode([*vocabulary.encode("sup"), *labels]) == "sup" + text


def test_a_folder_holds_what_learned_and_loads_as_a_whole(tmp_path: Path) -> None:
    whisper_with_tokenizer(tmp_path / "whisper")
    torch.manual_seed(0)
    spotting = SpottingEncoder.from_whisper(str(tmp_path / "whisper"), back=2, ahead=6, lora=Lora(rank=2, targets=(), dropout=0.0))
    spotting.base.requires_grad_(False)
    encoder = ExtendedEncoder(spotting, TopDims(dim=32, layers=1))
    model = CtcModel(encoder, CharacterVocabulary(list("abeist'|_"), delimiter="|", blank="_")).eval()
    for name, weight in model.named_parameters():
        if name.endswith(".up"):  # as if it had learned
            torch.nn.init.normal_(weight, std=0.1)
    model.save(tmp_path / "model", card="", dtype=torch.float32)
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert {n.rsplit(".", 1)[-1] for n in stored if n.startswith("encoder.base.")} == {"up", "down"}
    again = CtcModel.load(tmp_path / "model")
    audio = [np.random.default_rng(0).standard_normal(6000).astype(np.float32)]
    torch.testing.assert_close(again.log_probs_of(audio).log_probs, model.log_probs_of(audio).log_probs, atol=1e-4, rtol=1e-4)
    again.save(tmp_path / "whole", card="", dtype=torch.float32)  # no low-rank paths any more
    whole = CtcModel.load(tmp_path / "whole")
    torch.testing.assert_close(whole.log_probs_of(audio).log_probs, again.log_probs_of(audio).log_probs, atol=1e-5, rtol=1e-5)
    shutil.rmtree(tmp_path / "whisper")
    with pytest.raises((ModelError, OSError)):
        CtcModel.load(tmp_path / "model")


def test_a_multilingual_model_is_asked_in_english(tmp_path: Path) -> None:
    whisper_with_tokenizer(tmp_path)
    config = WhisperConfig.from_pretrained(tmp_path)
    config.is_multilingual = True
    config.save_pretrained(tmp_path)
    assert Spotter.from_whisper(tmp_path).dims.prompt == 4
    whisper_with_tokenizer(tmp_path, ("a", "b"))
    with pytest.raises(ModelError, match="its tokenizer knows none of"):
        Spotter.from_whisper(tmp_path)


def test_what_lies_outside_of_the_window_is_heard_by_the_prompt_alone() -> None:
    torch.manual_seed(0)
    spotter = Spotter(SpotterDims(dim=16, layers=2, heads=2, prompt=1, back=2, ahead=4)).eval()
    frames = torch.randn(1, 20, 16)
    other = frames.clone()
    other[:, 12] = 9.0
    with torch.inference_mode():
        one, two = (spotter(Encoded(x, torch.tensor([20])))[0, :, :16] for x in (frames, other))
    changed = (one - two).abs().amax(-1) > 1e-6
    assert changed.nonzero().flatten().tolist() == [5, 6, 7]  # frames 10, 12, 14: windows of 8 to 13, 10 to 15, 12 to 17


@pytest.mark.parametrize("step", [2, 3])
def test_padding_changes_nothing(tmp_path: Path, step: int) -> None:
    whisper_with_tokenizer(tmp_path)
    encoder = SpottingEncoder.from_whisper(str(tmp_path), step=step, back=2, ahead=6).eval()
    again = encoder_from_settings(encoder.settings()).eval()
    features, lengths = torch.randn(3, 60, 20), torch.tensor([60, 31, 1])
    with torch.inference_mode():
        one, two = encoder(features, lengths), again(features, lengths)
        torch.testing.assert_close(one.frames, two.frames)
        assert one.lengths.tolist() == [-(-n // (2 * step)) for n in (60, 32, 2)] and encoder.seconds_per_frame == pytest.approx(
            0.02 * step
        )
        for row, n in enumerate(lengths.tolist()):
            alone = encoder(features[row : row + 1, :n], lengths[row : row + 1])
            torch.testing.assert_close(one.frames[row, : int(one.lengths[row])], alone.frames[0], atol=1e-4, rtol=1e-4)
            assert not one.frames[row, int(one.lengths[row]) :].any()
    with pytest.raises(ValueError, match="layer 1 is to be tapped"):
        encoder(features, lengths, taps=(1,))
