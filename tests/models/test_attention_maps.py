"""Attention maps are softmax(q k) by hand; looking changes nothing."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from duolect.models import ModelError
from duolect.models.adapters import AdapterDims, words_of
from duolect.models.attention_maps import AttentionMaps, Key, _watched, attention_maps
from duolect.models.ctc import CtcOutput
from duolect.models.encoders import Encoded
from duolect.models.speech_llm import SpeechLlm
from tests.models.test_attention_decoder import noise
from tests.models.test_speech_llm import HOW, PROMPTS, tiny, trained

AUDIO = noise(1.3, 1)
ADAPTERS = {"concat": AdapterDims("concat", 2), "conv": AdapterDims("conv", 3), "ctc": AdapterDims("ctc"), "words": AdapterDims("words")}


def model_of(kind: str, how: str, adapter: str = "concat") -> SpeechLlm:
    return trained(tiny(kind, adapter=ADAPTERS[adapter], **HOW[how], **PROMPTS))


def heard(model: SpeechLlm, audio: np.ndarray) -> tuple[Encoded, CtcOutput, Tensor]:
    """The encoder's frames, the CTC output and the adapted frames [T, W]."""
    features = model.ctc.encoder.features(torch.from_numpy(audio))
    heads = model.ctc.heads(features[None], torch.tensor([len(features)]))
    return heads.encoded, heads.main, model.adapter(heads.encoded, heads.main, model.embeddings)[0][0]


def scores(model: SpeechLlm, labels: list[int]) -> Tensor:
    scorer = model.scorer([AUDIO])
    gained, state = scorer.advance(scorer.start(1), torch.tensor([labels]), torch.tensor([len(labels)]))
    return gained + scorer.finish(state)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_maps_are_distributions_over_named_keys_and_looking_changes_nothing(kind: str, how: str, adapter: str) -> None:
    model = model_of(kind, how, adapter)
    piece, labels = model.vocabulary.piece, model.vocabulary.encode("abba b bab")
    before = scores(model, labels)
    maps = attention_maps(model, audio=AUDIO, labels=labels)
    torch.testing.assert_close(scores(model, labels), before, atol=0, rtol=0)

    count = len(heard(model, AUDIO)[2])
    prompts = [[Key("prompt", piece(y)) for y in prompt] for prompt in model.prompts]
    text = [Key("text", "<begin>"), *(Key("text", piece(y)) for y in labels)]
    cross = how == "cross"
    assert [k.kind for k in maps.keys[len(prompts[0]) * (not cross) :][:count]] == ["audio"] * count
    if not cross:
        assert list(maps.keys[: len(prompts[0])]) == prompts[0]
        assert list(maps.keys[len(prompts[0]) + count :]) == [*prompts[1], *text]
    assert maps.predicted == (*map(piece, labels), "<end>")
    times = [k.seconds for k in maps.keys if k.kind == "audio"]
    assert times == sorted(times) and times[0] > 0 and times[-1] < 1.3 + 3 * model.ctc.encoder.seconds_per_frame

    rows, keys = len(labels) + 1, len(maps.keys)
    assert len(maps.weights) == 2
    for weights in maps.weights:
        assert weights.shape == (2, rows, keys)
        np.testing.assert_allclose(weights.sum(2), 1, atol=1e-5)
        if not cross:
            later = np.triu(np.ones((rows, rows), dtype=bool), 1)
            assert not weights[:, :, -rows:][:, later].any(), "no label sees a later one"
            assert (weights[:, :, -rows:][:, ~later] > 0).all() and (weights[:, :, : keys - rows] > 0).all()


def turned(x: Tensor) -> Tensor:
    """[S, H, size] queries or keys at positions 0 .. S-1, rotated as Llama does."""
    size = x.shape[2]
    angle = torch.arange(len(x))[:, None] * 10000.0 ** (-torch.arange(0, size, 2) / size)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


