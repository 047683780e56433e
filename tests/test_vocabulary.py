"""What labels mean: where words begin, and which labels text of a certain writing never has."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import BertTokenizer

from duolect.recognize.decoding import WRITTEN, foreign
from duolect.search.fusion import TextPolicy
from duolect.vocabulary import TokenizerVocabulary
from tests.conftest import byte_level


@pytest.fixture(scope="module")
def headings() -> TokenizerVocabulary:
    """Byte-level labels of text with headings: `##` is one of them, as in the vocabularies of GPT-2 and SmolLM2."""
    vocabulary = byte_level(["## the ##", "#### the", "the cat's hat, the Cat"] * 9)
    assert any(vocabulary.piece(label).startswith("##") for label in range(vocabulary.size))
    return vocabulary


def test_a_heading_is_no_mark_of_a_word_that_goes_on(headings: TokenizerVocabulary) -> None:
    starts = {headings.piece(label) for label in range(headings.size) if headings.starts_word(label)}
    assert starts == {p for p in map(headings.piece, range(headings.size)) if p[:1] in "ĠĊ"}
    labels = headings.encode("the hat")
    begins = [i for i, label in enumerate(labels) if headings.word_starts[label]]
    assert headings.decode(labels[: begins[0]]) == "the" and len(begins) == 1
    assert headings.label_texts[headings.encode("##")[0]].startswith("#")


def test_word_pieces_go_on_with_a_word_where_they_are_marked(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "##a"]))
    vocabulary = TokenizerVocabulary(BertTokenizer(str(tmp_path / "vocab.txt")), bos=2, eos=3)
    assert [vocabulary.piece(x) for x in range(vocabulary.size) if vocabulary.starts_word(x)] == ["a", "b"]
    assert vocabulary.label_texts[6] == "a"


def test_text_in_lower_case_has_no_other_signs(headings: TokenizerVocabulary) -> None:
    unsaid = foreign(headings, WRITTEN["lower"])
    assert unsaid is not None and unsaid.dtype == torch.bool
    assert not unsaid[headings.encode("the cat's hat")].any()
    for text in ("##", "Cat", ",", "\n", "\x1c"):
        assert bool(unsaid[headings.encode(text)].any()), text
    assert foreign(headings, TextPolicy()) is None and foreign(headings, WRITTEN["sentence"]) is None
