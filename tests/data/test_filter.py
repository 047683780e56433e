from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from duolect.data.filter import DataError, usable
from duolect.data.sources import read_manifest
from duolect.data.utterance import Utterance
from duolect.vocabulary import CharacterVocabulary
from tests.conftest import byte_level, sentence_pieces

LETTERS = CharacterVocabulary(["<pad>", "</s>", "|", "'", *"abcdefghijklmnopqrstuvwxyz"], bos="</s>", unknown="<unk>")
UPPER = CharacterVocabulary(["<pad>", "</s>", "|", *"ABCDEFGHIJKLMNOPQRSTUVWXYZ"], bos="</s>", unknown="<unk>")


def flac(seconds: float) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, 0.1 * np.sin(np.arange(round(16000 * seconds))), 16000, format="FLAC")
    return file.getvalue()


CASES: dict[str, tuple[dict[str, Any], str]] = {
    "good": ({"text": "a good one"}, ""),
    "case": ({"text": " A  Good ONE "}, ""),
    "no text": ({}, "no text"),
    "blank text": ({"text": " "}, "no text"),
    "digits": ({"text": "route 66"}, "characters outside the vocabulary"),
    "umlaut": ({"text": "schön"}, "characters outside the vocabulary"),
    "long": ({"text": "a", "duration": 19.51}, "too long"),
    "short": ({"text": "a", "duration": 0.05}, "too short"),
    "dense": ({"text": "a" * 20, "duration": 1.5}, "fewer frames than labels"),
    "dense by repeats": ({"text": "abcdefghhi", "duration": 0.42}, "fewer frames than labels"),
    "just not dense": ({"text": "abcdefghih", "duration": 0.42}, ""),
    "missing": ({"text": "a", "audio_filepath": "none.flac"}, "corrupt"),
    "missing, length unknown": ({"text": "a", "audio_filepath": "none.flac", "duration": None}, "corrupt"),
    "empty": ({"text": "a", "audio_filepath": "empty.flac"}, "corrupt"),
    "no audio": ({"text": "a", "audio_filepath": "words.flac", "duration": None}, "corrupt"),
    "length unknown": ({"text": "a good one", "duration": None}, ""),
    "in a shard": ({"text": "a good one", "audio_filepath": "shard.tar", "audio_bytes": [100, len(flac(2.0))]}, ""),
    "in a shard, length unknown": (
        {"text": "a good one", "audio_filepath": "shard.tar", "audio_bytes": [100, len(flac(2.0))], "duration": None},
        "",
    ),
    "behind a shard": ({"text": "a", "audio_filepath": "shard.tar", "audio_bytes": [100, 10**6]}, "corrupt"),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Utterance]:
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "a.flac").write_bytes(flac(2.0))
    (folder / "shard.tar").write_bytes(b"x" * 100 + flac(2.0))
    (folder / "words.flac").write_text("no audio")
    (folder / "empty.flac").write_bytes(b"")
    lines = [{"audio_filepath": "a.flac", "duration": 2.0, "id": name, **line} for name, (line, _) in CASES.items()]
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {u.id: u for u in read_manifest(folder / "manifest.jsonl").utterances}


def test_each_reason(corpus: dict[str, Utterance], tmp_path: Path) -> None:
    listed = tmp_path / "new" / "skipped.jsonl"
    found = usable(corpus.values(), LETTERS, seconds_per_frame=0.04, max_share_lost=0.9, skipped=listed)
    reasons = {x.id: x.reason for x in found.skipped}
    assert {id: reasons.get(id, "") for id in CASES} == {id: reason for id, (_, reason) in CASES.items()}
    assert [x.utterance.id for x in found.items] == [id for id in CASES if id not in reasons]
    for item in found.items:
        text = " ".join((item.utterance.text or "").lower().split())
        assert LETTERS.decode(item.labels) == text and item.utterance.seconds == item.seconds > 0
    lines = [json.loads(line) for line in listed.read_text().splitlines()]
    assert [line["id"] for line in lines] == list(reasons) and {*lines[0]} == {"id", "audio_filepath", "reason", "cause"}
    causes = {x.id: x.cause for x in found.skipped}
    assert causes["digits"] == "'6' cannot be written in labels" and causes["long"] == "19.51 s, more than 19.5"
    assert causes["dense by repeats"] == "0.42 s are 10 frames for 10 labels with 1 repeats"


def test_too_much_lost_is_one_line(corpus: dict[str, Utterance], tmp_path: Path) -> None:
    listed = tmp_path / "skipped.jsonl"
    with pytest.raises(DataError) as caught:
        usable(corpus.values(), LETTERS, seconds_per_frame=0.04, skipped=listed)
    message = str(caught.value)
    assert "\n" not in message and message.startswith("13 of 19 utterances cannot be used (corrupt: 5, no text: 2, characters outside")
    assert "more than 20% is not accepted: mend the data, choose units and limits for it, or accept a larger share (max" in message
    assert message.endswith(f"; {listed} lists them")
    assert len(listed.read_text().splitlines()) == 13
    with pytest.raises(DataError, match=r"^1 of 1 .* that is all of them"):
        usable([corpus["long"]], LETTERS, seconds_per_frame=0.04, max_share_lost=1.0)
    assert usable([], LETTERS, seconds_per_frame=0.04).items == ()


def test_vocabularies(corpus: dict[str, Utterance]) -> None:
    pieces = sentence_pieces(["a good one", "one a good", "go on don a"], size=18)
    for text, vocabulary, case, kept in [
        ("a good one", pieces, "lower", True),
        ("a ｇood one", pieces, "lower", True),  # a compatibility form, which SentencePiece unifies
        ("A good one", pieces, "keep", False),
        ("a bad one", pieces, "lower", False),
        ("a good one", UPPER, "keep", True),
        ("it's", UPPER, "lower", False),
        ("Naïve 66 €", byte_level(["a good one"]), "keep", True),
        ("IT IS", UPPER, "upper", True),
    ]:
        found = usable(
            [replace(corpus["good"], text=text), corpus["good"]], vocabulary, seconds_per_frame=0.01, case=case, max_share_lost=0.5
        )
        assert (len(found.items) == 2) is kept, text


@given(st.lists(st.sampled_from("ab"), min_size=1, max_size=12).map("".join), st.integers(1, 30))
@settings(deadline=None)
def test_kept_if_and_only_if_an_alignment_exists(text: str, frames: int) -> None:
    import torch

    utterance = Utterance("x", Path(__file__), frames * 0.04 + 0.001, text, {"id": "x"})
    kept = len(
        usable(
            [utterance, replace(utterance, text="a", seconds=9.0)], LETTERS, seconds_per_frame=0.04, min_seconds=0, max_share_lost=0.5
        ).items
    )
    scores = torch.zeros(frames, 1, LETTERS.size).log_softmax(-1)
    labels = torch.tensor([LETTERS.encode(text)])
    loss = torch.nn.functional.ctc_loss(scores, labels, torch.tensor([frames]), torch.tensor([len(text)]), blank=0, reduction="sum")
    assert (kept == 2) is bool(loss.isfinite())