@torch.no_grad()
@pytest.mark.parametrize("how", ["prefix", "both ways", "merged"])
def test_maps_are_the_softmax_of_queries_and_keys(how: str) -> None:
    model = model_of("llama", how)
    labels, sound = model.vocabulary.encode("ab ba"), heard(model, AUDIO)[2]
    before, after = (model.vocabulary.encode(text) for text in (model.dims.before, model.dims.after))
    first, behind = (model.embeddings(torch.tensor(x)) for x in (before, [*after, model.begin, *labels]))
    joined, place = torch.cat([first, sound, behind])[None], slice(len(before), len(before) + len(sound))
    seen = torch.ones(joined.shape[1], joined.shape[1]).tril().bool()
    if how == "both ways":
        seen[place, place] = True
    inputs: list[Tensor] = []

    def note(layer: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        x = arguments[0].clone()
        if how == "merged":  # every layer finds the audio as it was
            x[0, place] = sound
        inputs.append(x[0])
        return x, *arguments[1:]

    hooks = [layer.register_forward_pre_hook(note) for layer in model.layers]
    model.llm.base_model(inputs_embeds=joined, attention_mask=torch.where(seen, 0.0, -torch.inf)[None, None], use_cache=False)
    for hook in hooks:
        hook.remove()
    maps = attention_maps(model, audio=AUDIO, labels=labels)
    for number, (layer, x) in enumerate(zip(model.layers, inputs, strict=True)):
        attention: Any = layer.self_attn
        normed = layer.input_layernorm(x)  # type: ignore[operator]
        size = attention.head_dim
        query, key = (turned(proj(normed).unflatten(1, (-1, size))) for proj in (attention.q_proj, attention.k_proj))
        for head in range(2):
            logits = query[:, head] @ key[:, 0].T / size**0.5  # both heads share one key
            wanted = logits.masked_fill(~seen, -torch.inf).softmax(1)[-len(labels) - 1 :]
            np.testing.assert_allclose(maps.weights[number][head], wanted, atol=1e-5)


@torch.no_grad()
def test_maps_of_added_layers_are_those_of_pytorchs_attention() -> None:
    model = model_of("llama", "cross")
    labels, sound = model.vocabulary.encode("ab ba"), heard(model, AUDIO)[2]
    maps = attention_maps(model, audio=AUDIO, labels=labels)
    cross: Any = model.cross[0]
    attention = nn.MultiheadAttention(sound.shape[1], cross.heads, batch_first=True)
    attention.in_proj_weight.copy_(torch.cat([cross.query.weight, cross.key_value.weight]))
    attention.in_proj_bias.copy_(torch.cat([cross.query.bias, cross.key_value.bias]))
    text = model.embeddings(torch.tensor([model.begin, *labels]))[None]  # what the first layer is given
    _, wanted = attention(cross.norm(text), sound[None], sound[None], average_attn_weights=False)
    np.testing.assert_allclose(maps.weights[0], wanted[0], atol=1e-5)
    assert maps.audio_mass() == pytest.approx(1.0)


@torch.no_grad()
def test_merged_audio_is_not_seen_by_the_prompt_before_it() -> None:
    model = model_of("llama", "merged")
    sound, prompt = heard(model, AUDIO)[2], len(model.prompts[0])
    with _watched(model) as found:
        model.hidden(sound[None], torch.tensor([len(sound)]), torch.tensor([[model.begin]]))
    for weights in found:  # here audio comes first
        assert not weights[0, :, :prompt, : len(sound)].any() and (weights[0, :, prompt:, : len(sound)] > 0).all()


@torch.no_grad()
def test_audio_is_heard_in_the_middle_of_its_frames() -> None:
    for kind in ("concat", "conv"):
        encoded, ctc, sound = heard(model := model_of("llama", "prefix", kind), AUDIO)
        factor = ADAPTERS[kind].factor
        assert model.adapter.middles(encoded, ctc) == [factor * (i + 0.5) for i in range(len(sound))]
    encoded, ctc, _ = heard(model := model_of("llama", "prefix", "ctc"), AUDIO)
    best, at, wanted = ctc.log_probs[0].argmax(1).tolist(), 0, []
    for label, run in groupby(best):
        size = len(list(run))
        wanted += [at + size / 2] if label != model.ctc.vocabulary.blank else []
        at += size
    assert model.adapter.middles(encoded, ctc) == wanted
    encoded, ctc, sound = heard(model := model_of("llama", "prefix", "words"), AUDIO)
    middles, spoken = model.adapter.middles(encoded, ctc), words_of(best, model.ctc.vocabulary)
    assert len(middles) == len(sound) and middles[0] > spoken[0][0] and middles[-1] < spoken[-1][1]
    assert all(any(begin < t < end for begin, end, _ in spoken) for t in middles)
    silent = CtcOutput(torch.full_like(ctc.log_probs, -9.0).index_fill(2, torch.tensor(model.adapter.blank), 0.0), ctc.lengths)
    for each in (model, model_of("llama", "prefix", "ctc")):
        assert each.adapter.middles(encoded, silent) == [len(best) / 2], "where nothing was heard, one position has it all"


def test_an_error_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    for how in HOW:
        model = model_of("llama", how)
        before = scores(model, [5, 6])
        with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
            patched.setattr(model, "hidden", lambda *_: 1 / 0)
            attention_maps(model, audio=AUDIO, labels=[5])
        assert model.llm.config._attn_implementation == "duolect_packed"
        assert not model.decoder._forward_hooks and not model.decoder._forward_pre_hooks
        assert all(len(layer._forward_pre_hooks) == (how == "cross") for layer in model.layers)
        torch.testing.assert_close(scores(model, [5, 6]), before, atol=0, rtol=0)


def test_shares_of_attention() -> None:
    keys = (Key("prompt", "p"), Key("audio", "", 0.1), Key("audio", "", 0.3), Key("audio", "", 0.5), Key("text", "<begin>"))
    weights = np.array([[[0.1, 0.2, 0.3, 0.2, 0.2], [0.0, 0.5, 0.1, 0.3, 0.1]]])
    maps = AttentionMaps((weights,), ("a", "<end>"), keys)
    assert maps.audio_mass() == pytest.approx((0.7 + 0.9) / 2)
    assert maps.audio_mass(skip=2) == pytest.approx((0.5 + 0.4) / 2)
    assert maps.mass(np.array([[0, 1, 0, 0, 0], [0, 0, 0, 0, 0]], dtype=bool)) == pytest.approx(0.2), "queries without a mark do not count"
    assert maps.mass(np.zeros(5, dtype=bool)) == 0
    assert maps.within(0.2, 0.6) == range(2, 4) and maps.within(0.31, 0.33) == range(2, 3) and maps.within(7.0, 8.0) == range(3, 4)


def test_audio_that_the_model_cannot_hear_at_once_is_refused() -> None:
    with pytest.raises(ModelError, match="longer than the 1 s"):
        attention_maps(tiny(max_seconds=1.0), audio=AUDIO, labels=[5])
