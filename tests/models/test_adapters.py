"""Adapters against loops over frames, low-rank paths against the matrices they stand for, new label units against the labels' texts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from duolect.models import ModelError
from duolect.models.adapters import Adapter, AdapterDims, means, segments
from duolect.models.ctc import CtcOutput
from duolect.models.encoders import Encoded
from duolect.models.lora import Lora, LoraLinear, add_lora, merge_lora, merged_state
from duolect.models.rehead import label_embeddings, rehead
from duolect.vocabulary import CharacterVocabulary, SentencePieceVocabulary, Vocabulary
from tests.conftest import WORDS, byte_level, sentence_pieces, tiny_lm

TEXTS = [WORDS, "ab ab abba ba", "bab bab ab"] * 5
DIMS = [
    *(AdapterDims(kind, factor) for kind in ("concat", "conv") for factor in (1, 2, 3)),
    AdapterDims("ctc"),
    AdapterDims("ctc", labels=True),
]
WIDTH, OUT, BLANK = 6, 10, 3
LETTERS = CharacterVocabulary(["a", "b", "|", "<pad>", "c"])


def adapter_of(dims: AdapterDims, ctc: Vocabulary = LETTERS, language: Vocabulary = LETTERS) -> Adapter:
    """A random adapter; not as it is at first, where its norm and its bias would say nothing."""
    torch.manual_seed(0)
    embeddings = torch.randn(ctc.size, OUT) if dims.labels else None
    adapter = Adapter(dims, width=WIDTH, out=OUT, vocabularies=(ctc, language), spread=0.5, embeddings=embeddings)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn_like(p))
    return adapter


def unused(labels: Tensor) -> Tensor:
    """Stands for the language model's embeddings, which most adapters do not ask."""
    raise AssertionError("embeddings were asked for")


