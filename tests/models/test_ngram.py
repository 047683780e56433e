"""N-grams against KenLM's own scores, and searches with them against brute force."""

from __future__ import annotations

import gzip
import math
import sys

import pytest
import torch

from duolect.models import ModelError
from duolect.models.ngram import NgramScorer, load_ngram
from duolect.recognize.decoding import policy_of
from duolect.scorer import Hypothesis
from duolect.search.ctc import ctc_beam_search
from duolect.search.fusion import AtEnd, AtWordEnd, Every, EveryLabel, Fused, LabelPrior, Retokenized, TextPolicy, held_to_words
from duolect.search.rescore import labels_for, rescored
from duolect.vocabulary import CharacterVocabulary, VocabularyError
from tests.arpa import write_arpa
from tests.conftest import WORDS, sentence_pieces
from tests.oracles import all_alignments, random_log_probs

kenlm = pytest.importorskip("kenlm")
TEXTS = ["ab abba", "ba a ab", "bab aa bb", "a ab abba", "abba ba", "bb bab ab ab"]


def spelled(text: str) -> list[str]:
    return ["|" if c == " " else c for c in text]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return write_arpa(tmp_path_factory.mktemp("lm") / "words.arpa", [t.split() for t in TEXTS])


@pytest.fixture(scope="module")
def labels(tmp_path_factory):
    return write_arpa(tmp_path_factory.mktemp("lm") / "labels.arpa", map(spelled, TEXTS), order=4)


def own_score(path, words: list[str], oov: float = 0.0) -> float:
    """KenLM's score of a whole sentence in nats, from its own command."""
    found = list(kenlm.Model(str(path)).full_scores(" ".join(words)))
    return sum(p * math.log(10) - oov * unknown for p, _, unknown in found)


def test_words_in_any_cuts_and_order_of_rows_score_as_kenlm_scores_the_sentence(words, letters):
    lm = load_ngram(words, over=letters, oov=1.5)
    assert lm.vocabulary.described() == "3-gram" and policy_of(lm) == TextPolicy(case="lower", punctuation="keep")
    state, texts = lm.select(lm.start(2), torch.tensor([1, 0, 1])), [""] * 3
    total = torch.zeros(3)
    for chunk in (["ab", "", "a ab abba"], ["abba bab", "ba", ""], ["nobody ab", "", "b b"]):
        encoded = [lm.vocabulary.encode(x) for x in chunk]
        padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(x, dtype=torch.long) for x in encoded], batch_first=True)
        gained, state = lm.advance(state, padded, torch.tensor([len(x) for x in encoded]))
        total += gained
        texts = [f"{a} {b}".strip() for a, b in zip(texts, chunk, strict=True)]
    swap = torch.tensor([2, 0, 0, 1])
    ended = total[swap] + lm.finish(lm.select(state, swap))
    assert ended.tolist() == pytest.approx([own_score(words, texts[i].split(), oov=1.5) for i in swap.tolist()], abs=1e-4)
    assert kenlm.Model(str(words)).score("ab abba") * math.log(10) == pytest.approx(own_score(words, ["ab", "abba"]), abs=1e-5)


def test_a_prompt_is_conditioned_on_and_not_scored(words, letters):
    lm = load_ngram(words, over=letters, prompt="Ba, a")
    gained, _ = lm.advance(lm.start(1), torch.tensor([lm.vocabulary.encode("ab")]), torch.tensor([1]))
    scores = [p for p, _, _ in kenlm.Model(str(words)).full_scores("ba a ab", eos=False)]
    assert float(gained) == pytest.approx(scores[-1] * math.log(10), abs=1e-5)


@pytest.mark.parametrize("schedule", [AtWordEnd(), Every(2), EveryLabel(lookahead=False), AtEnd()])
def test_a_search_with_words_is_exact_with_a_prior_in_step(words, letters, schedule):
    lm, prior = load_ngram(words, over=letters), LabelPrior(torch.tensor([0.4, 0.3, 0.1, 0.2, 0.1]).log(), letters)
    x, lengths = random_log_probs(2, 5, letters, seed=3), torch.tensor([5, 4])
    fused = {
        "llm": Fused(scorer=Retokenized(lm, letters, policy=policy_of(lm)), scale=0.5, when=schedule),
        "prior": Fused(scorer=held_to_words(prior), scale=-0.3, when=schedule),
    }
    for b, found in enumerate(ctc_beam_search(x, lengths, vocabulary=letters, beam=4000, fused=fused)):
        ctc = {y: s for y, s in all_alignments(x[b, : lengths[b]], letters.blank).items() if s > -1e6}
        assert len(found) == len(ctc)
        for h in found:
            assert h.parts["ctc"] == pytest.approx(ctc[h.labels], abs=3e-4)
            assert h.parts["llm"] == pytest.approx(own_score(words, letters.decode(h.labels).split()), abs=3e-4)
            assert h.parts["prior"] == pytest.approx(sum(float(prior.table[y]) for y in h.labels), abs=1e-4)


