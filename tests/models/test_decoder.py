"""Decoders over the trie of histories against full forwards: any cut into calls, any order of rows, with compaction, with audio."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, WhisperConfig, WhisperForConditionalGeneration

from duolect.models import ModelError
from duolect.models import decoder as decoder_module
from duolect.models.aed import WhisperAed
from duolect.models.lm import HFCausalLM
from duolect.scorer import Hypothesis
from duolect.search.fusion import LONGEST_WORD, Retokenized, TextPolicy
from duolect.search.rescore import labels_for, labels_of_text, own_labels, ranked, rescored
from duolect.vocabulary import VocabularyError
from tests.conftest import byte_level, bytes_in, tiny_lm
from tests.oracles import lm_from_scratch

KINDS = ["llama", "gpt2", "qwen2"]


def random_chunks(lm, rows: int, calls: int, seed: int):
    """Chunks of 0 to 3 labels a row, from few labels, so that histories are often equal."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(calls):
        yield torch.randint(0, 3, (rows, 3), generator=generator), torch.randint(0, 4, (rows,), generator=generator)


@pytest.mark.parametrize("kind", KINDS)
def test_increments_add_up_to_a_full_forward_whatever_the_cuts(letters, kind):
    lm = tiny_lm(kind, letters)
    owner = torch.tensor([0, 0, 1, 2, 2, 2, 2])
    state = lm.select(lm.start(3), owner)
    total, histories = torch.zeros(len(owner)), [[] for _ in owner]
    for labels, lengths in random_chunks(lm, len(owner), 7, seed=1):
        gained, state = lm.advance(state, labels, lengths)
        total += gained
        for history, chunk, n in zip(histories, labels.tolist(), lengths.tolist(), strict=True):
            history += chunk[:n]
        for row, history in enumerate(histories):
            assert float(total[row]) == pytest.approx(lm_from_scratch(lm, history, end=False), abs=3e-4)
    ends = lm.finish(state)
    for row, history in enumerate(histories):
        assert float(total[row] + ends[row]) == pytest.approx(lm_from_scratch(lm, history), abs=3e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_next_label_distribution_equals_a_full_forward_and_candidates_are_its_columns(letters, kind):
    lm = tiny_lm(kind, letters)
    state = lm.select(lm.start(2), torch.tensor([1, 0, 1]))
    _, state = lm.advance(state, torch.tensor([[0, 1], [1, 1], [0, 0]]), torch.tensor([2, 1, 0]))
    got = lm.log_probs(state)
    assert got.shape == (3, letters.size)
    assert got.exp().sum(1).tolist() == pytest.approx([1.0] * 3, abs=1e-5)
    for row, history in enumerate([[0, 1], [1], []]):
        logits = lm.model(input_ids=torch.tensor([[letters.bos, *history]])).logits[0, -1, : letters.size]
        assert torch.allclose(got[row], logits.log_softmax(-1), atol=1e-4)
    candidates = torch.tensor([[4, 0], [2, 2], [1, 3]])
    assert torch.allclose(lm.log_probs(state, candidates), got.gather(1, candidates), atol=1e-5)


def test_equal_histories_are_computed_once_and_states_are_values(letters):
    lm = tiny_lm("llama", letters)
    state = lm.select(lm.start(1), torch.zeros(64, dtype=torch.long))
    _, after = lm.advance(state, torch.tensor([[0, 1, 3]] * 32 + [[0, 1, 1]] * 32), torch.full((64,), 3))
    assert after.trie.size == 1 + 4, "bos, a, ab, ab| and abb"
    before = lm.log_probs(after).clone()
    for labels, lengths in random_chunks(lm, 64, 5, seed=2):
        lm.advance(after, labels, lengths)
    assert torch.equal(lm.log_probs(after), before), "advancing from a state must not change it"
    score, _ = lm.advance(state, torch.tensor([[0]] * 64), torch.ones(64, dtype=torch.long))
    assert float(score[0]) == pytest.approx(lm_from_scratch(lm, [0], end=False), abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_dropping_dead_histories_changes_nothing(letters, kind, monkeypatch):
    monkeypatch.setattr(decoder_module, "COMPACT_FROM", 8)
    lm = tiny_lm(kind, letters)
    state = lm.select(lm.start(3), torch.tensor([0, 0, 0, 2, 2, 2]))
    histories = [[] for _ in range(6)]
    sizes = []
    generator = torch.Generator().manual_seed(4)
    for labels, lengths in random_chunks(lm, 6, 20, seed=3):
        _, state = lm.advance(state, labels, lengths)
        for history, chunk, n in zip(histories, labels.tolist(), lengths.tolist(), strict=True):
            history += chunk[:n]
        rows = torch.randint(0, 6, (6,), generator=generator)
        state, histories = lm.select(state, rows), [list(histories[r]) for r in rows.tolist()]
        sizes.append(state.trie.size)
    assert any(b < a for a, b in itertools.pairwise(sizes)), "the trie never shrank: the test tests nothing"
    assert state.trie.groups < 3, "utterances without rows should have gone too"
    for row, history in enumerate(histories):
        logits = lm.model(input_ids=torch.tensor([[letters.bos, *history]])).logits[0, -1, : letters.size]
        assert torch.allclose(lm.log_probs(state)[row], logits.log_softmax(-1), atol=3e-4)


def test_a_prompt_is_conditioned_on_and_not_scored():
    vocabulary = byte_level(["ab abba ba bab"] * 3)
    plain = tiny_lm("qwen2", vocabulary)
    prompted = HFCausalLM(plain.model, vocabulary, prompt="abba ")
    labels = vocabulary.encode(" bab")
    score, _ = prompted.advance(prompted.start(1), torch.tensor([labels]), torch.tensor([len(labels)]))
    both = vocabulary.encode("abba") + labels
    wanted = lm_from_scratch(plain, both, end=False) - lm_from_scratch(plain, vocabulary.encode("abba"), end=False)
    assert float(score) == pytest.approx(wanted, abs=3e-4)


def test_batch_of_rows_equals_each_alone(letters):
    lm = tiny_lm("gpt2", letters)
    chunks = list(random_chunks(lm, 5, 4, seed=6))
    state, total = lm.start(5), torch.zeros(5)
    for labels, lengths in chunks:
        gained, state = lm.advance(state, labels, lengths)
        total += gained
    for row in range(5):
        alone, one = lm.start(1), 0.0
        for labels, lengths in chunks:
            gained, alone = lm.advance(alone, labels[row : row + 1], lengths[row : row + 1])
            one += float(gained)
        assert one == pytest.approx(float(total[row]), abs=1e-4)
        assert torch.allclose(lm.log_probs(alone)[0], lm.log_probs(state)[row], atol=1e-4)


def test_histories_longer_than_the_model_are_refused(letters):
    config = GPT2Config(vocab_size=8, n_embd=16, n_layer=1, n_head=2, n_positions=6, bos_token_id=4, eos_token_id=4)
    lm = HFCausalLM(AutoModelForCausalLM.from_config(config), letters)
    with pytest.raises(ModelError, match="longer than the 6 that"):
        lm.advance(lm.start(1), torch.zeros(1, 9, dtype=torch.long), torch.tensor([9]))


def test_a_vocabulary_larger_than_the_model_is_refused(letters):
    config = LlamaConfig(vocab_size=3, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(VocabularyError, match="only 3 rows"):
        HFCausalLM(AutoModelForCausalLM.from_config(config), letters)


def test_rescoring_equals_scores_from_scratch_by_text_and_by_labels(letters):
    own, other = tiny_lm("llama", letters), tiny_lm("qwen2", byte_level(["ab abba ba bab"] * 3))
    lists = [["ab", "ab a", "b", ""], ["abba ab"], []]
    nbest = [[Hypothesis(tuple(letters.encode(t)), t, {"ctc": -1.0 * i}) for i, t in enumerate(texts)] for texts in lists]
    flat = [h for hypotheses in nbest for h in hypotheses]
    assert labels_for(letters, flat) is own_labels
    got = rescored(nbest, name="lm", scorer=own, labels=labels_for(letters, flat))
    got = rescored(got, name="llm", scorer=other, labels=labels_for(other.vocabulary, flat))
    for hypotheses, texts in zip(got, lists, strict=True):
        assert [h.text for h in hypotheses] == texts
        for h in hypotheses:
            assert h.parts["lm"] == pytest.approx(lm_from_scratch(own, h.labels), abs=3e-4)
            assert h.parts["llm"] == pytest.approx(lm_from_scratch(other, other.vocabulary.encode(h.text)), abs=3e-4)
    best = ranked(got[0], {"ctc": 1.0, "lm": 0.5, "llm": 0.0})
    assert best[0].score({"ctc": 1.0, "lm": 0.5}) == max(h.score({"ctc": 1.0, "lm": 0.5}) for h in got[0])
    with pytest.raises(ValueError, match="rescore them first"):
        ranked(got[0], {"ctc": 1.0, "aed": 1.0})


def test_a_policy_writes_words_the_way_the_scorer_knows_them(letters):
    inner = tiny_lm("llama", byte_level(["Ab abba. BA bab."] * 3))
    policy = TextPolicy(case="sentence", end=".")
    text = "ba abba"
    scorer = Retokenized(inner, letters, policy=policy)
    labels = torch.tensor([letters.encode(text)])
    score, state = scorer.advance(scorer.start(1), labels, torch.tensor([labels.shape[1]]))
    wanted = [*inner.vocabulary.encode("Ba abba"), *inner.vocabulary.encode(".")]
    assert float(score + scorer.finish(state)) == pytest.approx(lm_from_scratch(inner, wanted), abs=3e-4)
    assert list(labels_of_text(inner.vocabulary, policy=policy)(Hypothesis((), text, {}))) == wanted
    assert TextPolicy(case="lower", punctuation="drop")("Don't!", first=True) == "don't"
    assert TextPolicy(case="upper")("a", first=False) == "A"


def test_dropped_punctuation_parts_words_and_endless_words_are_passed_on(letters):
    """A decoder that never writes a space ("can.join.com.au.uk.com ...") must not evade the scorer that judges its words."""
    policy = TextPolicy(case="lower", punctuation="drop")
    outer = byte_level(["join com.au uk", "two-nine don't"] * 3)
    inner = tiny_lm("llama", letters)
    scorer = Retokenized(inner, outer, policy=policy)
    texts = ["ab.ba ab", "Ab-ba, a'b!ab", "ab" * 60]
    for text in texts:
        labels, state, total = outer.encode(text), scorer.start(1), torch.zeros(1)
        for label in labels:  # one by one, so that what is held back shows
            gained, state = scorer.advance(state, torch.tensor([[label]]), torch.tensor([1]))
            total += gained
            assert int(state.count) <= LONGEST_WORD
        written = policy.words(text) if len(text) < 100 else ["ab" * 20, "ab" * 20, "ab" * 20]
        wanted = [y for i, word in enumerate(written) for y in letters.encode_word(policy(word, first=i == 0), first=i == 0)]
        assert float(total + scorer.finish(state)) == pytest.approx(lm_from_scratch(inner, wanted), abs=1e-3)
        assert len(text) > 100 or list(labels_of_text(letters, policy=policy)(Hypothesis((), text, {}))) == wanted
    assert policy.words("two-nine, don't") == ["two", "nine", "don't"] and TextPolicy().words("two-nine") == ["two-nine"]


def tiny_whisper() -> WhisperAed:
    """A random Whisper of two layers with a byte-level tokenizer that has Whisper's special labels."""
    vocabulary = byte_level(["the cat sat on a mat", "so it did"] * 3)
    vocabulary.tokenizer.add_special_tokens({"additional_special_tokens": ["<|startoftranscript|>", "<|notimestamps|>"]})
    vocabulary = type(vocabulary)(vocabulary.tokenizer)
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=vocabulary.size + 4,
        d_model=16,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_target_positions=200,
        init_std=0.4,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=1,
    )
    return WhisperAed(WhisperForConditionalGeneration(config), vocabulary)


def test_an_aed_scores_like_its_full_forward_and_shares_the_audio_among_rows():
    aed = tiny_whisper()
    rng = np.random.default_rng(0)
    audios = [rng.normal(0, 0.1, n).astype(np.float32) for n in (8000, 20000)]
    scorer = aed.scorer(audios)
    owner = [1, 0, 1, 1]
    state = scorer.select(scorer.start(2), torch.tensor(owner))
    spoken = [
        y for y in range(aed.vocabulary.size) if aed.output.bias is not None and bool(aed.output.bias[y] == 0) and y != aed.vocabulary.eos
    ]
    generator = torch.Generator().manual_seed(0)
    total, histories = torch.zeros(4), [[] for _ in owner]
    for _ in range(3):
        labels = torch.tensor(spoken)[torch.randint(0, len(spoken), (4, 2), generator=generator)]
        lengths = torch.randint(0, 3, (4,), generator=generator)
        gained, state = scorer.advance(state, labels, lengths)
        total += gained
        for history, chunk, n in zip(histories, labels.tolist(), lengths.tolist(), strict=True):
            history += chunk[:n]
    total += scorer.finish(state)
    for row, (utterance, history) in enumerate(zip(owner, histories, strict=True)):
        ids = torch.tensor([[*aed.prompt, *history]])
        hidden = aed.model.model.decoder(input_ids=ids, encoder_hidden_states=scorer.encoded[utterance : utterance + 1]).last_hidden_state
        log_probs = aed.output(hidden[0, len(aed.prompt) - 1 :]).log_softmax(-1)
        targets = torch.tensor([*history, aed.vocabulary.eos])
        assert float(total[row]) == pytest.approx(float(log_probs[torch.arange(len(targets)), targets].sum()), abs=5e-4)
    cross = state.trie.cache.cross_attention_cache.layers[0].keys
    assert cross.shape[0] == 2, "the audio's keys are held once per utterance, not per row"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_what_will_be_held_is_known_before(letters, kind, dtype):
    lm = tiny_lm(kind, letters)
    lm = HFCausalLM(lm.model.to(dtype), letters, prompt="ab ba")
    _, state = lm.advance(lm.start(2), torch.tensor([[0, 1, 0]] * 2), torch.tensor([3, 3]))
    assert bytes_in(state.trie.cache) == 2 * lm.bytes_of(labels=3)


def test_what_an_aed_will_hold_is_known_before():
    aed = tiny_whisper()
    scorer = aed.scorer([np.zeros(8000, np.float32)] * 2)
    _, state = scorer.advance(scorer.start(2), torch.tensor([[70, 80, 75]] * 2), torch.tensor([3, 3]))
    assert bytes_in(state.trie.cache) == 2 * aed.bytes_of(seconds=0.5, labels=3)


def test_the_internal_language_model_is_the_decoder_over_zeros():
    aed = tiny_whisper()
    scorer, history = aed.internal(2), [70, 80, 75, 80]
    score, state = scorer.advance(scorer.start(2), torch.tensor([history] * 2), torch.tensor([2, 4]))
    hidden = aed.model.model.decoder(
        input_ids=torch.tensor([[*aed.prompt, *history]]), encoder_hidden_states=torch.zeros(1, 1500, 16)
    ).last_hidden_state
    log_probs = aed.output(hidden[0, len(aed.prompt) - 1 :]).log_softmax(-1)
    wanted = log_probs[torch.arange(4), torch.tensor(history)]
    assert bool(wanted.isfinite().all())
    torch.testing.assert_close(score, torch.stack([wanted[:2].sum(), wanted.sum()]), atol=2e-4, rtol=0)
    torch.testing.assert_close(scorer.log_probs(state)[1], log_probs[-1], atol=2e-4, rtol=0)


def test_an_aed_refuses_audio_it_cannot_hear():
    with pytest.raises(ModelError, match="30 s"):
        tiny_whisper().scorer([np.zeros(16000 * 31, dtype=np.float32)])
