"""Speech LLMs: training and search are one plain forward of the language model, folders hold what learned, searches are enumeration."""

from __future__ import annotations

import copy
import functools
import itertools
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    GlmConfig,
    Olmo2Config,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    StableLmConfig,
)

from duolect.models import ModelError
from duolect.models import decoder as decoder_module
from duolect.models.adapters import AdapterDims
from duolect.models.aed import AedOutput, load_attention_model
from duolect.models.attention_decoder import IGNORE
from duolect.models.conformer import ConformerDims, ConformerEncoder
from duolect.models.ctc import CtcModel, load_acoustic_model
from duolect.models.lm import HFCausalLM, load_language_model
from duolect.models.lora import Lora, LoraLinear
from duolect.models.speech_llm import SpeechLlm, SpeechLlmDims
from duolect.models.warm_start import warm_start
from duolect.search.fusion import Fused
from duolect.search.label import label_beam_search
from duolect.search.prefix import CtcPrefix
from duolect.vocabulary import CharacterVocabulary, SentencePieceVocabulary, TokenizerVocabulary
from tests.conftest import WORDS, byte_level, bytes_in, sentence_pieces, tiny_lm
from tests.models.test_attention_decoder import noise
from tests.oracles import lm_from_scratch

TEXTS = [WORDS, "ab ab abba ba", "bab bab ab"] * 5
KINDS = ("llama", "qwen2", "gpt2")
HOW: dict[str, dict[str, Any]] = {
    "prefix": {"attention": "prefix"},
    "both ways": {"attention": "prefix", "bidirectional": True},
    "merged": {"attention": "merged"},
    "cross": {"attention": "cross"},
}
ADAPTERS = {
    "concat": AdapterDims("concat", 2),
    "conv": AdapterDims("conv", 3),
    "ctc": AdapterDims("ctc", labels=True),
    "words": AdapterDims("words"),
}
PROMPTS = {"before": "ab b", "after": "ba"}
TARGETS = {"llama": ("q_proj", "v_proj"), "qwen2": ("q_proj", "k_proj", "down_proj"), "gpt2": ("c_attn", "c_proj")}
AUDIOS = [noise(seconds, i) for i, seconds in enumerate((0.5, 1.3, 0.05))]


@functools.cache
def tokenizer() -> TokenizerVocabulary:
    return byte_level(TEXTS)


@functools.cache
def pieces(size: int) -> SentencePieceVocabulary:
    return SentencePieceVocabulary(sentence_pieces(TEXTS, size=size).model, blank="last")


def tiny_ctc(*, size: int = 14, seed: int = 0) -> CtcModel:
    """A random CTC model whose best labels change often."""
    torch.manual_seed(seed)
    model = CtcModel(ConformerEncoder(ConformerDims(dim=16, layers=2, heads=2, kernel=4, channels=(2, 2, 4))), pieces(size)).eval()
    with torch.no_grad():
        model.head.weight.mul_(8)
    return model


def tiny(
    kind: str = "llama", *, ctc: str | Path = "", llm: str | Path = "", size: int = 14, max_seconds: float = 30.0, **dims: Any
) -> SpeechLlm:
    """A speech LLM as it is at first; ctc, llm: folders that those parts come from, which then are its sources."""
    if llm:
        model, vocabulary = load_language_model(llm)
    else:
        model, vocabulary = tiny_lm(kind, tokenizer()).model, tokenizer()
    hearing = CtcModel.load(ctc) if ctc else tiny_ctc(size=size)
    sources = {name: str(folder) for name, folder in (("ctc", ctc), ("llm", llm)) if folder}
    fields = {"lora": Lora(4, 4.0, TARGETS[kind]), "encoder_lora": Lora(4, 4.0, ("query", "value")), **dims}
    return SpeechLlm(hearing, model, vocabulary, SpeechLlmDims(**fields), sources=sources, max_seconds=max_seconds).eval()


@torch.no_grad()
def trained(model: SpeechLlm, *, seed: int = 2) -> SpeechLlm:
    """The model after something was done to all that learns."""
    torch.manual_seed(seed)
    for p in model.parameters():
        if p.requires_grad:
            p.add_(0.3 * torch.randn_like(p))
    return model


def texts_of(model: SpeechLlm) -> list[list[int]]:
    """Labels for the three utterances, those of the last one none."""
    return [model.vocabulary.encode(text) for text in ("ab ba", "abba b bab", "")]


@torch.no_grad()
def sound_of(model: SpeechLlm, audio: np.ndarray) -> Tensor:
    """[T, W] the audio as the language model hears it, alone."""
    features = model.ctc.encoder.features(torch.from_numpy(audio))
    heads = model.ctc.heads(features[None], torch.tensor([len(features)]))
    return model.adapter(heads.encoded, heads.main, model.embeddings)[0][0]


