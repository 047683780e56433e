"""The AED decoder: increments through the trie are its teacher-forced forward, searches over it are enumeration, losses their formula."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaModel

from duolect.models import ModelError
from duolect.models import decoder as decoder_module
from duolect.models.aed import AedModel, AedScorer, load_attention_model
from duolect.models.attention_decoder import IGNORE, AttentionDecoder, DecoderDims, histories, smoothed_cross_entropy, turned
from duolect.models.conformer import ConformerDims, ConformerEncoder, sinusoids
from duolect.models.ctc import CtcModel, load_acoustic_model
from duolect.models.encoders import Encoded
from duolect.search.fusion import EveryLabel, Fused
from duolect.search.label import label_beam_search
from duolect.search.prefix import CtcPrefix
from duolect.vocabulary import CharacterVocabulary, SentencePieceVocabulary
from tests.conftest import WORDS, bytes_in, sentence_pieces

DIMS = DecoderDims(dim=16, layers=3, heads=2, dropout=0.0, attention_dropout=0.0, aux=(2,))


def noise(seconds: float, seed: int) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(int(seconds * 16000)) * 0.1).astype(np.float32)


def tiny(*, size: int = 14, dims: DecoderDims = DIMS, seed: int = 0, max_seconds: float = 30.0) -> AedModel:
    """A random AED whose predictions differ a lot, with a head at layer 1."""
    pieces = sentence_pieces([WORDS, "ab ab abba ba", "bab bab ab"] * 5, size=size)
    vocabulary = SentencePieceVocabulary(pieces.model, blank="last")
    torch.manual_seed(seed)
    encoder = ConformerEncoder(ConformerDims(dim=16, layers=2, heads=2, kernel=4, channels=(2, 2, 4)))
    model = AedModel(CtcModel(encoder, vocabulary, aux={1: vocabulary}), dims, max_seconds=max_seconds).eval()
    with torch.no_grad():
        for p in model.decoder.parameters():
            p.mul_(2.0 if p.dim() > 1 else 1.0)
    return model


@torch.no_grad()
def from_scratch(model: AedModel, audio: np.ndarray, labels: list[int], *, end: bool = True) -> float:
    """log p(labels [eos] | audio) by one teacher-forced forward of this utterance alone."""
    features = model.ctc.encoder.features(torch.from_numpy(audio))
    out = model(features[None], torch.tensor([len(features)]), torch.tensor([labels], dtype=torch.long), torch.tensor([len(labels)]))
    log_probs = out.logits.log_softmax(-1)[0]
    targets = out.targets[0][: None if end else -1]
    return float(log_probs[torch.arange(len(targets)), targets].sum())


def test_what_will_be_held_is_known_before() -> None:
    model = tiny()
    scorer = model.scorer([noise(1.1, 0)])
    _, state = scorer.advance(scorer.start(1), torch.tensor([[5, 6, 7]]), torch.tensor([3]))
    assert bytes_in(state.trie.cache) == model.bytes_of(seconds=1.1, labels=3)


def test_increments_are_the_teacher_forced_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_module, "COMPACT_FROM", 8)
    model, audios = tiny(), [noise(s, i) for i, s in enumerate((0.3, 1.1, 0.05))]
    scorer = model.scorer(audios)
    before = model.scorer(audios, model.ctc.log_probs_of(audios, frames=True))  # of frames that were computed before
    torch.testing.assert_close(before.heard, scorer.heard, atol=1e-4, rtol=1e-4)
    owner = torch.tensor([1, 0, 1, 2, 1])
    state, total, written = scorer.select(scorer.start(3), owner), torch.zeros(5), [[] for _ in owner]
    generator = torch.Generator().manual_seed(0)
    for step in range(9):
        labels = torch.randint(3, 7, (len(owner), 2), generator=generator)
        lengths = torch.randint(0, 3, (len(owner),), generator=generator)
        gained, state = scorer.advance(state, labels, lengths)
        total += gained
        written = [w + y[:n] for w, y, n in zip(written, labels.tolist(), lengths.tolist(), strict=True)]
        rows = torch.randint(0, len(owner), (len(owner),), generator=generator) if step < 5 else torch.tensor([1, 0, 0, 1, 0])
        state, total, owner, written = scorer.select(state, rows), total[rows], owner[rows], [written[r] for r in rows.tolist()]
        if step == 2:
            assert float(scorer.log_probs(state).exp().sum(1).sub(1).abs().max()) < 1e-5
    ends = scorer.finish(state)
    assert max(map(len, written)) > 6 and state.trie.groups < 3, "long enough, and compacted"
    for row, history in enumerate(written):
        audio = audios[int(owner[row])]
        assert float(total[row]) == pytest.approx(from_scratch(model, audio, history, end=False), abs=1e-4)
        assert float(total[row] + ends[row]) == pytest.approx(from_scratch(model, audio, history), abs=1e-4)


def test_the_internal_language_model_is_the_decoder_over_zeros() -> None:
    model, labels, sizes = tiny(), torch.tensor([[3, 4, 5, 3], [6, 5, 0, 0]]), torch.tensor([4, 2])
    history, targets = histories(labels, sizes, bos=model.vocabulary.bos, eos=model.vocabulary.eos)
    with torch.no_grad():
        logits = model.decoder(history, Encoded(torch.zeros(2, 9, 16), torch.tensor([9, 5]))).logits
    wanted = -F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORE, reduction="none").sum(1)
    scorer = model.internal(2)
    score, state = scorer.advance(scorer.start(2), labels, sizes)
    torch.testing.assert_close(score + scorer.finish(state), wanted, atol=1e-4, rtol=0)
    heard = model.scorer([noise(0.5, 0)] * 2)
    assert float((heard.advance(heard.start(2), labels, sizes)[0] - score).abs().min()) > 0.01, "audio says something else"


def test_a_batch_gives_what_each_gives_alone_in_training_and_in_search() -> None:
    model, audios = tiny(), [noise(s, i) for i, s in enumerate((0.3, 1.1, 0.7))]
    labels = [[3, 4, 5], [6], [5, 5, 3, 4, 7]]
    features = [model.ctc.encoder.features(torch.from_numpy(a)) for a in audios]
    padded = torch.nn.utils.rnn.pad_sequence(features, batch_first=True, padding_value=7.0)
    targets = torch.nn.utils.rnn.pad_sequence([torch.tensor(y) for y in labels], batch_first=True, padding_value=9)
    with torch.no_grad():
        batch = model(padded, torch.tensor([len(x) for x in features]), targets, torch.tensor([len(y) for y in labels]))
        for i, (x, y) in enumerate(zip(features, labels, strict=True)):
            alone = model(x[None], torch.tensor([len(x)]), torch.tensor([y]), torch.tensor([len(y)]))
            assert batch.targets[i].tolist() == [*y, model.vocabulary.eos] + [IGNORE] * (5 - len(y))
            n = len(y) + 1
            torch.testing.assert_close(batch.logits[i, :n], alone.logits[0], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(batch.aux[2][i, :n], alone.aux[2][0], atol=1e-4, rtol=1e-4)
            t = int(alone.heads.main.lengths[0])
            torch.testing.assert_close(batch.heads.aux[1].log_probs[i, :t], alone.heads.aux[1].log_probs[0], atol=1e-4, rtol=1e-4)
    searched = _searched(model, audios, beam=3)
    for one, audio in zip(searched, audios, strict=True):
        (alone,) = _searched(model, [audio], beam=3)
        assert [h.labels for h in one] == [h.labels for h in alone]
        assert [h.parts["aed"] for h in one] == pytest.approx([h.parts["aed"] for h in alone], abs=1e-4)


def _searched(model: AedModel, audios: list[np.ndarray], *, beam: int, max_labels: int = 6):
    return label_beam_search(
        {"aed": Fused(scorer=model.scorer(audios), scale=1.0, when=EveryLabel())}, len(audios), beam=beam, max_labels=max_labels, stop="all"
    )


def test_an_exhaustive_search_is_enumeration() -> None:
    model, audio, longest = tiny(size=9), noise(0.5, 3), 2
    words = [y for y in range(model.vocabulary.size) if y not in (model.vocabulary.bos, model.vocabulary.eos)]
    every = [list(ys) for n in range(longest + 1) for ys in itertools.product(words, repeat=n)]
    expected = {tuple(ys): from_scratch(model, audio, ys) for ys in every}
    (found,) = _searched(model, [audio], beam=1 + len(every), max_labels=longest)
    assert {h.labels for h in found} == set(expected)
    for h in found:
        assert h.parts["aed"] == pytest.approx(expected[h.labels], abs=1e-4)
    assert found[0].labels == max(expected, key=expected.__getitem__)
    output = model.ctc.log_probs_of([audio])
    ctc = CtcPrefix(output.log_probs, output.lengths, vocabulary=model.ctc.vocabulary)
    terms = {"aed": Fused(scorer=model.scorer([audio]), scale=1.0), "ctc": Fused(scorer=ctc, scale=0.5)}
    (joint,) = label_beam_search(terms, 1, beam=1 + len(every), max_labels=longest, stop="all")
    for h in joint:
        blank = model.ctc.vocabulary.blank
        assert blank is not None
        target, size = torch.tensor([h.labels], dtype=torch.long), torch.tensor([len(h.labels)])
        nll = F.ctc_loss(output.log_probs.transpose(0, 1), target, output.lengths, size, blank=blank, reduction="sum")
        assert h.parts["ctc"] == pytest.approx(-float(nll), abs=1e-3)
        assert h.parts["aed"] == pytest.approx(expected[h.labels], abs=1e-4)


def test_the_folder_is_an_aed_and_a_ctc_model(tmp_path: Path) -> None:
    model, audios = tiny(max_seconds=2.0), [noise(0.6, 1), noise(1.0, 2)]
    model.save(tmp_path, card="# a card\n", dtype=torch.float32)
    again = load_attention_model(tmp_path)
    assert isinstance(again, AedModel) and not again.training and again.settings() == model.settings()
    weights = again.weights()
    assert all(torch.equal(x, weights[name]) for name, x in model.weights().items())
    ctc = load_acoustic_model(tmp_path)
    assert isinstance(ctc, CtcModel)
    torch.testing.assert_close(ctc.log_probs_of(audios).log_probs, model.ctc.log_probs_of(audios).log_probs)
    assert CtcModel.load(tmp_path, head=1).encoder.depth == 1
    with pytest.raises(ModelError, match=r"2\.5 s of audio are longer than the 2 s that the model hears at once"):
        again.scorer([noise(2.5, 0)])
    with pytest.raises(ModelError, match="1 rows asked for, but the audio of 2 utterances"):
        again.scorer(audios).start(1)
    model.ctc.save(tmp_path / "ctc", card="")
    with pytest.raises(ModelError, match="is a model of type ctc, expected aed"):
        load_attention_model(tmp_path / "ctc")
    with pytest.raises(ModelError, match="give its CTC model a SentencePieceVocabulary"):
        AedModel(CtcModel(model.ctc.encoder, CharacterVocabulary(["<pad>", "|", "A"])), DIMS)


def test_half_precision_is_close(tmp_path: Path) -> None:
    model, audio = tiny(), noise(0.6, 1)
    model.save(tmp_path, card="", dtype=torch.float32)
    rough = AedModel.load(tmp_path, dtype="bfloat16").scorer([audio])
    labels = torch.tensor([[3, 4, 5, 3]])
    gained, _ = rough.advance(rough.start(1), labels, torch.tensor([4]))
    assert gained.dtype == torch.float32
    assert float(gained) == pytest.approx(from_scratch(model, audio, labels[0].tolist(), end=False), abs=1.0)


def test_the_decoder_is_llamas_where_they_agree() -> None:
    """RMS norm, RoPE, SwiGLU, no bias: with copied weights, no audio heard and no absolute positions, transformers' Llama."""
    shape = {"hidden_size": 16, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=11, initializer_range=0.4, **shape)
    theirs, ours = LlamaModel(config).eval(), AttentionDecoder(DIMS, labels=11, encoder_dim=4).eval()
    with torch.no_grad():
        ours.embedding.weight.copy_(theirs.embed_tokens.weight / math.sqrt(16))
        for a, b in zip(ours.layers, theirs.layers, strict=True):
            own = b.self_attn
            a.own.weight.copy_(torch.cat([own.q_proj.weight, own.k_proj.weight, own.v_proj.weight]))
            a.own_out.weight.copy_(own.o_proj.weight)
            a.up.weight.copy_(torch.cat([b.mlp.gate_proj.weight, b.mlp.up_proj.weight]))
            a.down.weight.copy_(b.mlp.down_proj.weight)
            a.out.weight.zero_(), a.out.bias.zero_()
        labels = torch.randint(0, 11, (2, 9))
        places = torch.arange(9)
        expected = theirs(inputs_embeds=theirs.embed_tokens(labels) + sinusoids(places, 16)).last_hidden_state
        got = ours(labels, Encoded(torch.randn(2, 5, 4), torch.tensor([5, 3])))
    torch.testing.assert_close(got.logits, expected @ ours.embedding.weight.T, atol=1e-4, rtol=1e-4)


