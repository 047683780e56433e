"""Bonus of phrases: in any labels, cuts and searches, the sum over their occurrences in the text."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import BertTokenizerFast

from duolect.search import context
from duolect.search.context import ContextScorer
from duolect.search.ctc import ctc_beam_search
from duolect.search.fusion import Every, EveryLabel, Fused, SearchError
from duolect.search.label import label_beam_search
from duolect.vocabulary import CharacterVocabulary, TokenizerVocabulary, Vocabulary
from tests.conftest import tiny_lm
from tests.oracles import all_alignments, random_log_probs

PHRASES = {"ab": 1.0, "Ab ba": 2.0, "ba ab": 0.5, "abb": 1.5, "b": -0.5, "ab ba b": 0.25}


def naive(text: str, phrases: dict[str, float] = PHRASES) -> float:
    """Weight times letters of every place in the words of a text where a phrase stands."""
    words, total = text.lower().split(), 0.0
    for phrase, weight in phrases.items():
        parts = phrase.lower().split()
        places = sum(words[i : i + len(parts)] == parts for i in range(len(words) - len(parts) + 1))
        total += places * weight * len("".join(parts))
    return total


def word_pieces(tmp_path) -> TokenizerVocabulary:
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "ab", "##a", "##b", "##ba"]))
    tokenizer = BertTokenizerFast(vocab=str(tmp_path / "vocab.txt"))
    return TokenizerVocabulary(tokenizer, bos=2, eos=3)


@pytest.fixture(params=["letters", "upper", "pieces", "bytes", "wordpiece"])
def vocabulary(request, letters, other_vocabularies, tmp_path) -> Vocabulary:
    upper = CharacterVocabulary(["<pad>", "<s>", "</s>", "<unk>", "|", "A", "B", "'"])
    return {"letters": letters, "upper": upper, "wordpiece": word_pieces(tmp_path), **other_vocabularies}[request.param]


@pytest.mark.parametrize("kept", [2, 256])
def test_any_labels_in_any_cuts_have_the_bonus_of_their_text(vocabulary, monkeypatch, kept):
    monkeypatch.setattr(context, "KEPT", kept)
    scorer, rng = ContextScorer(PHRASES, vocabulary), random.Random(1)
    spoken = [i for i in range(vocabulary.size) if i != vocabulary.eos and set(vocabulary.label_texts[i].lower()) <= set("ab ")]
    histories = [[rng.choice(spoken) for _ in range(rng.randint(0, 14))] for _ in range(300)]
    state, total, done = scorer.start(1)[torch.zeros(300, dtype=torch.long)], torch.zeros(300), [0] * 300
    while any(n < len(h) for n, h in zip(done, histories, strict=True)):
        step = [min(rng.randint(0, 3), len(h) - n) for n, h in zip(done, histories, strict=True)]
        chunks = [h[n : n + k] + [0] * (3 - k) for h, n, k in zip(histories, done, step, strict=True)]
        ahead = scorer.log_probs(state)
        gained, after = scorer.advance(state, torch.tensor(chunks), torch.tensor(step))
        for row in (r for r, k in enumerate(step) if k == 1):
            assert float(gained[row]) == pytest.approx(float(ahead[row, chunks[row][0]]))
        assert torch.equal(ahead[:, vocabulary.eos], scorer.finish(state))
        total, state, done = total + gained, after, [n + k for n, k in zip(done, step, strict=True)]
    got, wanted = (total + scorer.finish(state)).tolist(), [naive(vocabulary.decode(h).removeprefix("##")) for h in histories]
    assert got == pytest.approx(wanted, abs=1e-4)
    assert sum(w != 0 for w in wanted) > 30


def test_a_phrase_is_rewarded_as_it_is_spelled_and_a_broken_one_pays_back(letters):
    scorer = ContextScorer({"abba": 1.0}, letters)
    a, b, space = 0, 1, 3

    def bonus(*labels: int) -> float:
        return float(scorer.advance(scorer.start(1), torch.tensor([labels]), torch.tensor([len(labels)]))[0])

    assert [bonus(*(a, b, b, a)[:n]) for n in range(1, 5)] == [1.0, 2.0, 3.0, 4.0]
    assert bonus(a, b, b, a, space) == 4.0 and bonus(a, b, b, a, b) == 0.0, "a longer word is another word"
    assert bonus(a, b, a) == 0.0 and bonus(b, a, b, b, a) == 0.0, "words are rewarded from their begin"
    assert bonus(a, b, space) == 0.0
    scorer = ContextScorer({"abba": -1.0, "ab": 0.5}, letters)
    assert [bonus(*(a, b, b, a, space)[:n]) for n in range(1, 6)] == [0.5, 1.0, 0.0, 0.0, -4.0], "what begins like it is no worse for it"


@pytest.mark.parametrize("schedule", [EveryLabel(), EveryLabel(lookahead=False), Every(2)])
def test_a_search_gives_each_hypothesis_the_bonus_of_its_text(letters, schedule):
    x, lengths = random_log_probs(2, 6, letters, seed=9), torch.tensor([6, 4])
    fused = {"context": Fused(scorer=ContextScorer(PHRASES, letters), scale=0.8, when=schedule)}
    for b, found in enumerate(ctc_beam_search(x, lengths, vocabulary=letters, beam=4000, fused=fused)):
        ctc = {y: s for y, s in all_alignments(x[b, : lengths[b]], letters.blank).items() if s > -1e6}
        assert len(found) == len(ctc)
        for h in found:
            assert h.parts["ctc"] == pytest.approx(ctc[h.labels], abs=3e-4)
            assert h.parts["context"] == pytest.approx(naive(h.text), abs=1e-4)
        scores = [h.score({"ctc": 1.0, "context": 0.8}) for h in found]
        assert scores == sorted(scores, reverse=True)


def test_a_label_synchronous_search_does_not_end_before_a_bonus_can_come(letters):
    fused = {
        "lm": Fused(scorer=tiny_lm("llama", letters), scale=1.0),
        "context": Fused(scorer=ContextScorer({"abbabab": 2.0}, letters), scale=1.0),
    }
    found = {stop: label_beam_search(fused, 1, beam=12, max_labels=9, stop=stop)[0][0] for stop in ("best", "all")}
    assert found["best"] == found["all"] and found["best"].parts["context"] > 0


@pytest.mark.parametrize("phrases", [{"abb": -3.0, "bbb": 0.1}, {"ab": 0.4, "abba ab": 0.4}, {"a": -2.0, "abab": 1.5}])
@pytest.mark.parametrize("seed", range(6))
def test_phrases_that_are_held_against_a_text_do_not_end_a_search_too_early(letters, phrases, seed):
    lm = Fused(scorer=tiny_lm("llama", letters, seed=seed), scale=1.0)
    fused = {"lm": lm, "context": Fused(scorer=ContextScorer(phrases, letters), scale=1.0)}
    best, every = (label_beam_search(fused, 1, beam=60, max_labels=6, stop=stop)[0][0] for stop in ("best", "all"))
    assert best == every


def test_a_label_synchronous_search_ends_when_one_phrase_cannot_turn_it(letters, monkeypatch):
    steps, plainly = list[int](), ContextScorer.log_probs
    monkeypatch.setattr(ContextScorer, "log_probs", lambda self, *x: [steps.append(1), plainly(self, *x)][1])
    scorer = ContextScorer({"abba": 0.5, "b ab": 0.9, "ba": -3.0}, letters)
    assert scorer.reward == pytest.approx(2.7)
    fused = {"lm": Fused(scorer=tiny_lm("llama", letters), scale=1.0), "context": Fused(scorer=scorer, scale=1.0)}
    found = {}
    for stop in ("best", "all"):
        found[stop] = label_beam_search(fused, 1, beam=6, max_labels=40, stop=stop)[0][0], len(steps)
        steps.clear()
    assert found["best"][0] == found["all"][0]
    assert found["best"][1] < 15 < found["all"][1]


def test_phrases_that_cannot_be_written_are_known(letters):
    assert ContextScorer({"abba": 1, "Krige": 1, "b-a!": 1}, letters).unwritable == ["krige"]
    with pytest.raises(SearchError, match="no phrase with a letter"):
        ContextScorer({" - ": 1.0}, letters)