@torch.no_grad()
def plain(model: SpeechLlm, sound: Tensor, labels: Sequence[int]) -> Tensor:
    """[L + 1, V] log-probs behind each history, by one forward of the language model alone: no padding, no cache, no packing.

    merged: audio is put in front of the text, and before every layer its positions are set to what they were. cross: PyTorch's own
    attention, added before every layer.
    """
    before, after = (model.vocabulary.encode(text) for text in (model.dims.before, model.dims.after))
    begin = model.vocabulary.encode(model.dims.begin) if model.dims.begin else [model.vocabulary.bos]
    first, behind = (model.embeddings(torch.tensor(x, dtype=torch.long)) for x in (before, [*after, *begin, *labels]))
    middle = sound[:0] if model.dims.attention == "cross" else sound
    place = slice(len(before), len(before) + len(middle))
    joined = torch.cat([first, middle, behind])[None]
    mask = None
    if model.dims.bidirectional:
        seen = torch.ones(joined.shape[1], joined.shape[1]).tril()
        seen[place, place] = 1
        mask = torch.where(seen.bool(), 0.0, -torch.inf)[None, None]

    def set_back(layer: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        x = arguments[0].clone()
        x[0, place] = sound
        return x, *arguments[1:]

    def heard_by(cross: Any) -> Callable[..., tuple[Any, ...]]:
        attention = nn.MultiheadAttention(joined.shape[2], cross.heads, batch_first=True)
        attention.in_proj_weight.copy_(torch.cat([cross.query.weight, cross.key_value.weight]))
        attention.in_proj_bias.copy_(torch.cat([cross.query.bias, cross.key_value.bias]))
        attention.out_proj.load_state_dict(cross.out.state_dict())

        def hook(layer: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
            x = arguments[0]
            y, _ = attention(cross.norm(x), sound[None], sound[None])
            return x + torch.tanh(cross.gate) * y, *arguments[1:]

        return hook

    with ExitStack() as hooks:
        for number, layer in enumerate(model.layers):
            if model.dims.attention == "merged":
                hooks.callback(layer.register_forward_pre_hook(set_back).remove)
            elif model.dims.attention == "cross":
                hooks.callback(layer.register_forward_pre_hook(heard_by(model.cross[number])).remove)
        hidden = model.llm.base_model(inputs_embeds=joined, attention_mask=mask, use_cache=False).last_hidden_state
    head: Any = model.llm.get_output_embeddings()
    return (hidden[0, -len(labels) - 1 :] @ head.weight[: model.vocabulary.size].T).log_softmax(-1)


def chosen(log_probs: Tensor, labels: Sequence[int], eos: int) -> Tensor:
    """[L + 1] of log_probs [L + 1, V], those of the labels and of the end."""
    return log_probs[torch.arange(len(labels) + 1), torch.tensor([*labels, eos])]


def score_of(model: SpeechLlm, sound: Tensor, labels: Sequence[int]) -> float:
    return float(chosen(plain(model, sound, labels), labels, model.vocabulary.eos).sum())


def scores(model: SpeechLlm, audios: Sequence[np.ndarray], labels: Sequence[Sequence[int]]) -> Tensor:
    """[B] log p(labels, end | audio) by the scorer, in one call."""
    scorer, sizes = model.scorer(audios), torch.tensor([len(x) for x in labels])
    gained, state = scorer.advance(scorer.start(len(audios)), padded(labels), sizes)
    return gained + scorer.finish(state)


@pytest.mark.parametrize("kind", KINDS)
def test_more_positions_than_the_language_model_has_are_refused(kind: str) -> None:
    model = tiny(kind, adapter=AdapterDims("concat", 1), max_seconds=60.0)
    with pytest.raises(ModelError, match=r"\d+ positions is longer than the 256 that the language model attends to"):
        model.scorer([noise(25.0, 1)]).start(1)
    with pytest.raises(ModelError, match="longer than the 256"):
        model.hidden(torch.zeros(1, 250, 16), torch.tensor([250]), torch.ones(1, 9, dtype=torch.long))
    for how, (audio, labels) in {"merged": (250, 9), "cross": (9, 257)}.items():  # of added layers audio has no positions
        with pytest.raises(ModelError, match=r"25[79] positions is longer than the 256"), torch.no_grad():
            tiny(kind, attention=how).hidden(torch.zeros(1, audio, 16), torch.tensor([audio]), torch.ones(1, labels, dtype=torch.long))


def padded(labels: Sequence[Sequence[int]], *, value: int = 3) -> Tensor:
    return nn.utils.rnn.pad_sequence([torch.tensor(x, dtype=torch.long) for x in labels], batch_first=True, padding_value=value)


def forward(model: SpeechLlm, audios: Sequence[np.ndarray], labels: Sequence[Sequence[int]], **told: Any) -> AedOutput:
    """A training pass; beyond the lengths lies noise."""
    features = [model.ctc.encoder.features(torch.from_numpy(a)) for a in audios]
    joined = nn.utils.rnn.pad_sequence(features, batch_first=True, padding_value=7.0)
    return model(joined, torch.tensor([len(x) for x in features]), padded(labels), torch.tensor([len(x) for x in labels]), **told)


@torch.no_grad()
def in_training(model: SpeechLlm, audios: Sequence[np.ndarray], labels: Sequence[Sequence[int]]) -> list[float]:
    """log p(labels, end | audio) of each utterance by a training pass."""
    eos, logits = model.vocabulary.eos, forward(model, audios, labels).logits
    return [float(chosen(x.log_softmax(-1)[: len(y) + 1], y, eos).sum()) for x, y in zip(logits, labels, strict=True)]


@pytest.mark.parametrize(("adapter", "units"), [("concat", "ctc"), ("conv", "own"), ("ctc", "own"), ("words", "own")])
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", KINDS)
def test_training_and_search_step_by_step_are_one_plain_forward(kind: str, how: str, adapter: str, units: str) -> None:
    begin = {"begin": "\n"} if adapter == "words" else {}
    model = trained(tiny(kind, adapter=ADAPTERS[adapter], units=units, **HOW[how], **PROMPTS, **begin))
    labels, eos, sounds = texts_of(model), model.vocabulary.eos, [sound_of(model, audio) for audio in AUDIOS]
    wanted = [chosen(plain(model, x, y), y, eos) for x, y in zip(sounds, labels, strict=True)]
    with torch.no_grad():
        out = forward(model, AUDIOS, labels)
    for b, y in enumerate(labels):
        assert out.targets[b].tolist() == [*y, eos] + [IGNORE] * (out.targets.shape[1] - len(y) - 1)
        torch.testing.assert_close(chosen(out.logits[b].log_softmax(-1)[: len(y) + 1], y, eos), wanted[b], atol=2e-4, rtol=1e-4)

    scorer, owner = model.scorer(AUDIOS), [1, 0, 2, 1]
    assert len(set(scorer.lengths.tolist())) == 3, "the test means utterances of different lengths"
    state, history = scorer.select(scorer.start(3), torch.tensor(owner)), padded([labels[i] for i in owner])
    for step in range(history.shape[1]):
        active = torch.tensor([step < len(labels[i]) for i in owner])
        for row, i in enumerate(owner):
            if step == len(labels[i]):
                assert float(scorer.finish(state)[row]) == pytest.approx(float(wanted[i][-1]), abs=2e-4)
        gained, state = scorer.advance(state, history[:, step : step + 1], active.long())
        for row, i in enumerate(owner):
            assert float(gained[row]) == pytest.approx(float(wanted[i][step]) if active[row] else 0.0, abs=2e-4)
    torch.testing.assert_close(scorer.log_probs(state)[0], plain(model, sounds[1], labels[1])[-1], atol=3e-4, rtol=1e-4)
    again = model.scorer(AUDIOS, model.ctc.log_probs_of(AUDIOS, frames=True))  # of frames that were computed before
    torch.testing.assert_close(again.audio, scorer.audio, atol=1e-4, rtol=1e-4)
    assert torch.equal(again.lengths, scorer.lengths)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_context_words_stand_in_the_prompts_as_if_they_had_been_written_there(kind: str, how: str) -> None:
    model = trained(tiny(kind, before="ab {context} b", after="ba {context}", **HOW[how]))
    labels, eos, context = texts_of(model), model.vocabulary.eos, [("Abba b", "bab"), ("ab",), ()]
    written = [("ab abba b, bab b", "ba abba b, bab"), ("ab ab b", "ba ab"), ("ab  b", "ba ")]
    literal = [copy.copy(model) for _ in written]
    for one, (before, after) in zip(literal, written, strict=True):
        one.dims = replace(model.dims, before=before, after=after)
    wanted = [chosen(plain(m, sound_of(model, x), y), y, eos) for m, x, y in zip(literal, AUDIOS, labels, strict=True)]
    with torch.no_grad():
        out = forward(model, AUDIOS, labels, context=context)
        own, none = forward(model, AUDIOS, labels), forward(model, AUDIOS, labels, context=[()] * 3)
    torch.testing.assert_close(own.logits, none.logits, atol=0, rtol=0)
    for b, y in enumerate(labels):
        torch.testing.assert_close(chosen(out.logits[b].log_softmax(-1)[: len(y) + 1], y, eos), wanted[b], atol=2e-4, rtol=1e-4)
    for words, one in zip(context, literal, strict=True):  # the same words for a whole batch
        found, told = [score_of(one, sound_of(model, x), y) for x, y in zip(AUDIOS, labels, strict=True)], model.told(words)
        assert scores(told, AUDIOS, labels).tolist() == pytest.approx(found, abs=5e-4) and told.takes_context
    assert model.prompts == model.prompts_with(()) and not tiny(**PROMPTS).takes_context
    with pytest.raises(ModelError, match=r"^--context: 200 words and phrases make a prompt of 801 positions, .* at most some 31$"):
        model.told(["abba"] * 200)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("how", HOW)
def test_histories_may_leave_the_beam_and_utterances_end(kind: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_module, "COMPACT_FROM", 8)
    model = trained(tiny(kind, **HOW[how]))
    audios = [noise(seconds, i) for i, seconds in enumerate((0.2, 0.3, 0.05))]
    scorer, owner = model.scorer(audios), torch.tensor([2, 1, 0, 1, 2, 0, 1])
    state, total, written = scorer.select(scorer.start(3), owner), torch.zeros(7), [list[int]() for _ in owner]
    generator, sizes = torch.Generator().manual_seed(0), []
    for step in range(8):
        labels = torch.randint(60, 200, (7, 3), generator=generator)
        lengths = torch.randint(0, 4, (7,), generator=generator)
        gained, state = scorer.advance(state, labels, lengths)
        total += gained
        written = [w + y[:n] for w, y, n in zip(written, labels.tolist(), lengths.tolist(), strict=True)]
        rows = torch.randint(0, 7, (7,), generator=generator) if step < 4 else torch.tensor([5, 3, 3, 3, 5, 5, 3])
        state, total, owner, written = scorer.select(state, rows), total[rows], owner[rows], [written[r] for r in rows.tolist()]
        sizes.append(state.trie.size)
    assert any(b < a for a, b in itertools.pairwise(sizes)) and state.trie.groups == len(set(owner.tolist())) < 3, "the test tests nothing"
    total += scorer.finish(state)
    for row, history in enumerate(written):
        assert float(total[row]) == pytest.approx(score_of(model, sound_of(model, audios[int(owner[row])]), history), abs=5e-4)


@pytest.mark.parametrize("how", HOW)
def test_the_beam_shares_the_audio(how: str) -> None:
    model = trained(tiny(**HOW[how], **PROMPTS))
    counted: list[int] = []
    model.layers[0].register_forward_pre_hook(lambda layer, arguments: counted.append(arguments[0].shape[1]))
    scorer = model.scorer(AUDIOS[:2])
    prompt, sound = sum(len(x) for x in model.prompts) + 1, [0, 0] if how == "cross" else scorer.lengths.tolist()
    start = scorer.start(2)
    assert start.trie.fill.tolist() == [prompt + n for n in sound]
    assert counted == [2 * prompt + (0 if how == "merged" else sum(sound))], "what goes through the layers"
    wide = scorer.select(start, torch.arange(2).repeat_interleave(40))
    _, after = scorer.advance(wide, torch.tensor([[5, 6], [5, 7], [8, 6], [5, 6]] * 20), torch.tensor([2, 2, 1, 2] * 20))
    assert after.trie.fill.tolist() == [prompt + n + 4 for n in sound], "5, 5 6, 5 7 and 8"
    assert counted[1:] == [8]
    assert all(layer.keys.shape[0] == 2 and layer.filled == after.trie.size for layer in after.trie.cache.layers)
    assert [len(k) for k, _ in scorer.heard] == ([2] * len(model.layers) if how == "cross" else [])


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("how", HOW)
def test_what_will_be_held_is_known_before(how: str, adapter: str) -> None:
    model = tiny(adapter=ADAPTERS[adapter], **HOW[how], **PROMPTS)
    scorer = model.scorer(AUDIOS[1:2])
    _, state = scorer.advance(scorer.start(1), torch.tensor([[5, 6, 7]]), torch.tensor([3]))
    held = bytes_in(state.trie.cache) + sum(x.nbytes for pair in scorer.heard for x in pair)
    planned = model.bytes_of(seconds=1.3, labels=3)
    assert planned == held if adapter in ("concat", "conv") else planned >= held


@pytest.mark.parametrize("how", HOW)
def test_what_is_heard_counts_and_only_the_own_audio(how: str) -> None:
    model = trained(tiny(**HOW[how]))
    labels = [model.vocabulary.encode("abba ba")] * 2
    one, two = (scores(model, [AUDIOS[1], other], labels) for other in (AUDIOS[0], AUDIOS[2]))
    assert abs(float(one[1] - two[1])) > 0.1 and float(one[0]) == pytest.approx(float(two[0]), abs=1e-4)
    assert abs(float(one[0] - one[1])) > 0.1
    torch.testing.assert_close(scores(model, [AUDIOS[0], AUDIOS[1]], labels), one.flip(0), atol=1e-4, rtol=0)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", KINDS)
def test_the_internal_language_model_reads_the_prompts_and_hears_nothing(kind: str, how: str) -> None:
    model = trained(tiny(kind, **HOW[how], **PROMPTS))
    labels, scorer = texts_of(model), model.internal(3)
    gained, state = scorer.advance(scorer.start(3), padded(labels), torch.tensor([len(x) for x in labels]))
    found, heard = (gained + scorer.finish(state)).tolist(), scores(model, AUDIOS, labels).tolist()
    model.dims = replace(model.dims, attention="prefix", bidirectional=False)  # with nothing to attend to, all interfaces are this one
    wanted = [score_of(model, torch.zeros(0, 16), y) for y in labels]
    assert found == pytest.approx(wanted, abs=3e-4) and all(abs(x - y) > 0.01 for x, y in zip(found, heard, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_cross_attention_starts_as_the_language_model_and_is_one_without_audio(kind: str) -> None:
    model = tiny(kind, attention="cross", learns="nothing")
    lm, labels = tiny_lm(kind, tokenizer()), texts_of(model)
    wanted = [lm_from_scratch(lm, y) for y in labels]
    assert scores(model, AUDIOS, labels).tolist() == pytest.approx(wanted, abs=2e-4)
    with torch.no_grad():
        out = forward(model, AUDIOS, labels)
    sums = [float(chosen(x.log_softmax(-1)[: len(y) + 1], y, model.vocabulary.eos).sum()) for x, y in zip(out.logits, labels, strict=True)]
    assert sums == pytest.approx(wanted, abs=2e-4)
    heard = scores(trained(model), AUDIOS, labels)
    assert all(abs(float(x) - y) > 0.01 for x, y in zip(heard, wanted, strict=True))
    silent = HFCausalLM(model.llm, model.vocabulary)
    for y, score in zip(labels, wanted, strict=True):
        gained, state = silent.advance(silent.start(1), torch.tensor([y], dtype=torch.long), torch.tensor([len(y)]))
        assert float(gained + silent.finish(state)) == pytest.approx(score, abs=2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_beyond_the_tokenizer_are_no_labels_and_a_model_without_bos_starts_from_its_end(kind: str) -> None:
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer().tokenizer.backend_tokenizer, eos_token="<|endoftext|>")
    vocabulary = TokenizerVocabulary(fast)
    assert fast.bos_token_id is None and vocabulary.bos == vocabulary.eos == fast.eos_token_id
    lm = tiny_lm(kind, vocabulary, spare_rows=7)
    assert lm.model.get_output_embeddings().weight.shape[0] == vocabulary.size + 7
    model = trained(SpeechLlm(tiny_ctc(), lm.model, vocabulary, SpeechLlmDims(lora=Lora(4, 4.0, TARGETS[kind]), **PROMPTS)).eval())
    scorer, labels = model.scorer(AUDIOS), texts_of(model)
    log_probs = scorer.log_probs(scorer.start(3))
    assert log_probs.shape == (3, vocabulary.size) and log_probs.exp().sum(1).tolist() == pytest.approx([1.0] * 3, abs=1e-5)
    wanted = [score_of(model, sound_of(model, a), y) for a, y in zip(AUDIOS, labels, strict=True)]
    assert scores(model, AUDIOS, labels).tolist() == pytest.approx(wanted, abs=3e-4)
    assert forward(model, AUDIOS, labels).logits.shape[2] == vocabulary.size


# Searches


def every_one(model: SpeechLlm, longest: int) -> list[tuple[int, ...]]:
    words = [y for y in range(model.vocabulary.size) if y not in (model.vocabulary.bos, model.vocabulary.eos)]
    return [y for n in range(longest + 1) for y in itertools.product(words, repeat=n)]


@pytest.mark.parametrize("how", HOW)
def test_an_exhaustive_search_is_enumeration_alone_and_with_ctc(how: str) -> None:
    model, longest = trained(tiny(size=9, units="ctc", **HOW[how])), 2
    sound = sound_of(model, AUDIOS[0])
    wanted = {y: score_of(model, sound, y) for y in every_one(model, longest)}
    output = model.ctc.log_probs_of([AUDIOS[0]])
    terms = {"llm": Fused(scorer=model.scorer(AUDIOS[:1]), scale=1.0)}
    (found,) = label_beam_search(terms, 1, beam=len(wanted), max_labels=longest, stop="all")
    assert {h.labels: h.parts["llm"] for h in found} == pytest.approx(wanted, abs=3e-4)
    assert found[0].labels == max(wanted, key=wanted.__getitem__)
    terms["ctc"] = Fused(scorer=CtcPrefix(output.log_probs, output.lengths, vocabulary=model.ctc.vocabulary), scale=0.5)
    (joint,) = label_beam_search(terms, 1, beam=len(wanted), max_labels=longest, stop="all")
    heard = {y: ctc_score(output.log_probs[0], y, blank=model.ctc.vocabulary.blank or 0) for y in wanted}
    assert {h.labels for h in joint} == {y for y, score in heard.items() if score > -1e6}
    for h in joint:
        assert h.parts["llm"] == pytest.approx(wanted[h.labels], abs=3e-4)
        assert h.parts["ctc"] == pytest.approx(heard[h.labels], abs=1e-3)
    assert joint[0].labels == max(wanted, key=lambda y: wanted[y] + 0.5 * heard[y])


def ctc_score(log_probs: Tensor, labels: Sequence[int], *, blank: int) -> float:
    """log p(labels) of log_probs [T, V], -inf where no alignment fits."""
    frames, size = torch.tensor([len(log_probs)]), torch.tensor([len(labels)])
    target = torch.tensor([labels], dtype=torch.long)
    return -float(F.ctc_loss(log_probs[:, None], target, frames, size, blank=blank, reduction="sum"))


def naive_beam(model: SpeechLlm, sound: Tensor, *, beam: int, longest: int) -> list[tuple[tuple[int, ...], float]]:
    """Label-synchronous beam search with a whole forward for every hypothesis; ended ones keep their place."""
    v, now = model.vocabulary, [((), 0.0, False)]
    while not all(ended for _, _, ended in now):
        grown = []
        for labels, score, ended in now:
            if ended:
                grown.append((labels, score, True))
                continue
            for y, log_prob in enumerate(plain(model, sound, labels)[-1].tolist()):
                if y == v.eos:
                    grown.append((labels, score + log_prob, True))
                elif y != v.bos and len(labels) < longest:
                    grown.append(((*labels, y), score + log_prob, False))
        now = sorted(grown, key=lambda x: -x[1])[:beam]
    return [(labels, score) for labels, score, _ in now]


def test_what_nobody_can_mean_is_refused_when_it_is_set() -> None:
    with pytest.raises(ValueError, match="rank 0 make no sense"):
        Lora(rank=0)
    with pytest.raises(ValueError, match=r"dropout of 1\.0 leaves nothing"):
        Lora(dropout=1.0)
    with pytest.raises(ValueError, match=r"the place \{contxt\}, which nothing fills: the only one known is \{context\}"):
        SpeechLlmDims(before="Names: {contxt}. ")


@pytest.mark.parametrize(("how", "units"), [("prefix", "own"), ("both ways", "ctc"), ("merged", "own"), ("cross", "ctc")])
@pytest.mark.parametrize("beam", [1, 4])
def test_a_narrow_search_is_the_naive_one_for_each_utterance(how: str, units: str, beam: int) -> None:
    model = trained(tiny("qwen2", units=units, **HOW[how], **PROMPTS))
    with torch.no_grad():
        model.llm.get_output_embeddings().weight[model.vocabulary.eos].zero_()  # else nothing is said
    terms = {"llm": Fused(scorer=model.scorer(AUDIOS), scale=1.0)}
    found = label_beam_search(terms, 3, beam=beam, max_labels=4, stop="all")
    assert max(len(h.labels) for nbest in found for h in nbest) > 2
    for nbest, audio in zip(found, AUDIOS, strict=True):
        wanted = naive_beam(model, sound_of(model, audio), beam=beam, longest=4)
        assert [h.labels for h in nbest] == [labels for labels, _ in wanted]
        assert [h.parts["llm"] for h in nbest] == pytest.approx([score for _, score in wanted], abs=3e-4)


# Folders


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a tiny language model of each kind, as transformers writes them, and of a CTC model."""
    root = tmp_path_factory.mktemp("sources")
    for kind in KINDS:
        write_llm(kind, root / kind, tokenizer())
    tiny_ctc().save(root / "ctc", card="", dtype=torch.float32)
    return {name: root / name for name in (*KINDS, "ctc")}


def write_llm(kind: str, folder: Path, vocabulary: TokenizerVocabulary) -> None:
    model = tiny_lm(kind, tokenizer()).model
    model.config.bos_token_id, model.config.eos_token_id = vocabulary.bos, vocabulary.eos
    model.save_pretrained(folder)
    vocabulary.tokenizer.save_pretrained(folder)


CASES = [*itertools.product(("all", "lora", "nothing"), ("learn", "lora", "rest"), ("own", "ctc"))]
FOLDERS = [(KINDS[i % 3], list(HOW)[i % 4], *case, ("rest", "learn")[i % 5 == 0], i % 5 != 2) for i, case in enumerate(CASES)]


@pytest.mark.parametrize(("kind", "how", "learns", "encoder", "units", "embeddings", "named"), FOLDERS)
def test_a_folder_gives_the_same_scores_and_is_whole_when_saved_again(
    kind: str, how: str, learns: str, encoder: str, units: str, embeddings: str, named: bool, sources: dict[str, Path], tmp_path: Path
) -> None:
    places = {"llm": sources[kind], "ctc": sources["ctc"]} if named else {}
    fields = {"learns": learns, "encoder": encoder, "units": units, "embeddings": embeddings}
    model = trained(tiny(kind, **places, **fields, adapter=ADAPTERS["ctc"], max_seconds=7.0, **HOW[how], **PROMPTS))
    labels, heard = texts_of(model), model.ctc.log_probs_of(AUDIOS).log_probs
    wanted = scores(model, AUDIOS, labels)
    model.save(tmp_path / "first", card="# a card\n", dtype=torch.float32)
    again = load_attention_model(tmp_path / "first")
    assert isinstance(again, SpeechLlm) and not again.sources and again.max_seconds == 7.0
    again.save(tmp_path / "whole", card="", dtype=torch.float32)
    for folder, found in ((tmp_path / "first", again), (tmp_path / "whole", SpeechLlm.load(tmp_path / "whole"))):
        assert not any(module.training or isinstance(module, LoraLinear) for module in found.modules())
        assert found.vocabulary.digest() == model.vocabulary.digest() and found.prompts == model.prompts
        torch.testing.assert_close(scores(found, AUDIOS, labels), wanted, atol=1e-3, rtol=1e-4)
        acoustic = load_acoustic_model(folder)
        assert isinstance(acoustic, CtcModel)
        torch.testing.assert_close(acoustic.log_probs_of(AUDIOS).log_probs, heard, atol=1e-4, rtol=1e-4)

    stored, whole = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "whole"))
    tied = () if kind != "gpt2" else ("llm.lm_head.weight",)
    plain_llm = {f"llm.{name}" for name in tiny_lm(kind, tokenizer()).model.state_dict()} - set(tied)
    added = {name for name in model.state_dict() if name.startswith(("adapter.", "cross."))}
    assert whole.keys() == plain_llm | added | set(tiny_ctc().state_dict()), "plain names, nothing twice"
    parts = {name: {n for n in stored if n.startswith(name)} for name in ("llm.", "adapter.", "cross.")}
    assert parts["adapter."] | parts["cross."] == added
    learned = {name for name, p in model.named_parameters() if p.requires_grad and name.startswith("llm.")}
    if named:
        assert parts["llm."] == learned
        assert all(name.endswith((".up", ".down")) or name.split(".")[-2] in ("embed_tokens", "wte", "lm_head") for name in learned) or (
            learns == "all"
        )
    ctc = stored.keys() - set().union(*parts.values())
    assert ctc == (set() if named and encoder == "rest" else set(tiny_ctc().state_dict()))


def test_a_folder_of_low_rank_paths_holds_little_and_needs_its_sources(sources: dict[str, Path], tmp_path: Path) -> None:
    places = {name: tmp_path / name for name in ("llm", "ctc")}
    shutil.copytree(sources["qwen2"], places["llm"])
    shutil.copytree(sources["ctc"], places["ctc"])
    model = trained(tiny("qwen2", **places, encoder="rest", adapter=ADAPTERS["concat"], lora=Lora(2, 2.0, ("q_proj",))))
    model.save(tmp_path / "small", card="", dtype=torch.float32)
    stored = load_file(tmp_path / "small" / "model.safetensors")
    layers = [f"llm.model.layers.{i}.self_attn.q_proj.{part}" for i in range(2) for part in ("up", "down")]
    assert stored.keys() == {*layers, "adapter.norm.weight", "adapter.norm.bias", "adapter.linear.weight", "adapter.linear.bias"}
    wanted, labels = scores(model, AUDIOS, texts_of(model)), texts_of(model)
    loaded = SpeechLlm.load(tmp_path / "small")
    loaded.save(tmp_path / "whole", card="", dtype=torch.float32)
    size, whole = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("small", "whole"))
    assert 10 * size < whole
    other = byte_level([" ".join(WORDS.split()[::-1]), "bb aa", "aab"] * 9)
    assert other.digest() != model.vocabulary.digest()
    write_llm("qwen2", places["llm"], other)
    message = f"was trained on {places['llm']} of vocabulary {model.vocabulary.digest()}, found {other.digest()}"
    with pytest.raises(ModelError, match=message):
        SpeechLlm.load(tmp_path / "small")
    shutil.rmtree(places["llm"])
    with pytest.raises(ModelError, match="does not load as a causal language model"):
        SpeechLlm.load(tmp_path / "small")
    shutil.rmtree(places["ctc"])
    with pytest.raises(ModelError, match=f"{places['ctc']}"):
        load_acoustic_model(tmp_path / "small")
    torch.testing.assert_close(scores(SpeechLlm.load(tmp_path / "whole"), AUDIOS, labels), wanted, atol=1e-3, rtol=1e-4)


def test_half_precision_is_close(tmp_path: Path) -> None:
    for how in ("both ways", "merged", "cross"):
        model = trained(tiny(**HOW[how]))
        model.save(tmp_path / how, card="", dtype=torch.float16)
        rough = SpeechLlm.load(tmp_path / how, dtype="bfloat16")
        assert rough.embeddings.weight.dtype == torch.bfloat16
        exact = SpeechLlm.load(tmp_path / how)
        labels = texts_of(model)
        wanted = scores(model, AUDIOS, labels)
        torch.testing.assert_close(scores(exact, AUDIOS, labels), wanted, atol=0.1, rtol=0)
        assert not torch.equal(scores(exact, AUDIOS, labels), scores(rough, AUDIOS, labels))
        torch.testing.assert_close(scores(rough, AUDIOS, labels), wanted, atol=1.5, rtol=0.02)


@pytest.mark.parametrize("how", ["prefix", "cross"])
def test_a_warm_start_takes_what_the_folder_holds(how: str, sources: dict[str, Path], tmp_path: Path) -> None:
    def fresh(**fields: Any) -> SpeechLlm:
        return tiny("qwen2", llm=sources["qwen2"], **fields, **HOW[how])

    model = trained(fresh(encoder="learn"))
    labels, wanted = texts_of(model), scores(model, AUDIOS, texts_of(model))
    model.save(tmp_path, card="", dtype=torch.float32)
    for encoder in ("learn", "rest"):
        again = fresh(encoder=encoder)
        report = warm_start(again, tmp_path)
        assert not report.skipped and not report.new
        torch.testing.assert_close(scores(again, AUDIOS, labels), wanted, atol=1e-4, rtol=1e-4)
    with pytest.raises(ModelError, match="an encoder with low-rank paths"):
        warm_start(fresh(encoder="lora"), tmp_path)


# What learns


def loss_of(out: AedOutput) -> Tensor:
    spoken = F.cross_entropy(out.logits.flatten(0, 1), out.targets.flatten(), ignore_index=IGNORE)
    return spoken - out.heads.main.log_probs.mean()


LEARNING = [
    ("llama", "all", "learn", "rest", "own", lambda name: name not in EMBEDDINGS),
    ("gpt2", "all", "rest", "learn", "own", lambda name: not name.startswith("ctc.")),
    ("llama", "lora", "lora", "rest", "own", lambda name: "ctc.head" in name or name.endswith((".up", ".down")) or is_added(name)),
    ("gpt2", "lora", "rest", "rest", "ctc", lambda name: name in EMBEDDINGS or name.endswith((".up", ".down")) or is_added(name)),
    ("llama", "nothing", "rest", "learn", "own", lambda name: name in EMBEDDINGS or is_added(name)),
    ("gpt2", "nothing", "rest", "rest", "own", lambda name: is_added(name)),
]
EMBEDDINGS = {"llm.model.embed_tokens.weight", "llm.transformer.wte.weight", "llm.lm_head.weight"}


def is_added(name: str) -> bool:
    return name.startswith(("adapter.", "cross."))


@pytest.mark.parametrize(("kind", "learns", "encoder", "embeddings", "units", "expected"), LEARNING)
def test_what_is_said_to_learn_has_gradients_under_autocast_and_nothing_else(
    kind: str, learns: str, encoder: str, embeddings: str, units: str, expected: Callable[[str], bool]
) -> None:
    for how, fields in HOW.items():
        adapter = ADAPTERS["ctc" if how == "merged" else "conv"]
        dims = {"learns": learns, "encoder": encoder, "embeddings": embeddings, "units": units, "adapter": adapter, **fields, **PROMPTS}
        model = tiny(kind, **dims).train()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = forward(model, AUDIOS, texts_of(model))
            loss = loss_of(out)
        assert out.logits.dtype == torch.float32
        loss.backward()
        found = {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.isfinite().all())}
        assert found == {name for name, _ in model.named_parameters() if expected(name)}, how


@pytest.mark.parametrize("how", ["prefix", "both ways", "cross"])
def test_computing_activations_again_gives_the_same_gradients(how: str) -> None:
    gradients = []
    for recompute in (False, True):
        model = trained(tiny(lora=Lora(4, 4.0, TARGETS["llama"], dropout=0.0), encoder="rest", recompute=recompute, **HOW[how])).train()
        calls: list[int] = []
        model.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))  # type: ignore[union-attr]
        loss_of(forward(model, AUDIOS, texts_of(model))).backward()
        assert len(calls) == 1 + recompute
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("adapter", ["concat", "conv"])
@pytest.mark.parametrize("how", ["prefix", "both ways"])
def test_a_ctc_head_hears_the_language_models_states_at_the_audio(how: str, adapter: str, tmp_path: Path) -> None:
    model = trained(tiny(adapter=ADAPTERS[adapter], audio_head=True, **HOW[how], **PROMPTS))
    (head,), before, found = model.audio_head, model.embeddings(torch.tensor(model.prompts[0])), list[Tensor]()
    with torch.no_grad():
        for sound in (sound_of(model, audio) for audio in AUDIOS):
            n, m = len(before), len(before) + len(sound)
            mask = torch.ones(m, m).tril()
            mask[n:, n:] += how == "both ways"
            x = torch.cat([before, sound])[None]
            states = model.llm.base_model(inputs_embeds=x, attention_mask=torch.where(mask > 0, 0.0, -torch.inf)[None, None])
            found.append(head(states.last_hidden_state[0, n:]).log_softmax(-1))
        heard = forward(model, AUDIOS, texts_of(model)).heard
    assert heard is not None and heard.lengths.tolist() == [len(x) for x in found]
    model.save(tmp_path, card="", dtype=torch.float32)
    named = load_acoustic_model(f"{tmp_path}#llm")
    assert named.vocabulary.digest() == model.ctc.vocabulary.digest()
    assert named.seconds_per_frame == model.ctc.encoder.seconds_per_frame * ADAPTERS[adapter].factor
    for out in (heard, named.log_probs_of(AUDIOS)):
        for row, n, wanted in zip(out.log_probs, out.lengths.tolist(), found, strict=True):
            torch.testing.assert_close(row[:n], wanted, atol=1e-3, rtol=1e-3)
    plainly = load_acoustic_model(tmp_path)
    assert plainly.log_probs_of(AUDIOS).log_probs.shape[1] > heard.log_probs.shape[1], "the encoder's own head is another one"
    long = named.log_probs_of([noise(40.0, 3)])
    assert int(long.lengths[0]) == pytest.approx(40.0 / named.seconds_per_frame, abs=2)


def test_a_ctc_head_on_the_language_model_is_refused_where_it_makes_no_sense(tmp_path: Path) -> None:
    for dims in ({"attention": "cross"}, {"attention": "merged"}, {"adapter": AdapterDims("words")}):
        with pytest.raises(ValueError, match="audio_head wants attention=prefix and an adapter of kind concat or conv"):
            SpeechLlmDims(audio_head=True, **dims)  # type: ignore[arg-type]
    tiny().save(tmp_path, card="")
    with pytest.raises(ModelError, match=r"has no CTC head on its language model: train one with llm.dims.audio_head=true"):
        load_acoustic_model(f"{tmp_path}#llm")


def test_an_encoder_at_rest_hears_the_same_in_training() -> None:
    model = tiny(encoder="rest")
    state = {name: x.clone() for name, x in model.ctc.state_dict().items()}
    heard = forward(model, AUDIOS, texts_of(model)).heads.main.log_probs
    with torch.no_grad():
        assert torch.equal(forward(model.train(), AUDIOS, texts_of(model)).heads.main.log_probs, heard)
        assert model.llm.training and all(torch.equal(x, state[name]) for name, x in model.ctc.state_dict().items())
        learning = tiny(encoder="learn").train()
        assert not torch.equal(forward(learning, AUDIOS, texts_of(learning)).heads.main.log_probs, heard)


def test_what_cannot_be_built_or_heard_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="bidirectional audio is of attention=prefix; in merged"):
        SpeechLlmDims(attention="merged", bidirectional=True)
    with pytest.raises(ValueError, match="recompute does not go with attention=merged"):
        SpeechLlmDims(attention="merged", recompute=True)
    lm, encoder = tiny_lm("llama", tokenizer()).model, tiny_ctc().encoder
    letters = CtcModel(encoder, CharacterVocabulary(["<pad>", "|", "A"]))
    with pytest.raises(ModelError, match="labels are a CharacterVocabulary, expected SentencePiece: set units=own"):
        SpeechLlm(letters, lm, tokenizer(), SpeechLlmDims(units="ctc"))
    with pytest.raises(ModelError, match="the CTC head stacks 2: set kind=concat"):
        SpeechLlm(CtcModel(encoder, pieces(14), stack=2), lm, tokenizer(), SpeechLlmDims(adapter=AdapterDims("ctc")))
    with pytest.raises(ModelError, match=r"is called q_proj, v_proj: set lora.targets to some of c_attn, c_fc, c_proj$"):
        tiny("gpt2", lora=Lora())
    with pytest.raises(ModelError, match="no linear layer of ConformerEncoder is called q_proj"):
        tiny(encoder="lora", encoder_lora=Lora(targets=("q_proj",)))
    model = tiny(max_seconds=1.0)
    with pytest.raises(ModelError, match=r"1\.3 s of audio are longer than the 1 s that the model hears at once"):
        model.scorer(AUDIOS)
    with pytest.raises(ModelError, match="3 rows asked for, but the audio of 1 utterances"):
        model.scorer(AUDIOS[:1]).start(3)
    model.ctc.save(tmp_path, card="")
    with pytest.raises(ModelError, match="is a model of type ctc, expected speech_llm"):
        SpeechLlm.load(tmp_path)


@pytest.mark.parametrize(
    ("config", "known"),
    [(PhiConfig, False), (CohereConfig, False), (GlmConfig, False), (Olmo2Config, False), (StableLmConfig, False), (Qwen3Config, True)],
)
def test_merged_wants_keys_that_are_turned_as_they_are_here(config: Any, known: bool) -> None:
    """Partial and interleaved rotary embeddings and other norms are refused; what is taken gives the plain forward's scores."""
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    special = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0, "max_position_embeddings": 256, "head_dim": 8}
    torch.manual_seed(0)

    def built(attention: str) -> SpeechLlm:
        lm = AutoModelForCausalLM.from_config(config(vocab_size=tokenizer().size, **shape, **special, initializer_range=0.3))
        return trained(SpeechLlm(tiny_ctc(), lm, tokenizer(), SpeechLlmDims(attention=attention, learns="all")).eval())  # type: ignore[arg-type]

    labels = texts_of(tiny())
    for attention in ("prefix", "cross"):
        model = built(attention)
        assert scores(model, AUDIOS, labels).tolist() == pytest.approx(in_training(model, AUDIOS, labels), abs=2e-3)
    if known:
        model = built("merged")
        wanted = [score_of(model, sound_of(model, x), y) for x, y in zip(AUDIOS, labels, strict=True)]
        assert scores(model, AUDIOS, labels).tolist() == pytest.approx(wanted, abs=2e-3)
    if not known:
        with pytest.raises(ModelError, match=r"not known here \(partial or interleaved .*use attention=prefix or attention=cross$"):
            built("merged")


def test_models_whose_layers_are_not_known_can_be_prefixed() -> None:
    config = OPTConfig(
        vocab_size=tokenizer().size, hidden_size=16, num_hidden_layers=2, ffn_dim=32, num_attention_heads=2, word_embed_proj_dim=16
    )
    for attention in ("merged", "cross"):
        with pytest.raises(ModelError, match=r"OPT.* known here: use attention=prefix"):
            SpeechLlm(tiny_ctc(), OPTForCausalLM(config), tokenizer(), SpeechLlmDims(attention=attention, learns="all"))
    model = trained(SpeechLlm(tiny_ctc(), OPTForCausalLM(config), tokenizer(), SpeechLlmDims(learns="all")).eval())
    labels = texts_of(model)
    assert scores(model, AUDIOS, labels).tolist() == pytest.approx(in_training(model, AUDIOS, labels), abs=3e-4)
