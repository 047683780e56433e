"""Vocabularies: what a label index means, for acoustic models and language models alike."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

VOCABULARY_FILE = "vocabulary.json"

WordJoint = Literal["space", "dummy", "none"]
"""How the labels of `a b` come from its words: encode("a") + encode(" b") | encode("a") + encode("b") | neither."""


class VocabularyError(ValueError):
    """Two parts do not agree on what a label means, or a vocabulary's files are unusable."""


class Vocabulary(ABC):
    """The meaning of label indices 0 .. size-1.

    `blank` (CTC only) is one of the indices and means no text. `bos` starts a history, `eos` ends it; neither is text. The digest is of
    the indices' meaning without blank, so that a CTC model and a language model in its units agree.
    """

    kind: str
    size: int
    blank: int | None
    bos: int
    eos: int
    continued: str = ""  # what stands before pieces that go on with a word, where all others begin one (WordPiece: `##`)

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Labels of a whole text, without bos and eos."""

    @abstractmethod
    def decode(self, labels: Sequence[int]) -> str:
        """Text of labels; special labels (blank, bos, eos) give no text. Nothing is collapsed."""

    @abstractmethod
    def piece(self, label: int) -> str:
        """The label's written form in the vocabulary's own convention (`▁the`, `Ġthe`, `|`), for people and for the digest."""

    @abstractmethod
    def starts_word(self, label: int) -> bool:
        """Whether a word begins with this label when text precedes it; a separator of its own (`|`, `▁`) begins one."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes vocabulary.json and whatever it names, so that `load_vocabulary(folder)` gives the same digest."""

    @cached_property
    def word_joint(self) -> WordJoint:
        """How a text's labels follow from its words' labels, found by trying; `none`: its pre-tokenizer crosses spaces."""
        samples = ("the cat sat", "don't you see it's a well known fact", "he is five years old i said so again and again")
        joints: list[WordJoint] = ["space", "dummy"]
        for joint in joints:
            if all(self._by_word(text, joint) == self.encode(text) for text in samples):
                return joint
        return "none"

    def _by_word(self, text: str, joint: WordJoint) -> list[int]:
        before = " " if joint == "space" else ""
        return [x for i, word in enumerate(text.split()) for x in self.encode((before if i else "") + word)]

    @cached_property
    def word_starts(self) -> tuple[bool, ...]:
        """`starts_word` of every label."""
        return tuple(self.starts_word(i) for i in range(self.size))

    @cached_property
    def label_texts(self) -> tuple[str, ...]:
        """What each label adds to a text that is there already: ` the`, `ing`, a space for a separator, nothing for special labels."""
        texts = (self.decode([i]) for i in range(self.size))
        return tuple(
            " " * (start or x != x.lstrip()) + x.strip().removeprefix(self.continued)
            for start, x in zip(self.word_starts, texts, strict=True)
        )

    def described(self) -> str:
        """Its kind and size, for people: `SentencePiece 256`."""
        return f"{self.kind} {self.size - (self.blank is not None)}"

    def encode_word(self, word: str, *, first: bool) -> list[int]:
        """Labels of one word inside a text (`first`: nothing precedes it), such that whole text == its words in a row.

        Raises VocabularyError where no such split exists (`word_joint == "none"`).
        """
        if self.word_joint == "none":
            raise VocabularyError(
                f"vocabulary {self.digest()}: the labels of a text are not those of its words in a row (its pre-tokenizer crosses "
                "spaces), so hypotheses cannot be converted word by word; rescore finished texts instead (when=AtEnd())"
            )
        key = word if first or self.word_joint == "dummy" else " " + word
        # A search asks for the same few words again and again, and tokenizers take a tenth of a millisecond each time.
        if key not in self._encoded:
            self._encoded[key] = self.encode(key)
        return self._encoded[key]

    @cached_property
    def _encoded(self) -> dict[str, list[int]]:
        return {}

    @cached_property
    def _digest(self) -> str:
        pieces = [self.piece(i) for i in range(self.size) if i != self.blank]
        return hashlib.sha256(json.dumps([pieces, self.bos, self.eos]).encode()).hexdigest()[:10]

    def digest(self) -> str:
        """Ten hexadecimal digits that are equal where label indices mean the same (blank aside)."""
        return self._digest

    def require_same(self, other: Vocabulary, *, here: str, there: str) -> None:
        """Raises VocabularyError unless both give the same meaning to the same indices; `here` and `there` name them for the reader."""
        if self.digest() != other.digest():
            raise VocabularyError(
                f"vocabulary {self.digest()} ({self.size} labels) of {here} != {other.digest()} ({other.size} labels) of {there}: "
                f"wrap {there} in Retokenized(...)"
            )


