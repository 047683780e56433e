"""Subword units: SentencePiece pieces trained on transcripts, and other segmentations of a text to learn from."""

from __future__ import annotations

import io
import random
import re
from pathlib import Path

import numpy as np

from duolect.data.filter import Case
from duolect.data.text import TextLines
from duolect.vocabulary import SentencePieceVocabulary, Vocabulary

MOST_SENTENCES = 10_000_000  # more than these do not make other pieces, and would not fit into memory
MOST_WORDS = 100_000  # whose segmentations are kept


class PiecesError(ValueError):
    """A text that no pieces of that number can be made of; one line with the next step."""


def train_pieces(source: str | Path, *, pieces: int, case: Case = "lower", seed: int = 0) -> SentencePieceVocabulary:
    """Unigram pieces of a text's sentences, digits apart, and a blank behind them; eos 0, bos 1, unknown 2. The same bytes every time.

    Of more than 10 million sentences a random part of about as many is used. Raises PiecesError.
    """
    import sentencepiece

    texts = TextLines(source, case=case)
    if not (count := len(texts)):
        raise PiecesError(f"{source}: has no sentence to make pieces of: name a text with one a line, or a manifest with texts")
    draw = random.Random(seed).random  # SentencePiece's own sampling gives other pieces in each process
    chosen = (text for text in texts if count <= MOST_SENTENCES or draw() * count < MOST_SENTENCES)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=chosen,
            model_writer=model,
            vocab_size=pieces,
            model_type="unigram",
            character_coverage=1.0,
            split_digits=True,
            eos_id=0,
            bos_id=1,
            unk_id=2,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
            max_sentence_length=10_000,
        )
    except RuntimeError as error:
        said = re.search(r"(too high .*<= (\d+))|(required_chars\. \d+ vs (\d+))|(sentences_\.empty)", str(error))
        most, least = (said[2], said[4]) if said else (None, None)
        why = f"at most {most} pieces" if most else f"at least {least} pieces, one for each character" if least else error
        raise PiecesError(
            f"{source}: {pieces} pieces cannot be made of {count} sentences, which allow {why}: choose another size"
        ) from error
    return SentencePieceVocabulary(model.getvalue(), blank="last")


class SubwordSampler:
    """Labels of a text in segmentations drawn anew each time (Kudo, ACL 2018): p(segmentation) ** alpha over the best `nbest` of each word.

    SentencePiece can do that too, but with one global generator of random numbers; here they come from the caller. Pieces never cross
    words, so drawing word by word is drawing a sentence. alpha: 0 all alike, 1 as likely as the unigrams say, large: always the best.
    """

    def __init__(self, vocabulary: Vocabulary, *, alpha: float, nbest: int = 32) -> None:
        if not isinstance(vocabulary, SentencePieceVocabulary):
            raise PiecesError("sampling draws SentencePiece segmentations, and the units are none: set learning.sampling=null")
        crossing = any("▁" in vocabulary.piece(label)[1:] for label in range(vocabulary.size))
        if crossing or alpha < 0 or nbest < 1:
            raise PiecesError(f"alpha {alpha}, nbest {nbest}, pieces {vocabulary.digest()}: expected >= 0, >= 1, and pieces within words")
        self.vocabulary, self.alpha, self.nbest = vocabulary, alpha, nbest
        self._known: dict[str, tuple[np.ndarray, list[list[int]]]] = {}

    def sample(self, text: str, random: np.random.Generator) -> list[int]:
        """Labels of the whole text; the same for the same state of `random`."""
        words = text.split()
        labels: list[int] = []
        for word, at in zip(words, random.random(len(words)), strict=True):
            below, segmentations = self._known.get(word) or self._segmentations(word)
            labels += segmentations[int(np.searchsorted(below, at, side="right"))]
        return labels

    def _segmentations(self, word: str) -> tuple[np.ndarray, list[list[int]]]:
        """(probability of all before the second, third, ..., them)."""
        processor = self.vocabulary.processor
        found: list[list[int]] = processor.nbest_encode_as_ids(word, self.nbest)
        scores = self.alpha * np.array([sum(map(processor.get_score, labels)) for labels in found])
        shares = np.exp(scores - scores.max())
        if len(self._known) >= MOST_WORDS:
            self._known.clear()
        self._known[word] = known = (np.cumsum(shares / shares.sum())[:-1], found)
        return known