def test_audio_is_heard_where_it_is_real_and_positions_turn() -> None:
    decoder = AttentionDecoder(DIMS, labels=11, encoder_dim=4).eval()
    frames, labels = torch.randn(1, 5, 4), torch.tensor([[1, 4, 5]])
    short, whole = (decoder(labels, Encoded(frames, torch.tensor([n]))).logits for n in (3, 5))
    torch.testing.assert_close(decoder(labels, Encoded(frames[:, :3], torch.tensor([3]))).logits, short)
    assert not torch.allclose(short, whole)
    q, k = torch.randn(2, 1, 1, 1, 8)
    angles = sinusoids(torch.arange(20), 8)[None, None]
    products = [float((turned(q, angles[:, :, i : i + 1]) * turned(k, angles[:, :, i + 3 : i + 4])).sum()) for i in (0, 5, 16)]
    assert products == pytest.approx([products[0]] * 3, abs=1e-4), "only the distance counts"
    with pytest.raises(ValueError, match="dim must be a multiple of 2"):
        AttentionDecoder(DecoderDims(dim=18, heads=2, layers=3), labels=4, encoder_dim=4)
    assert DecoderDims.of(layers=6, dim=1024) == DecoderDims()


def test_histories() -> None:
    history, targets = histories(torch.tensor([[5, 6, 7], [8, 9, 9]]), torch.tensor([3, 1]), bos=1, eos=0)
    assert history.tolist() == [[1, 5, 6, 7], [1, 8, 0, 0]]
    assert targets.tolist() == [[5, 6, 7, 0], [8, 0, IGNORE, IGNORE]]


