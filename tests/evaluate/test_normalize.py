from __future__ import annotations

import random
import re
import subprocess
import sys

import pytest

from duolect.evaluate.normalize import normalizer


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("none", "  The  Cat,\tsat\n", "The Cat, sat"),
        ("none", "", ""),
        ("basic", "“Don’t!” he said — twenty-two times... It's 'fine'", "don't he said twenty-two times it's fine"),
        ("basic", "rock 'n' roll -- x-", "rock n roll x"),
        ("basic", "Ärger mit Straße, naïve café", "ärger mit straße naïve café"),
        ("basic", "e\u0301tude", "étude"),
        ("basic", "?!", ""),
        ("whisper-english", "Mr. Smith's colour, um, [noise] isn't twenty dollars", "mister smith is color is not $20"),
        ("whisper-english", "WON'T you?  (laughs)", "will not you"),
        ("whisper-english", "three hundred and five percent", "305%"),
        ("whisper-english", "[noise]", ""),
    ],
)
def test_texts(name, text, expected):
    assert normalizer(name)(text) == expected


@pytest.mark.parametrize("name", ["none", "basic"])
def test_normalizing_twice_changes_nothing(name):
    text = "‘Tis -- the “rock-'n'-roll” café's OWN  way’s end-"
    once = normalizer(name)(text)
    assert normalizer(name)(once) == once


def test_phrase_by_phrase_is_as_the_whole():
    from whisper_normalizer.english import EnglishTextNormalizer

    whole, ours, draw = EnglishTextNormalizer(), normalizer("whisper-english"), random.Random(0)
    contracted = [re.sub(r"\\b", "", pattern) for pattern in whole.replacers]
    more = (
        "it's he'd don't we've o'clock boys' 'tis been gone done got half a and uh um mm colour the cat one's nine's £3 5 3rd naïve (x) s"
    )
    words = [*sorted(whole.standardize_numbers.words), *contracted, *more.split()]
    letters = [word for word in words if re.fullmatch("[a-z]+('[a-z]+)?", word)]
    for i in range(8000):
        text = " ".join(draw.choices(letters if i % 3 else words, k=draw.randint(0, 9)))
        try:
            expected = " ".join(whole(text).split())
        except (AttributeError, TypeError, ValueError, AssertionError) as error:  # it has bugs of its own
            with pytest.raises(type(error)):
                ours(text)
        else:
            assert ours(text) == expected, text


def test_a_normalizer_names_itself_and_its_version():
    from importlib.metadata import version

    assert str(normalizer("whisper-english")) == f"whisper-english@{version('whisper-normalizer')}"
    assert str(normalizer("none")) == "none@1"
    assert normalizer("none") is normalizer("none")


def test_unknown_name():
    with pytest.raises(ValueError, match=r"'whisper' is unknown; known: none, basic, whisper-english"):
        normalizer("whisper")  # type: ignore[arg-type]


def test_evaluation_needs_no_torch_and_no_transformers():
    modules = ("normalize", "bootstrap", "wer", "nbest", "surface", "tune", "table")
    heavy = ("torch", "transformers", "whisper_normalizer", "scipy")
    imports = ", ".join(f"duolect.evaluate.{m}" for m in modules)
    code = f"import sys, duolect.config, duolect.run, {imports}\nsys.exit([m for m in {heavy} if m in sys.modules] or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
