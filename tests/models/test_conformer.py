"""The Conformer: padding never changes a result, in training neither, and its parts are what independent implementations compute."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import Wav2Vec2ConformerConfig
from transformers.models.wav2vec2_conformer import modeling_wav2vec2_conformer as reference

from duolect.models.conformer import PRESETS, ConformerDims, ConformerEncoder, MaskedBatchNorm, RelativeAttention, shifted, sinusoids
from duolect.models.encoders import encoder_from_settings, frame_mask

LENGTHS = (100, 37, 1, 64, 99, 2)
SMALL = ConformerDims(mels=10, dim=16, layers=3, heads=2, kernel=6, channels=(4, 4, 6), dropout=0.0, attention_dropout=0.0)


def encoder(dims: ConformerDims = SMALL, *, seed: int = 0) -> ConformerEncoder:
    torch.manual_seed(seed)
    made = ConformerEncoder(dims)
    with torch.no_grad():
        for module in made.modules():
            if isinstance(module, RelativeAttention):
                module.content_bias.normal_()
                module.distance_bias.normal_()
            if isinstance(module, MaskedBatchNorm):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
    return made.eval()


@pytest.mark.parametrize("dims", [SMALL, replace(SMALL, subsampling=4, kernel=5, mels=9)], ids=["by 6, even kernel", "by 4, odd mels"])
def test_padding_changes_nothing(dims: ConformerDims) -> None:
    model, features = encoder(dims), [torch.randn(n, dims.mels) for n in LENGTHS]
    hidden = [torch.rand(n, dims.mels) < 0.2 for n in LENGTHS]
    with torch.inference_mode():
        padded = pad_sequence(features, batch_first=True, padding_value=7.0)
        batch = model(padded, torch.tensor(LENGTHS), taps=(1, 3), hidden=pad_sequence(hidden, batch_first=True))
        assert torch.equal(batch.taps[3], batch.frames)
        for row, (x, h) in enumerate(zip(features, hidden, strict=True)):
            alone = model(x[None], torch.tensor([len(x)]), taps=(1,), hidden=h[None])
            n = int(alone.lengths[0])
            assert n == int(batch.lengths[row]) == -(-len(x) // dims.subsampling) == alone.frames.shape[1]
            torch.testing.assert_close(batch.frames[row, :n], alone.frames[0], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(batch.taps[1][row, :n], alone.taps[1][0], atol=1e-5, rtol=1e-5)
            assert batch.frames[row, n:].abs().sum() == 0 == batch.taps[1][row, n:].abs().sum()


def test_padding_changes_nothing_in_training_either() -> None:
    features, more = pad_sequence([torch.randn(n, 10) for n in LENGTHS], batch_first=True), torch.full((len(LENGTHS), 53, 10), 7.0)
    found = []
    for x in (features, torch.cat([features, more], 1)):
        model = encoder().train()
        out = model(x, torch.tensor(LENGTHS))
        weight = torch.linspace(-1, 1, 17 * 16).view(17, 16)
        (out.frames[:, :17] * weight).sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        found.append((out.frames[:, :17], dict(model.named_buffers()), gradients))
    for a, b in zip(found[0][1:], found[1][1:], strict=True):
        for name in a:
            torch.testing.assert_close(a[name], b[name], atol=2e-5, rtol=1e-4, msg=name)
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-5, rtol=1e-5)


def test_training_hears_others_through_batch_norm_alone() -> None:
    model, features = encoder().train(), [torch.randn(n, 10) for n in LENGTHS]
    for module in model.modules():
        if isinstance(module, MaskedBatchNorm):
            module.eval()
    batch = model(pad_sequence(features, batch_first=True), torch.tensor(LENGTHS))
    for row, x in enumerate(features):
        alone = model(x[None], torch.tensor([len(x)])).frames[0]
        torch.testing.assert_close(batch.frames[row, : len(alone)], alone, atol=1e-5, rtol=1e-5)


def test_batch_norm_is_torchs_over_the_real_frames() -> None:
    ours, theirs, mask = MaskedBatchNorm(5, affine="yes"), torch.nn.BatchNorm1d(5), frame_mask(torch.tensor([4, 7, 1]), 7)
    x = torch.randn(3, 7, 5) * 3 + 10
    for mode in (True, False):
        got, expected = ours.train(mode)(x, mask), theirs.train(mode)(x[mask])
        torch.testing.assert_close(got[mask], expected)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    half = ours.train()(x.bfloat16(), mask)
    assert half.dtype == torch.bfloat16 and ours.running_mean.dtype == torch.float32


def naive_attention(layer: RelativeAttention, x: np.ndarray, *, real: int) -> np.ndarray:
    """One utterance [T, D], by the formula and in loops."""

    def linear(module: torch.nn.Linear, y: np.ndarray) -> np.ndarray:
        bias = 0 if module.bias is None else module.bias.detach().double().numpy()
        return y @ module.weight.detach().double().numpy().T + bias

    frames, dim = x.shape
    size = dim // layer.heads
    q, k, v = (linear(f, x) for f in (layer.query, layer.key, layer.value))
    u, w = (b.detach().double().numpy()[:, 0] for b in (layer.content_bias, layer.distance_bias))
    rates = 10_000.0 ** (-np.arange(0, dim, 2) / dim)
    out = np.zeros_like(x)
    for h in range(layer.heads):
        part = slice(h * size, (h + 1) * size)
        for i in range(frames):
            scores = np.empty(real)
            for j in range(real):
                r = linear(layer.distance, np.concatenate([np.sin((i - j) * rates), np.cos((i - j) * rates)]))[part]
                scores[j] = ((q[i, part] + u[h]) @ k[j, part] + (q[i, part] + w[h]) @ r) / math.sqrt(size)
            weights = np.exp(scores - scores.max())
            out[i, part] = (weights / weights.sum()) @ v[:real, part]
    return linear(layer.out, out)


def test_attention_is_the_formula() -> None:
    layer = encoder().layers[0].attention
    for frames, real in ((9, 9), (9, 5), (1, 1), (2, 1)):
        x = torch.randn(1, frames, 16)
        distances = sinusoids(torch.arange(frames, -frames, -1), 16)
        with torch.inference_mode():
            got = layer(x, frame_mask(torch.tensor([real]), frames), distances)[0]
        expected = naive_attention(layer, x[0].double().numpy(), real=real)
        np.testing.assert_allclose(got[:real].numpy(), expected[:real], atol=1e-5)


def test_attention_and_its_gradient_are_those_of_transformers() -> None:
    config = Wav2Vec2ConformerConfig(hidden_size=16, num_attention_heads=2, position_embeddings_type="relative", attention_dropout=0.0)
    theirs, ours, frames = reference.Wav2Vec2ConformerSelfAttention(config), encoder().layers[1].attention, 11
    names = {"query": "linear_q", "key": "linear_k", "value": "linear_v", "out": "linear_out", "distance": "linear_pos"}
    with torch.no_grad():
        for mine, name in names.items():
            getattr(theirs, name).load_state_dict(getattr(ours, mine).state_dict())
        theirs.pos_bias_u.copy_(ours.content_bias[:, 0])
        theirs.pos_bias_v.copy_(ours.distance_bias[:, 0])
    distances = sinusoids(torch.arange(frames, -frames, -1), 16)
    x = torch.randn(2, frames, 16)
    expected = theirs(x, relative_position_embeddings=distances[None, 1:])[0]
    got = ours(x, torch.ones(2, frames, dtype=torch.bool), distances)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    for out in (expected, got):
        out.square().sum().backward()
    for mine, name in names.items():
        torch.testing.assert_close(getattr(ours, mine).weight.grad, getattr(theirs, name).weight.grad, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours.distance_bias.grad[:, 0], theirs.pos_bias_v.grad, atol=1e-4, rtol=1e-4)


def test_shifting_copies_nothing() -> None:
    scores = torch.arange(3 * 6.0).view(1, 3, 6)
    view = shifted(scores)
    assert view.data_ptr() == scores[0, 0, 3:].data_ptr()
    assert view[0].tolist() == [[float(scores[0, i, 3 - i + j]) for j in range(3)] for i in range(3)]


@pytest.mark.parametrize("kernel", [1, 4, 5])
def test_convolution_is_the_formula(kernel: int) -> None:
    module = encoder(replace(SMALL, kernel=kernel)).layers[0].conv
    x, real = torch.randn(1, 8, 16), 6
    with torch.inference_mode():
        got = module(x, frame_mask(torch.tensor([real]), 8))[0, :real]
        a, b = module.gate(x[0, :real]).double().chunk(2, -1)
        gated, norm = (a / (1 + (-b).exp())).numpy(), module.norm
        weight, bias = module.depthwise.weight.double().numpy()[:, 0], module.depthwise.bias.double().numpy()
        mixed = np.tile(bias, (real, 1))
        for t in range(real):
            for k in range(kernel):
                at = t + k - (kernel - 1) // 2
                mixed[t] += gated[at] * weight[:, k] if 0 <= at < real else 0.0
        y = (torch.from_numpy(mixed) - norm.running_mean) / (norm.running_var + 1e-5).sqrt() * norm.weight + norm.bias
        torch.testing.assert_close(got, module.out((y / (1 + (-y).exp())).float()), atol=1e-5, rtol=1e-5)


def test_hidden_features_are_the_mean_after_the_norm() -> None:
    model = encoder()
    features, hidden = torch.randn(1, 30, 10), torch.zeros(1, 30, 10, dtype=torch.bool)
    hidden[:, 4:9], hidden[..., 2] = True, True
    at_the_mean = torch.where(hidden, model.norm.running_mean, features)
    with torch.inference_mode():
        got, expected = model(features, torch.tensor([30]), hidden=hidden), model(at_the_mean, torch.tensor([30]))
    torch.testing.assert_close(got.frames, expected.frames)


def test_dropout_is_one_draw_for_all_frames() -> None:
    dropped = encoder(replace(SMALL, dropout=0.5)).train().dropout(torch.ones(2, 7, 16))
    assert torch.equal(dropped, dropped[:, :1].expand_as(dropped)) and set(dropped.unique().tolist()) == {0.0, 2.0}
    assert not torch.equal(dropped[0], dropped[1])


def test_settings_and_presets() -> None:
    again = encoder_from_settings(json.loads(json.dumps(encoder().settings())))
    assert isinstance(again, ConformerEncoder) and again.dims == SMALL
    assert again.seconds_per_frame == pytest.approx(0.06) and again.depth == 3
    sizes = {}
    with torch.device("meta"):
        for name, dims in PRESETS.items():
            sizes[name] = sum(p.numel() for p in ConformerEncoder(dims).parameters()) / 1e6
    assert sizes == pytest.approx({"tiny": 2.57, "small": 77.2, "base": 406.2}, rel=0.01)
    assert [PRESETS[n].heads for n in PRESETS] == [4, 8, 8] and ConformerDims.of(layers=2, dim=144, mels=10).heads == 4
    with pytest.raises(ValueError, match="dim must be even and a multiple of heads"):
        ConformerEncoder(replace(SMALL, heads=3))
    with pytest.raises(ValueError, match=r"layer 4 is to be tapped, but only 1 \.\. 3"):
        encoder()(torch.randn(1, 9, 10), torch.tensor([9]), taps=(4,))


def test_bfloat16_autocast_is_close_and_has_gradients() -> None:
    model, features, lengths = encoder().train(), torch.randn(2, 60, 10), torch.tensor([60, 41])
    exact = encoder().train()(features, lengths).frames
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(features, lengths).frames
    assert (rough.float() - exact).abs().max() < 0.25
    rough.float().square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_same_on_the_gpu() -> None:
    features, lengths = torch.randn(2, 60, 10), torch.tensor([60, 41])
    with torch.inference_mode():
        got = encoder().cuda()(features.cuda(), lengths.cuda()).frames.cpu()
        torch.testing.assert_close(got, encoder()(features, lengths).frames, atol=1e-3, rtol=1e-3)