def test_smoothing_is_in_the_gradient_only() -> None:
    logits, labels, smoothing = torch.randn(3, 4, 7, dtype=torch.float64), torch.randint(0, 7, (3, 4)), 0.2
    labels[1, 2:] = IGNORE
    x, y = (logits.clone().requires_grad_() for _ in range(2))
    value = smoothed_cross_entropy(x, labels, smoothing=smoothing)
    plain = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=IGNORE)
    assert float(value.detach()) == pytest.approx(float(plain), abs=1e-4)
    log_probs = y.log_softmax(-1)
    spread = torch.full((3, 4, 7), smoothing / 6, dtype=torch.float64).scatter(2, labels.clamp(min=0)[..., None], 1 - smoothing)
    (-(spread * log_probs).sum(-1) * (labels != IGNORE)).sum().backward()
    value.backward()
    torch.testing.assert_close(x.grad, y.grad, atol=1e-5, rtol=1e-5)
    assert float(smoothed_cross_entropy(logits, labels, smoothing=0.0)) == pytest.approx(float(plain), abs=1e-4)


def test_everything_learns_under_autocast() -> None:
    model = tiny(dims=DecoderDims(dim=16, layers=2, heads=2, aux=(1,))).train()
    assert isinstance(AedScorer(model, Encoded(torch.randn(1, 3, 16), torch.tensor([3]))), AedScorer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(torch.randn(2, 50, 80), torch.tensor([50, 31]), torch.tensor([[3, 4], [5, 9]]), torch.tensor([2, 1]))
        loss = sum((smoothed_cross_entropy(x, out.targets) for x in (out.logits, *out.aux.values())), torch.zeros(()))
        loss = loss - out.heads.main.log_probs.mean() - out.heads.aux[1].log_probs.mean()
    assert out.logits.dtype == torch.float32 == out.heads.main.log_probs.dtype
    loss.backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not bool(p.grad.isfinite().all())]
    assert not missing