class SentencePieceVocabulary(Vocabulary):
    """A SentencePiece model, and optionally a blank behind its pieces (index size-1)."""

    kind = "SentencePiece"

    def __init__(self, model: bytes, *, blank: Literal["last", "none"]) -> None:
        import sentencepiece

        self.model = model
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        pieces = self.processor.get_piece_size()
        self.size = pieces + (blank == "last")
        self.blank = pieces if blank == "last" else None
        self.bos, self.eos = self.processor.bos_id(), self.processor.eos_id()
        if min(self.bos, self.eos) < 0:
            raise VocabularyError("the SentencePiece model has no <s> or no </s>: train it with bos_id and eos_id >= 0")

    def encode(self, text: str) -> list[int]:
        return self.processor.encode(text)

    def decode(self, labels: Sequence[int]) -> str:
        silent = (self.blank, self.processor.unk_id())  # an unknown label would be written as a question mark that nobody said
        return self.processor.decode([int(x) for x in labels if x not in silent]).strip()

    def piece(self, label: int) -> str:
        return "<blank>" if label == self.blank else self.processor.id_to_piece(int(label))

    def starts_word(self, label: int) -> bool:
        return self.piece(label).startswith("▁")

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "sentencepiece.model").write_bytes(self.model)
        _write(folder, {"type": "sentencepiece", "blank": "none" if self.blank is None else "last"})

    def without_blank(self) -> SentencePieceVocabulary:
        """The same pieces as a language model has them."""
        return SentencePieceVocabulary(self.model, blank="none")


class CharacterVocabulary(Vocabulary):
    """Single symbols in a fixed order, as wav2vec2-type CTC models have them; `delimiter` stands for the space."""

    kind = "characters"

    def __init__(
        self,
        symbols: Sequence[str],
        *,
        delimiter: str = "|",
        blank: str | None = "<pad>",
        bos: str = "<s>",
        eos: str = "</s>",
        unknown: str = "<unk>",
    ) -> None:
        index = {symbol: i for i, symbol in enumerate(symbols)}
        if len(index) != len(symbols):
            raise VocabularyError("a symbol stands twice in the character vocabulary")
        self.symbols, self.index, self.size, self.delimiter = tuple(symbols), index, len(symbols), delimiter
        missing = [x for x in (blank, delimiter) if x is not None and x not in index]
        if missing:
            raise VocabularyError(f"the character vocabulary lacks {missing}; it has {list(symbols)[:12]} ...")
        self.blank = None if blank is None else index[blank]
        # A CTC model without <s> never emits it: its histories and ends then borrow the index of blank, which is no text either.
        spare = self.blank if self.blank is not None else index.get(unknown, 0)
        self.bos, self.eos = index.get(bos, spare), index.get(eos, spare)
        self.names = {"blank": blank, "bos": bos, "eos": eos, "unknown": unknown}
        self._silent = {i for name in (blank, bos, eos, unknown) if name is not None and (i := index.get(name)) is not None}
        letters = {s for i, s in enumerate(symbols) if i not in self._silent and s.isalpha()}
        self._upper = bool(letters) and all(s == s.upper() for s in letters)

    def encode(self, text: str) -> list[int]:
        text = (text.upper() if self._upper else text).strip().replace(" ", self.delimiter)
        unknown = self.index.get(self.names["unknown"] or "")
        return [i for i in (self.index.get(c, unknown) for c in text) if i is not None]

    def encode_word(self, word: str, *, first: bool) -> list[int]:
        return ([] if first else [self.index[self.delimiter]]) + self.encode(word)

    def decode(self, labels: Sequence[int]) -> str:
        return "".join(self.symbols[x] for x in labels if x not in self._silent).replace(self.delimiter, " ").strip()

    def piece(self, label: int) -> str:
        return self.symbols[label]

    def starts_word(self, label: int) -> bool:
        return self.symbols[label] == self.delimiter

    def save(self, folder: Path) -> None:
        _write(folder, {"type": "characters", "symbols": list(self.symbols), "delimiter": self.delimiter, **self.names})


