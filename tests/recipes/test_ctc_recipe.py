"""The recipes of the embedded models, tiny: from a Whisper folder, audio and text to folders that load; what they choose from the data."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from duolect.audio.augment import random_for
from duolect.models.ctc import CtcModel, load_acoustic_model
from duolect.models.encoders import WhisperEncoder
from duolect.recipes.embedded import EmbeddedCtc, Item, batched, blended, embedded_ctc, hold_out, items, train_pieces
from duolect.recipes.unit_lm import UnitLm, unit_lm
from duolect.train.loop import TrainConfig
from duolect.vocabulary import SentencePieceVocabulary, load_vocabulary
from tests.models.test_encoders import tiny_whisper

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "looked", "at", "every", "bird", "that", "came", "by", "while", "it", "rained"]
TEXTS = [" ".join(WORDS[i % 7 : i % 7 + 2 + i % 5]) for i in range(24)]
PIECES = 28
QUICK = TrainConfig(steps=4, learning_rates={"head": 1e-3, "encoder": 1e-4, "model": 1e-3}, log_every=2, validate_every=4, save_every=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    lines = []
    for i, text in enumerate(TEXTS):
        samples = np.random.default_rng(i).standard_normal(16000 + 800 * i).astype(np.float32) * 0.1
        soundfile.write(folder / f"{i}.wav", samples, 16000)
        lines.append({"id": str(i), "audio_filepath": f"{i}.wav", "duration": len(samples) / 16000, "text": text, "speaker": f"s{i // 2}"})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "text.txt").write_text("".join(f"{text}\n" for text in TEXTS * 4))
    tiny_whisper(folder / "whisper", mels=80, positions=200)
    return folder


def test_from_nothing_to_two_models_in_the_same_units(data: Path, tmp_path: Path) -> None:
    recipe = EmbeddedCtc(
        whisper=str(data / "whisper"),
        merge_after=1,
        frozen_layers=1,
        batch_seconds=6.0,
        held_out=4,
        pieces=PIECES,
        probe_steps=2,
        probe_seconds=5.0,
        train=replace(QUICK, average=0.9),
    )
    manifest = data / "manifest.jsonl"
    figures = embedded_ctc(recipe, real=manifest, synth=manifest, text=data / "text.txt", dev=manifest, out=tmp_path / "ctc", card="# tiny")
    assert figures.keys() == {"held-out WER", "dev WER"}
    am = load_acoustic_model(tmp_path / "ctc" / "model")
    assert isinstance(am, CtcModel) and am.vocabulary.size == PIECES + 1 and am.vocabulary.blank == PIECES
    frozen = CtcModel.load(tmp_path / "ctc" / "model").state_dict()["encoder.layers.0.fc1.weight"]
    whisper = tiny_whisper(tmp_path / "w", mels=80, positions=200)
    torch.testing.assert_close(frozen, whisper.model.encoder.layers[0].fc1.weight, atol=1e-3, rtol=0)
    assert "step 4" in (tmp_path / "ctc" / "model" / "README.md").read_text()
    lm = unit_lm(
        UnitLm(dim=16, layers=1, heads=1, feed_forward=16, train=QUICK),
        units=tmp_path / "ctc" / "model",
        text=data / "text.txt",
        heldout=data / "text.txt",
        out=tmp_path / "lm",
    )
    assert lm["word PPL"] > lm["unit PPL"] > 1
    assert load_vocabulary(tmp_path / "lm" / "model").digest() == am.vocabulary.digest()
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "lm" / "model", output_loading_info=True)
    assert model.config.vocab_size == PIECES and not report["missing_keys"]


def test_blending_is_the_mean_and_a_share_of_whisper(data: Path, tmp_path: Path) -> None:
    vocabulary = train_pieces(data / "text.txt", pieces=PIECES)
    models = []
    for i in range(2):
        torch.manual_seed(i)
        models.append(CtcModel(WhisperEncoder.from_whisper(data / "whisper", merge_after=1), vocabulary))
        torch.nn.init.normal_(models[i].encoder.get_parameter("layers.2.fc1.weight"))
        models[i].save(tmp_path / str(i), card="", dtype=torch.float32)
    got = blended([tmp_path / "0", tmp_path / "1"], whisper=str(data / "whisper"), share=0.75).state_dict()
    one, two = (model.state_dict() for model in models)
    own = WhisperEncoder.from_whisper(data / "whisper").state_dict()["layers.2.fc1.weight"]
    name = "encoder.layers.2.fc1.weight"
    torch.testing.assert_close(got[name], 0.75 * (one[name] + two[name]) / 2 + 0.25 * own)
    torch.testing.assert_close(got["head.weight"], (one["head.weight"] + two["head.weight"]) / 2)
    CtcModel(WhisperEncoder.from_whisper(data / "whisper"), vocabulary).save(tmp_path / "2", card="")
    with pytest.raises(ValueError, match="of different shapes"):
        blended([tmp_path / "0", tmp_path / "2"], whisper=str(data / "whisper"), share=0.75)


def test_pieces_have_the_agreed_indices(data: Path) -> None:
    vocabulary = train_pieces(data / "text.txt", pieces=PIECES)
    assert isinstance(vocabulary, SentencePieceVocabulary)
    assert (vocabulary.eos, vocabulary.bos, vocabulary.blank, vocabulary.size) == (0, 1, PIECES, PIECES + 1)
    assert vocabulary.decode(vocabulary.encode("the cat sat")) == "the cat sat"
    assert vocabulary.digest() == train_pieces(data / "text.txt", pieces=PIECES).digest()


def test_items_leave_out_what_the_vocabulary_or_the_frames_cannot_hold(data: Path, tmp_path: Path) -> None:
    vocabulary = train_pieces(data / "text.txt", pieces=PIECES)
    texts = {"good": "the cat", "digits": "cat 9", "empty": " ", "upper": "The Cat", "dense": "the cat sat on a mat " * 9, "long": "cat"}
    with open(tmp_path / "m.jsonl", "w") as file:
        for name, text in texts.items():
            line = {"id": name, "audio_filepath": str(data / "0.wav"), "duration": 99.0 if name == "long" else 1.0, "text": text}
            file.write(json.dumps(line) + "\n")
    assert [x.utterance.id for x in items(tmp_path / "m.jsonl", vocabulary, real=True)] == ["good", "upper"]


def test_held_out_speakers_are_not_trained_on(data: Path) -> None:
    found = items(data / "manifest.jsonl", train_pieces(data / "text.txt", pieces=PIECES), real=True)
    training, held = hold_out(found, 4)
    assert len(held) == 4 and len(training) == len(found) - 4
    assert not {x.utterance.fields["speaker"] for x in held} & {x.utterance.fields["speaker"] for x in training}


def test_batches_hold_all_once_within_their_room(data: Path) -> None:
    found: list[Item] = items(data / "manifest.jsonl", train_pieces(data / "text.txt", pieces=PIECES), real=True)
    batches = batched(found, 6.0, random_for(0, 0, "a"))
    assert sorted(x.utterance.id for b in batches for x in b) == sorted(x.utterance.id for x in found)
    assert all(max(x.seconds for x in b) * len(b) <= 6.0 for b in batches if len(b) > 1)
    assert batched(found, 6.0, random_for(0, 0, "a")) == batches != batched(found, 6.0, random_for(0, 1, "a"))