def heard() -> tuple[Encoded, CtcOutput]:
    """Random frames with labels in runs, parted by blanks or not, all blank in row 1; what lies beyond the lengths is noise."""
    torch.manual_seed(1)
    best = torch.tensor(
        [
            [3, 0, 0, 3, 0, 1, 1, 1, 2, 3, 3, 2],
            [3] * 12,
            [4, 4, 3, 3, 3, 0, 0, 0, 0, 0, 0, 0],
            [1] * 12,
            [3, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        ]
    )
    log_probs = (torch.randn(*best.shape, LETTERS.size) + 9 * F.one_hot(best, LETTERS.size)).log_softmax(-1)
    lengths = torch.tensor([12, 7, 5, 1, 2])
    return Encoded(torch.randn(*best.shape, WIDTH) * 3 + 1, lengths), CtcOutput(log_probs, lengths)


def naive(adapter: Adapter, frames: Tensor, log_probs: Tensor) -> Tensor:
    """[T', W] of one utterance's frames [T, D], log_probs [T, V], position by position."""
    kind, factor = adapter.dims.kind, adapter.dims.factor
    frames, zero = adapter.norm(frames), torch.zeros(frames.shape[1])

    def window(first: int, count: int) -> Tensor:
        return torch.stack([frames[t] if 0 <= t < len(frames) else zero for t in range(first, first + count)])

    if kind == "concat":
        return torch.stack([adapter.linear(window(t, factor).flatten()) for t in range(0, len(frames), factor)])
    if kind == "conv":
        kernel = adapter.linear.weight.view(-1, frames.shape[1], 2 * factor)
        windows = [window(t - factor // 2, 2 * factor) for t in range(0, len(frames), factor)]
        return torch.stack([F.conv1d(x.T[None], kernel, adapter.linear.bias)[0, :, 0] for x in windows])
    runs = [(label, [t for t, _ in run]) for label, run in itertools.groupby(enumerate(log_probs.argmax(1).tolist()), key=lambda x: x[1])]
    spoken = [places for label, places in runs if label != BLANK] or [list(range(len(frames)))]
    out = []
    for places in spoken:
        position = adapter.linear(frames[places].mean(0))
        if adapter.labels is not None:
            posterior = log_probs[places].exp().mean(0)
            posterior[BLANK] = 0.0
            position = position + (posterior / posterior.sum()) @ adapter.labels.weight
        out.append(position)
    return torch.stack(out)


@pytest.mark.parametrize("dims", DIMS, ids=str)
@torch.no_grad()
def test_an_adapter_is_its_loop_over_frames_whatever_the_padding(dims: AdapterDims) -> None:
    adapter, (encoded, ctc) = adapter_of(dims), heard()
    got, lengths = adapter(encoded, ctc, unused)
    assert got.shape == (5, int(lengths.max()), OUT)
    for b, (n, t) in enumerate(zip(lengths.tolist(), encoded.lengths.tolist(), strict=True)):
        wanted = naive(adapter, encoded.frames[b, :t], ctc.log_probs[b, :t])
        assert n == len(wanted)
        torch.testing.assert_close(got[b, :n], wanted, atol=1e-5, rtol=1e-5)
        assert not got[b, n:].any(), "zero beyond the length"
    if dims.kind == "ctc":
        assert lengths.tolist() == [5, 1, 1, 1, 1]


def written(path: Sequence[int], ctc: SentencePieceVocabulary, language: Vocabulary) -> list[tuple[list[int], range]]:
    """(labels of the language model, frames) of each word of a greedy path, piece by piece."""
    words: list[tuple[str, range]] = []
    for place, (before, label) in enumerate(itertools.pairwise([ctc.blank, *path])):
        if label in (before, ctc.blank):
            if label == before and words and label != ctc.blank:
                words[-1] = words[-1][0], range(words[-1][1].start, place + 1)
            continue
        piece = ctc.piece(label)
        if words and not piece.startswith("▁"):
            words[-1] = words[-1][0] + piece, range(words[-1][1].start, place + 1)
        else:
            words.append((piece.removeprefix("▁"), range(place, place + 1)))
    words = [(text, frames) for text, frames in words if text]
    own = [language.encode_word(text, first=i == 0) for i, (text, _) in enumerate(words)]
    assert [x for labels in own for x in labels] == language.encode(" ".join(text for text, _ in words))
    return [(labels, frames) for labels, (_, frames) in zip(own, words, strict=True)]


@pytest.mark.parametrize("language", [byte_level(TEXTS), CharacterVocabulary(["<pad>", "|", "a", "b"])], ids=["bytes", "letters"])
@pytest.mark.parametrize("alternatives", [False, True])
@torch.no_grad()
def test_words_are_their_labels_embeddings_with_their_frames_shared_evenly(language: Vocabulary, alternatives: bool) -> None:
    ctc = SentencePieceVocabulary(sentence_pieces(TEXTS, size=20).model, blank="last")
    index, blank = {ctc.piece(i): i for i in range(ctc.size)}, ctc.size - 1
    ab, ba, inner, b, space = (index[piece] for piece in ("▁ab", "▁ba", "ba", "b", "▁"))
    paths = [
        [blank, ab, ab, blank, inner, inner, b, blank, ba, blank, blank, b],  # abbab, bab
        [inner, blank, blank, b, b, blank, b, space, space, ab, inner, inner],  # babb abba: not begun, a space alone
        [blank] * 12,
        [ab, index["▁a"], ab, blank, ab, ba, *[b] * 6],  # more labels than frames
        [space, *[blank] * 11],
    ]
    lengths = torch.tensor([12, 12, 9, 6, 3])
    log_probs = (torch.rand(5, 12, ctc.size) + F.one_hot(torch.tensor(paths), ctc.size).float().mul(5)).log_softmax(-1)
    encoded, adapter = Encoded(torch.randn(5, 12, WIDTH), lengths), adapter_of(AdapterDims("words", labels=alternatives), ctc, language)
    embed = nn.Embedding(language.size, OUT)

    def position(row: int, frames: Tensor, places: Sequence[int]) -> Tensor:
        """What all positions have, without the embedding of a label."""
        out = adapter.linear(frames[places].mean(0) if places else torch.zeros(WIDTH))
        if adapter.gate is None or adapter.labels is None or not places:
            return out
        posterior = log_probs[row, places, :blank].exp().mean(0)
        return out + adapter.gate * ((posterior / posterior.sum()) @ adapter.labels.weight[:blank])

    got, sizes = adapter(encoded, CtcOutput(log_probs, lengths), embed)
    found = []
    for row, (path, n) in enumerate(zip(paths, lengths.tolist(), strict=True)):
        frames, wanted = adapter.norm(encoded.frames[row, :n]), list[Tensor]()
        words = written(path[:n], ctc, language)
        for labels, places in words:
            for i, label in enumerate(labels):
                own = [t for k, t in enumerate(places) if k * len(labels) // len(places) == i]
                wanted.append(position(row, frames, own) + embed.weight[label])
        wanted = wanted or [position(row, frames, list(range(n)))]
        assert int(sizes[row]) == len(wanted)
        torch.testing.assert_close(got[row, : len(wanted)], torch.stack(wanted), atol=1e-5, rtol=1e-5)
        assert not got[row, len(wanted) :].any()
        found.append(language.decode([x for labels, _ in words for x in labels]))
    assert found == ["abbab bab", "babb abba", "", "ab a ab ab ba", ""]


def test_runs_of_a_label_end_at_blanks_and_other_labels() -> None:
    labels = torch.tensor([[5, 5, 3, 5, 2, 2, 3, 3], [3, 3, 3, 5, 5, 5, 5, 5], [3, 1, 1, 2, 1, 9, 9, 9]])
    number, count = segments(labels, torch.tensor([8, 3, 5]), blank=3)
    assert number.tolist() == [[0, 0, -1, 1, 2, 2, -1, -1], [0, 0, 0, -1, -1, -1, -1, -1], [-1, 0, 0, 1, 2, -1, -1, -1]]
    assert count.tolist() == [3, 1, 3]
    frames = torch.arange(24.0).view(3, 8, 1)
    assert means(frames, number, 3)[..., 0].tolist() == [[0.5, 3.0, 4.5], [9.0, 0.0, 0.0], [17.5, 19.0, 20.0]]


@pytest.mark.parametrize("dims", [AdapterDims("concat", 3), AdapterDims("conv", 2), AdapterDims("ctc")], ids=str)
@torch.no_grad()
def test_what_comes_out_is_at_first_as_large_as_the_embeddings_whatever_goes_in(dims: AdapterDims) -> None:
    torch.manual_seed(0)
    adapter = Adapter(dims, width=32, out=200, vocabularies=(LETTERS, LETTERS), spread=0.02, embeddings=None)
    frames, lengths = 50 * torch.randn(4, 300, 32), torch.full((4,), 300)
    out, _ = adapter(Encoded(frames, lengths), CtcOutput(F.one_hot(torch.arange(300) % 2, 5).float().expand(4, -1, -1), lengths), unused)
    assert float(out.std()) == pytest.approx(0.02, rel=0.1)


def test_adapters_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="factor 0 makes no sense"):
        AdapterDims(factor=0)
    with pytest.raises(ValueError, match="kind conv has no labels to embed"):
        AdapterDims("conv", labels=True)


# Low-rank paths

TARGETS = {"llama": ("q_proj", "v_proj", "down_proj"), "qwen2": ("q_proj", "k_proj", "gate_proj"), "gpt2": ("c_attn", "c_proj", "c_fc")}


def model_of(kind: str) -> Any:
    return tiny_lm(kind, byte_level(TEXTS)).model


def filled(model: nn.Module, config: Lora) -> Any:
    """The model with low-rank paths that say something."""
    add_lora(model, config)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.normal_(std=0.3)
                assert name.endswith((".up", ".down"))
    return model


IDS = torch.tensor([[5, 7, 9, 3, 11]])


@pytest.mark.parametrize("kind", TARGETS)
def test_low_rank_paths_start_as_nothing_and_learn_alone(kind: str) -> None:
    model = model_of(kind)
    before = model(IDS).logits.detach()
    found = [n for n, m in model.named_modules() if n.endswith(TARGETS[kind]) and isinstance(m, nn.Linear | Conv1D)]
    assert add_lora(model, Lora(rank=3, targets=TARGETS[kind])) == len(found) >= 6
    assert torch.equal(model(IDS).logits, before)
    model(IDS).logits.square().sum().backward()
    gradients = {name for name, p in model.named_parameters() if p.grad is not None}
    assert gradients == {f"{name}.{part}" for name in found for part in ("up", "down")}
    ups = [p.grad for name, p in model.named_parameters() if name.endswith(".up")]
    assert all(bool(g.any()) for g in ups)


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("stabilized", [True, False])
@torch.no_grad()
def test_merged_paths_compute_the_same_under_the_old_names(kind: str, stabilized: bool) -> None:
    plain = model_of(kind)
    weights = {name: x.clone() for name, x in plain.state_dict().items()}
    before = plain(IDS).logits
    config = Lora(rank=3, alpha=2.0, targets=TARGETS[kind], stabilized=stabilized)
    model = filled(plain, config)
    apart, state = model(IDS).logits, {name: x.clone() for name, x in model.state_dict().items()}
    assert float((apart - before).abs().max()) > 0.1
    stated = merged_state(model, state)
    merge_lora(model)
    assert not any(isinstance(m, LoraLinear) for m in model.modules())
    torch.testing.assert_close(model(IDS).logits, apart, atol=1e-4, rtol=1e-4)
    merged = model.state_dict()
    assert merged.keys() == stated.keys() == weights.keys()
    for name, x in merged.items():
        torch.testing.assert_close(stated[name], x)
        path = name.removesuffix(".weight")
        if f"{path}.up" in state:
            change = 2.0 / (math.sqrt(3) if stabilized else 3) * state[f"{path}.up"] @ state[f"{path}.down"]
            torch.testing.assert_close(x, weights[name] + (change.T if kind == "gpt2" else change))
        else:
            assert torch.equal(x, weights[name])


def test_dropout_is_heard_by_the_low_rank_path_in_training_only() -> None:
    path = LoraLinear(nn.Linear(40, 40).eval(), Lora(rank=4, dropout=0.5))
    nn.init.ones_(path.up)
    x = torch.randn(1, 40)
    assert torch.equal(path(x), path(x)), "as the layer was"
    path.train()
    assert not torch.equal(path(x), path(x))


def test_targets_that_name_nothing_are_refused_with_what_there_is() -> None:
    model = model_of("llama")
    message = r"no linear layer of LlamaForCausalLM is called c_attn: set lora.targets to some of down_proj, gate_proj, k_proj, lm_head, "
    with pytest.raises(ModelError, match=message):
        add_lora(model, Lora(targets=("q_proj", "c_attn")))
    assert all(p.requires_grad for p in model.parameters()), "what was refused left nothing behind"


# New label units


def naive_embeddings(matrix: Tensor, old: Vocabulary, pieces: SentencePieceVocabulary) -> Tensor:
    """The mean of the old embeddings of each piece's text, as SentencePiece and the old tokenizer write it."""
    rows, known = [], matrix[: old.size]
    for label in range(pieces.size):
        if label == pieces.bos:
            rows.append(known[old.bos])
        elif label == pieces.eos:
            rows.append(known[old.eos])
        else:
            special = label in (pieces.blank, pieces.processor.unk_id())
            text = "" if special else pieces.piece(label).replace("▁", " ")
            ids = old.encode(text)
            rows.append(torch.stack([known[i] for i in ids]).mean(0) if ids else known.mean(0))
    return torch.stack(rows)


@pytest.mark.parametrize("old", ["bytes", "pieces"])
@pytest.mark.parametrize("blank", ["last", "none"])
def test_new_labels_begin_as_the_mean_of_what_their_text_was(other_vocabularies: dict[str, Vocabulary], old: str, blank: Any) -> None:
    new = SentencePieceVocabulary(sentence_pieces(TEXTS, size=20).model, blank=blank)
    torch.manual_seed(0)
    before = other_vocabularies[old]
    matrix = torch.randn(before.size + 3, 8)
    got = label_embeddings(matrix, before, new)
    assert "▁" in {new.piece(i) for i in range(new.size)}, "a space alone is a text, too"
    torch.testing.assert_close(got, naive_embeddings(matrix, before, new))


def test_random_embeddings_have_the_old_mean_and_spread(other_vocabularies: dict[str, Vocabulary]) -> None:
    new, old = sentence_pieces(TEXTS, size=20), other_vocabularies["bytes"]
    torch.manual_seed(0)
    matrix = 0.3 * torch.randn(old.size, 4000) + torch.linspace(-1, 1, 4000)
    got = label_embeddings(matrix, old, new, initial="random")
    assert not torch.allclose(got, label_embeddings(matrix, old, new))
    assert float((got - matrix.mean(0)).std()) == pytest.approx(0.3, rel=0.05)


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("initial", ["pieces", "random"])
def test_a_reheaded_model_writes_the_new_labels_and_tied_stays_tied(kind: str, initial: Any) -> None:
    old, new = byte_level(TEXTS), sentence_pieces(TEXTS, size=20)
    model = model_of(kind)
    matrices = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    tied = matrices[0] is matrices[1]
    assert tied == (kind == "gpt2")
    rehead(model, old, new, initial=initial)
    after = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    assert (after[0] is after[1]) == tied and all(x.requires_grad for x in after)
    wanted = [naive_embeddings(x.detach(), old, new) for x in matrices]
    assert [torch.allclose(x, y, atol=1e-6) for x, y in zip(after, wanted, strict=True)] == [initial == "pieces"] * 2
    config = model.config
    assert (config.vocab_size, config.bos_token_id, config.eos_token_id, config.pad_token_id) == (new.size, new.bos, new.eos, None)
    torch.testing.assert_close(model(IDS).logits, model.base_model(IDS).last_hidden_state @ after[1].T)
    again = type(model)(config)
    assert {n: x.shape for n, x in again.state_dict().items()} == {n: x.shape for n, x in model.state_dict().items()}