def test_labels_are_found_and_their_search_is_exact(labels, letters):
    lm = load_ngram(labels, over=letters)
    assert lm.vocabulary is letters
    x, lengths = random_log_probs(2, 5, letters, seed=4), torch.tensor([5, 3])
    fused = {"lm": Fused(scorer=lm, scale=0.7, when=EveryLabel())}
    for b, found in enumerate(ctc_beam_search(x, lengths, vocabulary=letters, beam=4000, fused=fused)):
        ctc = {y: s for y, s in all_alignments(x[b, : lengths[b]], letters.blank).items() if s > -1e6}
        assert len(found) == len(ctc)
        for h in found:
            assert h.parts["lm"] == pytest.approx(own_score(labels, [letters.piece(y) for y in h.labels]), abs=3e-4)
        scores = [h.score({"ctc": 1.0, "lm": 0.7}) for h in found]
        assert scores == sorted(scores, reverse=True)


def test_next_labels_have_the_probabilities_that_kenlm_gives(labels, letters, monkeypatch):
    lm, model = load_ngram(labels, over=letters), kenlm.Model(str(labels))
    monkeypatch.setattr("duolect.models.ngram.KEPT", 6)  # what is remembered is forgotten in between
    _, state = lm.advance(lm.start(3), torch.tensor([[0, 1], [1, 0], [0, 3]]), torch.tensor([2, 0, 1]))
    got = lm.log_probs(state)
    for row, history in enumerate(["a b", "", "a"]):
        for label, piece in enumerate(letters.symbols):
            *_, last = (p for p, _, _ in model.full_scores(f"{history} {piece}".strip(), eos=False))
            assert float(got[row, label]) == (-math.inf if label == letters.blank else pytest.approx(last * math.log(10), abs=1e-5))
    unknown = model.score("<unk>", bos=False, eos=False)
    assert got.exp().sum(1).tolist() == pytest.approx([1.0] * 3, abs=0.05) and unknown < -1, "all but <unk>'s share"
    some = torch.tensor([[4, 0], [3, 1], [1, 1]])
    assert torch.equal(lm.log_probs(state, some), got.gather(1, some))


def test_label_ngrams_over_pieces_and_upper_case_words_are_told_apart(tmp_path, letters):
    pieces = sentence_pieces([WORDS, *TEXTS] * 5)
    over_pieces = write_arpa(tmp_path / "p.arpa", [[pieces.piece(y) for y in pieces.encode(t)] for t in TEXTS])
    upper = write_arpa(tmp_path / "u.arpa", [t.upper().split() for t in TEXTS])
    (tmp_path / "u.arpa.gz").write_bytes(gzip.compress(upper.read_bytes()))
    assert load_ngram(over_pieces, over=pieces).vocabulary is pieces
    with pytest.raises(ModelError, match="labels of an acoustic model: name that one with --am"):
        load_ngram(over_pieces)
    for path in (upper, tmp_path / "u.arpa.gz"):
        lm = load_ngram(path, over=pieces)
        assert lm.vocabulary.described() == "3-gram in upper case" and policy_of(lm).case == "upper"
        (found,) = rescored(
            [[Hypothesis((), "ab abba", {})]], name="lm", scorer=lm, labels=labels_for(lm.vocabulary, [], policy=policy_of(lm))
        )
        assert found[0].parts["lm"] == pytest.approx(own_score(upper, ["AB", "ABBA"]), abs=1e-4)
    with pytest.raises(VocabularyError, match="Retokenized"):
        lm.log_probs(lm.start(1))


def test_case_and_punctuation_are_what_both_sides_write(tmp_path):
    cased = load_ngram(write_arpa(tmp_path / "c.arpa", [["The", "cat", "sat", "in", "the", "hat"], ["the", "Dog", "is", "The", "best"]]))
    assert cased.writing == {"case": "as_is", "punctuation": "drop"}
    upper = CharacterVocabulary([*"ABCDEFGHIJKLMNOPQRSTUVWXYZ'", "|", "<pad>", "<s>", "</s>"])
    lower = load_ngram(
        write_arpa(tmp_path / "l.arpa", [["the", "cat", "sat", "on", "the", "mat"], ["a", "hat", "is", "in", "a", "box"]]), over=upper
    )
    assert lower.writing == {"case": "lower", "punctuation": "keep"}, "an acoustic model that writes no punctuation may keep 'tis"


def test_what_cannot_be_read_is_one_line(tmp_path, words, monkeypatch):
    (tmp_path / "bad.bin").write_bytes(b"PK123456" * 30)
    with pytest.raises(ModelError, match=r"bad.bin: is no n-gram that KenLM reads") as refused:
        load_ngram(tmp_path / "bad.bin")
    assert "\n" not in str(refused.value)
    monkeypatch.setitem(sys.modules, "kenlm", None)
    with pytest.raises(ModelError, match="pip install kenlm"):
        load_ngram(words)
    with pytest.raises(ModelError, match=r"none.klm: cannot be read \(No such file"):
        load_ngram(tmp_path / "none.klm")


def test_states_are_values(labels, letters):
    lm = load_ngram(labels, over=letters)
    assert isinstance(lm, NgramScorer)
    state = lm.start(2)
    before = lm.log_probs(state).clone()
    for _ in range(3):
        lm.advance(state, torch.tensor([[0, 1], [1, 1]]), torch.tensor([2, 2]))
    assert torch.equal(lm.log_probs(state), before)
