"""Label priors: counts and means by their formulas, segmentations that spell their words, priors of several vocabularies in one file."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from duolect.models.ctc import CtcOutput
from duolect.models.priors import (
    PRIORS_FILE,
    BpeDropout,
    PriorError,
    count_words,
    label_counts,
    read_prior,
    sampler,
    softmax_prior,
    spoken,
    text_priors,
    write_priors,
)
from duolect.vocabulary import CharacterVocabulary, SentencePieceVocabulary, Vocabulary
from tests.conftest import WORDS, byte_level, sentence_pieces
from tests.oracles import random_log_probs

TEXTS = [WORDS, "ab ab abba ba", "", "bab  bab ab", "abba"] * 3


def vocabulary_of(kind: str) -> Vocabulary:
    if kind == "bytes":
        return byte_level(TEXTS * 5)
    if kind == "letters":
        return CharacterVocabulary(["a", "b", "<pad>", "|", "</s>"], bos="</s>")
    pieces = sentence_pieces(TEXTS * 5)
    return pieces if kind == "pieces" else SentencePieceVocabulary(pieces.model, blank="last")


KINDS = ["bytes", "letters", "pieces", "pieces with blank"]


def ordered(x: Vocabulary, labels: list[int]) -> str:
    return "".join(x.piece(y) for y in labels)


@pytest.mark.parametrize("kind", KINDS)
def test_priors_sum_to_one_over_spoken_labels_and_are_finite(kind):
    vocabulary = vocabulary_of(kind)
    assert vocabulary.blank is None or not bool(spoken(vocabulary)[vocabulary.blank])
    priors = text_priors(count_words(TEXTS), vocabulary)
    assert ("sampled" in priors) == (kind != "letters")
    blank = vocabulary.blank
    if blank is not None:
        log_probs = random_log_probs(2, 5, vocabulary, seed=0)
        priors["softmax"] = softmax_prior([CtcOutput(log_probs, torch.tensor([5, 3]))], vocabulary)
        share = (log_probs[0].exp().sum(0) + log_probs[1, :3].exp().sum(0)).tolist()
        size, heard = int(spoken(vocabulary).sum()), sum(x for y, x in enumerate(share) if y not in (blank, vocabulary.eos))
        for y in spoken(vocabulary).nonzero()[:, 0].tolist():
            assert float(priors["softmax"][y]) == pytest.approx(math.log((1 - 1e-4) * share[y] / heard + 1e-4 / size), abs=1e-4)
    for prior in (*priors.values(), text_priors(count_words([]), vocabulary)["counts"]):
        assert bool(prior.isfinite().all()) and prior.shape == (vocabulary.size,)
        assert float(prior[spoken(vocabulary)].double().exp().sum()) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_counts_are_those_of_whole_texts(kind):
    vocabulary = vocabulary_of(kind)
    wanted = Counter(y for text in TEXTS for y in vocabulary.encode(" ".join(text.split())))
    counts = label_counts(count_words(iter(TEXTS)), vocabulary)
    assert {y: n for y, n in enumerate(counts.tolist()) if n} == dict(wanted)
    prior, size = text_priors(count_words(TEXTS), vocabulary)["counts"], int(spoken(vocabulary).sum())
    for y in spoken(vocabulary).nonzero()[:, 0].tolist():
        assert float(prior[y]) == pytest.approx(math.log(0.9 * wanted[y] / wanted.total() + 0.1 / size), abs=1e-5)


@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_sampled_segmentations_spell_their_words_and_follow_the_seed(kind):
    vocabulary, words = vocabulary_of(kind), count_words(TEXTS)
    draw = sampler(vocabulary, alpha=0.1, seed=1)
    assert draw is not None
    for word, first in words:
        found = {tuple(draw(word, first)) for _ in range(60)}
        assert {ordered(vocabulary, list(x)) for x in found} == {ordered(vocabulary, vocabulary.encode_word(word, first=first))}
        assert len(word) < 3 or len(found) > 1
    one, again, other = (label_counts(words, vocabulary, sampler(vocabulary, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)
    length = torch.tensor([len(vocabulary.piece(y)) for y in range(vocabulary.size)], dtype=torch.float64)
    assert float(one @ length) == pytest.approx(float(label_counts(words, vocabulary) @ length)), "each word counts as often as it stands"


def test_byte_pairs_without_dropout_are_the_tokenizer_and_with_all_of_it_are_letters():
    vocabulary = vocabulary_of("bytes")
    whole, letters = (BpeDropout(vocabulary, dropout=p, random=np.random.default_rng(0)) for p in (0.0, 1.0))
    for word, first in [*count_words(TEXTS), ("abbabab", False), ("don't", True), ("über", False)]:
        labels = vocabulary.encode_word(word, first=first)
        assert whole(word, first) == labels
        assert [vocabulary.piece(y) for y in letters(word, first)] == list(ordered(vocabulary, labels))
    third = BpeDropout(vocabulary, dropout=0.3, random=np.random.default_rng(0))
    # Of "ab" one merge is asked for once: it stays with probability 0.7.
    kept = sum(len(third("ab", True)) == 1 for _ in range(4000)) / 4000
    assert kept == pytest.approx(0.7, abs=0.03)


def test_a_file_holds_priors_of_several_vocabularies(tmp_path: Path):
    own, other = vocabulary_of("pieces with blank"), vocabulary_of("bytes")
    with pytest.raises(PriorError, match=r"priors.safetensors is missing: estimate priors with `duolect prior --am .* --data <manifest>`"):
        read_prior(tmp_path, "counts", own)
    first, second = (text_priors(count_words(TEXTS[:n]), own) for n in (1, 3))
    write_priors(tmp_path, own, first, source="one text")
    write_priors(tmp_path, other, {"llm": text_priors(count_words(TEXTS), other)["counts"]}, source="texts")
    write_priors(tmp_path, own, {"counts": second["counts"]}, source="three texts")
    assert torch.equal(read_prior(tmp_path, "counts", own), second["counts"])
    assert torch.equal(read_prior(tmp_path, "sampled", own), first["sampled"])
    assert torch.equal(read_prior(tmp_path, "llm", other), text_priors(count_words(TEXTS), other)["counts"])
    assert [p.name for p in tmp_path.iterdir()] == [PRIORS_FILE]
    with pytest.raises(PriorError, match=r"no prior 'softmax' of vocabulary \w+; it has counts, sampled: estimate"):
        read_prior(tmp_path, "softmax", own)
    with pytest.raises(PriorError, match=r"no prior 'llm' .* with `duolect prior .* --lm <model>`"):
        read_prior(tmp_path, "llm", vocabulary_of("letters"))