class TokenizerVocabulary(Vocabulary):
    """Any Hugging Face tokenizer.

    `bos` and `eos` are by the convention of the model it serves (a model without a bos starts from its end-of-text label). Labels beyond
    the tokenizer, which padded embedding matrices have, are not part of the vocabulary.
    """

    def __init__(self, tokenizer: Any, *, bos: int | None = None, eos: int | None = None, blank: int | None = None) -> None:
        self.tokenizer = tokenizer
        self.kind = type(getattr(getattr(tokenizer, "backend_tokenizer", None), "model", tokenizer)).__name__  # BPE, WordPiece, ...
        self._pieces = [str(p) for p in tokenizer.convert_ids_to_tokens(range(len(tokenizer)))]
        self.size = max(len(self._pieces), 1 + (blank if blank is not None else -1))
        self.blank = blank
        own_eos, own_bos = tokenizer.eos_token_id, tokenizer.bos_token_id
        ends = [x for x in (eos, own_eos, own_bos) if x is not None]
        if not ends:
            raise VocabularyError("the tokenizer has no end-of-text token; name one with eos=<index>")
        self.eos = ends[0]
        self.bos = next(x for x in (bos, own_bos, self.eos) if x is not None)
        self._special = set(tokenizer.all_special_ids) | {self.bos, self.eos} | ({blank} if blank is not None else set())
        starts = {p[:2] for p in self._pieces} | {p[:1] for p in self._pieces}
        # Byte-level tokenizers have "##", too: a heading, and no mark of a word that goes on.
        self.continued = "##" if "##" in starts and not starts & {"Ġ", "▁"} else ""

    @classmethod
    def load(cls, folder: str | Path, *, bos: int | None = None, eos: int | None = None, blank: int | None = None) -> TokenizerVocabulary:
        """The tokenizer of a hub id or a local folder."""
        from transformers import AutoTokenizer

        return cls(AutoTokenizer.from_pretrained(str(folder)), bos=bos, eos=eos, blank=blank)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def decode(self, labels: Sequence[int]) -> str:
        kept = [int(x) for x in labels if int(x) not in self._special]
        return self.tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def piece(self, label: int) -> str:
        return self._pieces[label] if label < len(self._pieces) else f"<{label}>"

    def starts_word(self, label: int) -> bool:
        if label in self._special:
            return False
        piece = self.piece(label)
        return not piece.startswith(self.continued) if self.continued else piece.startswith(("Ġ", "▁", "Ċ", " "))

    def save(self, folder: Path) -> None:
        self.tokenizer.save_pretrained(str(folder))
        _write(folder, {"type": "tokenizer", "bos": self.bos, "eos": self.eos, "blank": self.blank})


def with_blank(vocabulary: Vocabulary) -> Vocabulary:
    """The vocabulary as a CTC head has it: a blank behind its labels, whose meaning stays."""
    if vocabulary.blank is not None:
        return vocabulary
    if isinstance(vocabulary, SentencePieceVocabulary):
        return SentencePieceVocabulary(vocabulary.model, blank="last")
    if isinstance(vocabulary, TokenizerVocabulary):
        return TokenizerVocabulary(vocabulary.tokenizer, bos=vocabulary.bos, eos=vocabulary.eos, blank=vocabulary.size)
    raise VocabularyError(f"a {type(vocabulary).__name__} without blank cannot be given one: make it with a blank")


def load_vocabulary(folder: str | Path) -> Vocabulary:
    """The vocabulary that `Vocabulary.save` wrote into a model folder."""
    path = Path(folder) / VOCABULARY_FILE
    if not path.is_file():
        raise VocabularyError(
            f"{path} is missing: {folder} is not a model folder of duolect (hub models are named by id or by their own folder)"
        )
    fields = json.loads(path.read_text())
    kind = fields.pop("type", None)
    if kind == "sentencepiece":
        return SentencePieceVocabulary((Path(folder) / "sentencepiece.model").read_bytes(), blank=fields["blank"])
    if kind == "characters":
        return CharacterVocabulary(fields.pop("symbols"), **fields)
    if kind == "tokenizer":
        return TokenizerVocabulary.load(folder, **fields)
    raise VocabularyError(f"{path}: type {kind!r} is unknown; known: sentencepiece, characters, tokenizer")


def _write(folder: Path, fields: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / VOCABULARY_FILE).write_text(json.dumps(fields, indent=1, ensure_ascii=False) + "\n")
