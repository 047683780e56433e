"""Recipes: what they resolve to, and tiny runs of each kind of model from audio and text to a folder that loads."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from duolect.audio.augment import Augmentation, SpecAugment
from duolect.config import digest, from_json, to_json, with_overrides
from duolect.data.filter import DataError, Labelled, usable
from duolect.data.pieces import train_pieces
from duolect.data.sources import open_source
from duolect.models.aed import AedModel
from duolect.models.attention_decoder import DecoderDims
from duolect.models.conformer import ConformerDims, ConformerEncoder
from duolect.models.ctc import CtcModel, load_acoustic_model
from duolect.models.extended import ExtendedEncoder, TopDims
from duolect.recipes.asr import RECIPES, AsrExperiment, FromWhisper, Units, run
from duolect.recipes.unit_lm import UnitLm, unit_lm
from duolect.run import RunError
from duolect.train.asr import AsrTask, Corpus, Learning
from duolect.train.checkpoint import TrainError
from duolect.train.loop import TrainConfig
from duolect.train.optim import WarmUp
from duolect.train.parallel import World
from duolect.vocabulary import SentencePieceVocabulary, load_vocabulary
from tests.models.test_encoders import tiny_whisper

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "looked", "at", "every", "bird", "that", "came", "by", "while", "it", "rained"]
TEXTS = [" ".join(WORDS[i % 7 : i % 7 + 2 + i % 5]) for i in range(24)]
PIECES = 28
RATES = {"top": 1e-3, "encoder": 1e-4, "decoder": 1e-3}
QUICK = TrainConfig(RATES, steps=6, schedule=WarmUp(2), log_every=2, validate_every=3, save_every=2, keep_best=2)
DIMS = ConformerDims.of(layers=2, dim=32, kernel=5, channels=(4, 4, 4), subsampling=4)
SPEC = SpecAugment(ramp=(0, 0, 0))
GOLDEN = {
    "tiny": "b636bbeab2",
    "mini": "e4b1408475",
    "whisper_top": "21564d79a2",
    "whisper_ctc": "bd434ed780",
    "librispeech_aed": "74c1807ce1",
    "librispeech_aed_base": "9857986a56",
    "loquacious_aed": "042a6d5830",
    "continued": "9bd57698ca",
}
"""Digests of the resolved experiments: a recipe changes on purpose only, and then this line and docs/RESULTS.md change with it."""


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


def experiment(data: Path, **changes: object) -> AsrExperiment:
    plain = AsrExperiment(
        "test",
        (Corpus(str(data), augment=Augmentation(noise_chance=0.5, spec=SPEC)), Corpus(str(data), 3, Augmentation(spec=SPEC))),
        QUICK,
        DIMS,
        {"dev": str(data)},
        Units(PIECES, str(data / "text.txt")),
        learning=Learning(batch_seconds=8.0, decoder_check=3),
        held_out=4,
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def contents(folder: Path) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.rglob("*.safetensors")))).hexdigest()


@pytest.mark.parametrize("name", GOLDEN)
def test_recipes_resolve_to_what_they_did(name: str) -> None:
    made = RECIPES[name](["real/manifest.jsonl", "synth"], ["dev"], "text.txt")
    assert from_json(to_json(made)) == made and made.recipe == name
    assert digest(replace(made, training=replace(made.training, precision="fp32"))) == GOLDEN[name]
    assert with_overrides(made, {"training.epochs": "20"}).training.epochs == 20


def test_a_ctc_model_from_audio_and_text(data: Path, tmp_path: Path) -> None:
    figures = run(experiment(data, heads=(1,)), tmp_path, world=World())
    assert figures.keys() == {f"{name} {figure}" for name in ("dev", "held-out") for figure in ("WER", "ctc", "ctc1")}
    model = load_acoustic_model(tmp_path / "model")
    assert isinstance(model, CtcModel) and model.vocabulary.size == PIECES + 1 and set(model.aux_vocabularies) == {1}
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {"ctc", "ctc1"} == lines[0]["loss"].keys()


def test_an_aed_goes_on_to_the_bit_after_a_stop(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    aed = experiment(data, decoder=DecoderDims.of(layers=2, dim=32), heads=(1,))
    expected = run(aed, tmp_path / "straight", world=World())
    assert {"dev AED WER", "dev ce", "dev ce1", "dev ctc"} <= expected.keys()
    losses, calls = AsrTask.losses, []

    def stopping(self: AsrTask, batch: object) -> object:
        calls.append(batch)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return losses(self, batch)  # type: ignore[arg-type]

    monkeypatch.setattr(AsrTask, "losses", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(aed, tmp_path / "resumed", world=World())
    monkeypatch.setattr(AsrTask, "losses", losses)
    assert run(aed, tmp_path / "resumed", world=World()) == expected
    assert contents(tmp_path / "straight" / "model") == contents(tmp_path / "resumed" / "model")
    assert isinstance(AedModel.load(tmp_path / "resumed" / "model"), AedModel)
    with pytest.raises(RunError, match=r"training\.steps: 6 -> 7"):
        run(replace(aed, training=replace(aed.training, steps=7)), tmp_path / "resumed", world=World())


def test_layers_on_a_resting_whisper_then_all(data: Path, tmp_path: Path) -> None:
    top, whisper = TopDims(dim=32, layers=1, kernel=3), str(data / "whisper")
    first = experiment(
        data,
        encoder=FromWhisper(whisper, 1, 9, top),
        learning=Learning(batch_seconds=8.0, kept_versions=2),
        training=replace(QUICK, average=0.9),
    )
    run(first, tmp_path / "top", world=World())
    model = CtcModel.load(tmp_path / "top" / "model")
    assert isinstance(model.encoder, ExtendedEncoder)
    own = tiny_whisper(tmp_path / "w", mels=80, positions=200).model.encoder
    torch.testing.assert_close(model.encoder.base.layers[1].fc1.weight, own.layers[1].fc1.weight, atol=1e-3, rtol=0)
    second = experiment(data, encoder=FromWhisper(whisper, 1, 1, top), start=str(tmp_path / "top" / "model"))
    run(second, tmp_path / "all", world=World())
    tuned = CtcModel.load(tmp_path / "all" / "model")
    assert isinstance(tuned.encoder, ExtendedEncoder)
    assert torch.equal(tuned.encoder.base.layers[0].fc1.weight, model.encoder.base.layers[0].fc1.weight)
    assert not torch.equal(tuned.encoder.base.layers[1].fc1.weight, model.encoder.base.layers[1].fc1.weight)


def test_kept_frames_are_those_of_the_whole_model(data: Path, tmp_path: Path) -> None:
    """The loss on frames kept by `load` is the loss on the audio, for the same augmentation."""
    from duolect.models.encoders import WhisperEncoder
    from duolect.train.task import Place

    vocabulary = SentencePieceVocabulary((_units(data, tmp_path)).model, blank="last")
    torch.manual_seed(0)
    encoder = ExtendedEncoder(WhisperEncoder.from_whisper(data / "whisper", merge_after=1), TopDims(dim=32, layers=1, kernel=3))
    model = CtcModel(encoder, vocabulary).eval()
    for wrong in (model, CtcModel(ConformerEncoder(DIMS), vocabulary)):  # the encoder learns; there is nothing on top
        with pytest.raises(TrainError, match="layers on top of one that rests"):
            AsrTask(wrong, Learning(kept_versions=1), [], {}, seed=0)
    encoder.base.requires_grad_(False)

    items = usable(open_source(data).utterances, vocabulary, seconds_per_frame=0.04).items
    corpus = Corpus("x", augment=Augmentation(noise_chance=1.0, spec=None))
    found = []
    for versions in (0, 1):
        task = AsrTask(model, Learning(batch_seconds=8.0, kept_versions=versions), [(corpus, items)], {}, seed=0)
        micro = task.plan(0, 1)[0][0]
        for _ in range(2):  # computed, then kept
            batch = task.load(micro, Place())
            assert batch is not None and batch.kept == bool(versions)
            found.append(float(task.losses(batch)["ctc"].detach()))
    assert found == pytest.approx([found[0]] * 4, rel=1e-3)


def test_segmentations_are_drawn_anew_each_epoch(data: Path, tmp_path: Path) -> None:
    from duolect.train.task import Place

    vocabulary = _units(data, tmp_path)
    items = usable(open_source(data).utterances, vocabulary, seconds_per_frame=0.04).items
    model, corpus = CtcModel(ConformerEncoder(DIMS), vocabulary), Corpus("x", augment=Augmentation((1.0,), 0.0, spec=None))
    seen = []
    for sampling in (None, 0.1):
        task = AsrTask(model, Learning(batch_seconds=100.0, sampling=sampling), [(corpus, items)], {}, seed=0)
        micro = task.plan(0, 1)[0][0]
        batches = [task.load(micro, Place(epoch=epoch)) for epoch in (0, 0, 1)]
        labels = [[x[:n].tolist() for x, n in zip(b.labels["ctc"], b.label_sizes["ctc"].tolist(), strict=True)] for b in batches if b]
        assert labels[0] == labels[1]
        assert [[vocabulary.decode(x) for x in part] for part in labels] == [[x.item.utterance.text for x in micro]] * 3
        seen.append(labels[0] == labels[2])
    assert seen == [True, False]


def _units(data: Path, tmp_path: Path) -> SentencePieceVocabulary:
    return train_pieces(data / "text.txt", pieces=PIECES)


def test_a_unit_lm(data: Path, tmp_path: Path) -> None:
    units = tmp_path / "units"
    units.mkdir()
    _units(data, tmp_path).save(units)
    text = data / "text.txt"
    lm = unit_lm(
        UnitLm(dim=16, layers=1, heads=1, feed_forward=16, train=replace(QUICK, learning_rates={"model": 1e-3})),
        units=units,
        text=text,
        heldout=text,
        out=tmp_path / "lm",
    )
    assert lm.keys() == {"unit PPL", "word PPL"} and 1 < lm["unit PPL"] < 2 * PIECES
    assert load_vocabulary(tmp_path / "lm" / "model").size == PIECES


def test_equal_ids_of_two_corpora_are_two_recordings(data: Path, tmp_path: Path) -> None:
    """Decoded audio is kept by place, not by id: a validation set with the training ids is heard as it is."""
    lines = [json.loads(line) for line in (data / "manifest.jsonl").read_text().splitlines()]
    other = tmp_path / "other"
    other.mkdir()
    for line in lines:
        audio, rate = soundfile.read(data / line["audio_filepath"])
        soundfile.write(other / line["audio_filepath"], -audio[::-1], rate)
    (other / "manifest.jsonl").write_text((data / "manifest.jsonl").read_text())
    one, two = ([x for x in open_source(folder).utterances] for folder in (data, other))
    vocabulary = _units(data, tmp_path)
    task = AsrTask(CtcModel(ConformerEncoder(DIMS), vocabulary), Learning(), [(Corpus("x"), [Labelled(x, (1,)) for x in one])], {}, seed=0)
    assert not np.array_equal(task._sound(one[3]), task._sound(two[3])) and np.array_equal(task._sound(one[3]), task._sound(one[3]))


def test_what_cannot_be_read_is_left_out_and_too_much_of_it_stops(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.loads(line) for line in (data / "manifest.jsonl").read_text().splitlines()]
    for i, line in enumerate(lines):
        line["audio_filepath"] = str(data / line["audio_filepath"])
        (tmp_path / f"{i}.wav").write_bytes(b"RIFFnothing of use" * 10)
    manifests = {}
    for name, bad in (("one", 1), ("all", 24)):
        manifests[name] = tmp_path / f"{name}.jsonl"
        rest = [{**line, "audio_filepath": f"{i}.wav"} if i < bad else line for i, line in enumerate(lines)]
        manifests[name].write_text("".join(json.dumps(line) + "\n" for line in rest))
    run(experiment(data, checks={"dev": str(manifests["one"])}, held_out=0), tmp_path / "run", world=World())
    assert capsys.readouterr().err.count("left out: 0: ") == 1
    with pytest.raises(TrainError, match=r"6 of 24 utterances cannot be read, such as "):
        run(experiment(data, corpora=(Corpus(str(manifests["all"])),), held_out=0), tmp_path / "bad", world=World())
    # A run that never saved anything gives its folder to the corrected command.
    run(experiment(data, held_out=0), tmp_path / "bad", world=World())


def test_unusable_speech_stops_with_counts(data: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (data / "manifest.jsonl").read_text().splitlines()]
    for line in lines[:12]:
        line["text"] = "ünwriteable"
    for line in lines:
        line["audio_filepath"] = str(data / line["audio_filepath"])
    bad = tmp_path / "bad.jsonl"
    bad.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError, match=r"12 of 24 utterances cannot be used \(characters outside the vocabulary: 12\)"):
        run(experiment(data, corpora=(Corpus(str(bad)),)), tmp_path / "run", world=World())
    assert len((tmp_path / "run" / "skipped-0.jsonl").read_text().splitlines()) == 12
