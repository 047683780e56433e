from __future__ import annotations

import hashlib
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from duolect.audio.augment import random_for
from duolect.data import pieces as module
from duolect.data.pieces import PiecesError, SubwordSampler, train_pieces
from duolect.vocabulary import CharacterVocabulary, SentencePieceVocabulary, load_vocabulary

TEXT = """the cat sat on the mat
The dog ate the cat's dinner in 1984
  the   man and the woman sat on the other mat

another dog and another cat ate another dinner
in 1984 the mother of the other man sat under the thatched roof and dined on rhubarb and tomatoes
"""


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> SentencePieceVocabulary:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return train_pieces(path, pieces=44)


def test_pieces(vocabulary: SentencePieceVocabulary, text: Path, tmp_path: Path) -> None:
    assert (vocabulary.eos, vocabulary.bos, vocabulary.blank, vocabulary.size) == (0, 1, 44, 45)
    assert vocabulary.decode(vocabulary.encode("the cat ate in 1984")) == "the cat ate in 1984"
    digits = [vocabulary.piece(label) for label in vocabulary.encode("1984")]
    assert [piece.strip("▁") for piece in digits if piece != "▁"] == ["1", "9", "8", "4"]
    assert vocabulary.processor.unk_id() == 2 and 2 in vocabulary.encode("THE CAT")
    upper = train_pieces(text, pieces=44, case="upper")
    assert [upper.piece(i) for i in upper.encode("THE CAT")] == [vocabulary.piece(i).upper() for i in vocabulary.encode("the cat")]
    kept = train_pieces(text, pieces=44, case="keep")
    assert 2 not in kept.encode("The cat")
    vocabulary.save(tmp_path)
    assert load_vocabulary(tmp_path).digest() == vocabulary.digest()


def test_pieces_are_the_same_in_each_process(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import sys, hashlib; from duolect.data import pieces; pieces.MOST_SENTENCES = int(sys.argv[2]);"
        "print(hashlib.sha256(pieces.train_pieces(sys.argv[1], pieces=40).model).hexdigest())"
    )
    text.write_text(TEXT * 20)
    for most in (30, 1000):
        there = subprocess.run([sys.executable, "-c", code, text, str(most)], capture_output=True, text=True, check=True).stdout.strip()
        monkeypatch.setattr(module, "MOST_SENTENCES", most)
        assert hashlib.sha256(train_pieces(text, pieces=40).model).hexdigest() == there


@pytest.mark.parametrize(
    ("size", "content", "said"),
    [
        (5000, TEXT, r"5000 pieces cannot be made of 5 sentences, which allow at most \d+ pieces: choose another size"),
        (5, TEXT, "at least 2[0-9] pieces, one for each character"),
        (50, " \n", "has no sentence to make pieces of"),
    ],
)
def test_sizes_that_do_not_fit(text: Path, size: int, content: str, said: str) -> None:
    text.write_text(content)
    with pytest.raises(PiecesError, match=said) as caught:
        train_pieces(text, pieces=size)
    assert "\n" not in str(caught.value)


def test_sampling_is_a_function_of_seed_epoch_utterance(vocabulary: SentencePieceVocabulary) -> None:
    text = "the cat sat on the other mat and ate another dinner"
    sampler, again = (SubwordSampler(vocabulary, alpha=0.3) for _ in range(2))
    drawn = [sampler.sample(text, random_for(7, epoch, "u1")) for epoch in range(40)]
    assert [again.sample(text, random_for(7, epoch, "u1")) for epoch in reversed(range(40))] == drawn[::-1]
    assert all(vocabulary.decode(labels) == text for labels in drawn)
    assert len({tuple(labels) for labels in drawn}) > 20
    assert SubwordSampler(vocabulary, alpha=1e6).sample(text, random_for(0, 0, "u1")) == vocabulary.encode(text)
    assert SubwordSampler(vocabulary, alpha=0, nbest=1).sample(text, random_for(0, 0, "u1")) == vocabulary.encode(text)
    assert sampler.sample("", random_for(0, 0, "u1")) == []
    with pytest.raises(PiecesError, match="alpha -1"):
        SubwordSampler(vocabulary, alpha=-1.0)


def test_sampling_has_the_distribution_of_sentencepiece(vocabulary: SentencePieceVocabulary) -> None:
    """Our draws against SentencePiece's own sampling (its global generator) over the same n-best of a word."""
    word, alpha, count = "another", 0.5, 4000
    sampler, random = SubwordSampler(vocabulary, alpha=alpha, nbest=64), np.random.default_rng(0)
    ours = Counter(tuple(sampler.sample(word, random)) for _ in range(count))
    encode = vocabulary.processor.encode
    theirs = Counter(tuple(encode(word, enable_sampling=True, alpha=alpha, nbest_size=64)) for _ in range(count))
    assert len(ours) > 3
    assert sum(abs(ours[x] - theirs[x]) for x in ours | theirs) / count < 0.1


def test_what_is_kept_is_bounded(vocabulary: SentencePieceVocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_WORDS", 3)
    sampler = SubwordSampler(vocabulary, alpha=0.5)
    sampler.sample("the cat sat on another mat", np.random.default_rng(0))
    assert len(sampler._known) <= 3


def test_units_that_are_no_pieces_cannot_be_sampled() -> None:
    with pytest.raises(PiecesError, match="SentencePiece segmentations, and the units are none"):
        SubwordSampler(CharacterVocabulary(["<pad>", "<s>", "</s>", "|", "a"]), alpha=0.5)
