"""Recipes: what they resolve to, and tiny runs of each kind of model from audio and text to a folder that loads."""

from __future__ import annotations

import copy
import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file

from duolect.audio.augment import Augmentation, SpecAugment
from duolect.config import digest, from_json, to_json, with_overrides
from duolect.data.filter import DataError, Labelled, usable
from duolect.data.pieces import train_pieces
from duolect.data.sources import open_source
from duolect.data.utterance import load_audio
from duolect.models.adapters import AdapterDims
from duolect.models.aed import AedModel, load_attention_model
from duolect.models.attention_decoder import DecoderDims
from duolect.models.conformer import ConformerDims, ConformerEncoder
from duolect.models.ctc import CtcModel, load_acoustic_model
from duolect.models.encoders import WhisperEncoder
from duolect.models.extended import ExtendedEncoder, TopDims
from duolect.models.lm import load_language_model
from duolect.models.lora import Lora
from duolect.models.speech_llm import SpeechLlm, SpeechLlmDims, Trainable
from duolect.models.spotter import SpottingEncoder
from duolect.recipes.asr import RECIPES
from duolect.recipes.experiment import AsrExperiment, FromModel, FromWhisper, LlmPart, Units, _held_out, run
from duolect.run import RunError
from duolect.train.asr import AsrTask, Corpus, Learning
from duolect.train.checkpoint import TrainError
from duolect.train.loop import TrainConfig
from duolect.train.optim import WarmUp
from duolect.train.parallel import World
from duolect.train.task import Place
from duolect.vocabulary import CharacterVocabulary, SentencePieceVocabulary
from tests.models.test_encoders import tiny_whisper
from tests.models.test_speech_llm import tokenizer, write_llm
from tests.models.test_spotter import whisper_with_tokenizer

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "looked", "at", "every", "bird", "that", "came", "by", "while", "it", "rained"]
TEXTS = [" ".join(WORDS[i % 7 : i % 7 + 2 + i % 5]) for i in range(24)]
PIECES = 28
RATES = {"top": 1e-3, "encoder": 1e-4, "decoder": 1e-3}
QUICK = TrainConfig(RATES, steps=6, schedule=WarmUp(2), log_every=2, validate_every=3, save_every=2, keep_best=2)
DIMS = ConformerDims.of(layers=2, dim=32, kernel=5, channels=(4, 4, 4), subsampling=4)
SPEC = SpecAugment(ramp=(0, 0, 0))
GOLDEN = {
    "tiny": "5c471cdabf",
    "mini": "a8fa1db855",
    "whisper_ctc": "26ba451e69",
    "librispeech_aed": "7c5ae27b25",
    "librispeech_aed_base": "6d387805f0",
    "loquacious_aed": "78713908a1",
    "continued": "ca59505b7c",
    "speech_llm": "56c01f45dd",
    "loquacious_speech_llm": "33c7b86dc9",
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
    assert digest(made) == GOLDEN[name]
    assert with_overrides(made, {"training.epochs": "20"}).training.epochs == 20


def test_a_ctc_model_from_audio_and_text(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = run(experiment(data, heads=(1,), held_out=40), tmp_path, world=World())
    assert f"{data}: 22 utterances, 0.01 h, 2 more held out" in capsys.readouterr().err, "a tenth of a tiny corpus at most"
    assert figures.keys() == {f"{name} {figure}" for name in ("dev", "held-out") for figure in ("WER", "ctc", "ctc1")}
    model = load_acoustic_model(tmp_path / "model")
    assert isinstance(model, CtcModel) and model.vocabulary.size == PIECES + 1 and set(model.aux_vocabularies) == {1}
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {"ctc", "ctc1"} == lines[0]["loss"].keys()


def straight_and_resumed(made: AsrExperiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mapping[str, float]:
    """The figures of a run, which one that was stopped and taken up again repeats to the bit; in tmp_path/straight and tmp_path/resumed."""
    expected = run(made, tmp_path / "straight", world=World())
    losses, calls = AsrTask.losses, []

    def stopping(self: AsrTask, batch: object) -> object:
        calls.append(batch)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return losses(self, batch)  # type: ignore[arg-type]

    monkeypatch.setattr(AsrTask, "losses", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(made, tmp_path / "resumed", world=World())
    monkeypatch.setattr(AsrTask, "losses", losses)
    assert run(made, tmp_path / "resumed", world=World()) == expected
    assert contents(tmp_path / "straight" / "model") == contents(tmp_path / "resumed" / "model")
    return expected


def test_an_aed_goes_on_to_the_bit_after_a_stop(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    aed = experiment(data, decoder=DecoderDims.of(layers=2, dim=32), heads=(1,))
    figures = straight_and_resumed(aed, tmp_path, monkeypatch)
    assert {"dev decoder WER", "dev runaway", "dev ce", "dev ce1", "dev ctc"} <= figures.keys()
    assert isinstance(AedModel.load(tmp_path / "resumed" / "model"), AedModel)
    with pytest.raises(RunError, match=r"training\.steps: 6 -> 7"):
        run(replace(aed, training=replace(aed.training, steps=7)), tmp_path / "resumed", world=World())


def test_continued_goes_on_with_the_whole_model_as_it_is(data: Path, parts: dict[str, Path], tmp_path: Path) -> None:
    source = AedModel(CtcModel.load(parts["ctc"]), DecoderDims.of(layers=1, dim=16))
    source.save(tmp_path / "aed", card="", dtype=torch.float32)
    made = RECIPES["continued"]([str(data)], [], "")
    with pytest.raises(TrainError, match="continued goes on with a trained model: name it, --set start="):
        run(made, tmp_path / "none", world=World())
    assert not (tmp_path / "none").exists()
    assert all(p.requires_grad for p in AedModel.load(tmp_path / "aed").parameters()), "and all of it learns"
    still = replace(QUICK, learning_rates=dict.fromkeys(RATES, 0.0), steps=1, weight_decay=0.0)
    run(replace(made, training=still, start=str(tmp_path / "aed"), max_share_lost=0.9), tmp_path / "run", world=World())
    found = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert found.keys() == source.weights().keys()
    assert all(torch.allclose(x.float(), found[name].float(), atol=1e-3) for name, x in source.weights().items() if "running" not in name)


@pytest.fixture(scope="module")
def parts(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a tiny CTC model in the units of the texts, and of a tiny language model with its tokenizer."""
    root = tmp_path_factory.mktemp("parts")
    torch.manual_seed(1)
    vocabulary = SentencePieceVocabulary(_units(data, root).model, blank="last")
    CtcModel(ConformerEncoder(DIMS), vocabulary).save(root / "ctc", card="", dtype=torch.float32)
    write_llm("llama", root / "llm", tokenizer())
    return {name: root / name for name in ("ctc", "llm")}


def speech_llm(data: Path, parts: Mapping[str, Path], *, heads: tuple[int, ...] = (), **dims: object) -> AsrExperiment:
    """A speech LLM on the tiny CTC model; the dims differ from the defaults in `dims`."""
    fields = {"adapter": AdapterDims("words"), "begin": "\n", "lora": Lora(2, 2.0), **dims}
    return experiment(
        data,
        encoder=FromModel(str(parts["ctc"])),
        llm=LlmPart(str(parts["llm"]), SpeechLlmDims(**fields), heads),  # type: ignore[arg-type]
        training=replace(QUICK, learning_rates={"top": 1e-3, "encoder": 1e-3, "adapter": 1e-3, "llm": 1e-3}),
    )


def test_a_speech_llm_on_kept_frames_goes_on_to_the_bit_and_holds_what_learned(
    data: Path, parts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = replace(speech_llm(data, parts, encoder="rest"), learning=Learning(batch_seconds=8.0, decoder_check=3, kept_versions=2))
    figures = straight_and_resumed(made, tmp_path, monkeypatch)
    assert figures.keys() == {
        "dev WER",
        "dev ce",
        "held-out WER",
        "held-out ce",
        *(f"dev {x}" for x in ("decoder WER", "runaway", "attention on audio")),
    }
    folder = tmp_path / "straight" / "model"
    stored = load_file(folder / "model.safetensors")
    assert {name for name in stored if not name.startswith("adapter.")} == {
        f"llm.model.layers.{i}.self_attn.{target}.{part}" for i in (0, 1) for target in ("q_proj", "v_proj") for part in ("up", "down")
    }
    assert all(bool(x.any()) for name, x in stored.items() if name.endswith(".up")), "something was learned"
    model, source = load_attention_model(folder), CtcModel.load(parts["ctc"])
    assert isinstance(model, SpeechLlm) and model.vocabulary.digest() == tokenizer().digest()
    assert all(torch.equal(x, source.state_dict()[name]) for name, x in model.ctc.state_dict().items())
    still = replace(made.training, learning_rates=dict.fromkeys(made.training.learning_rates, 0.0), steps=1, weight_decay=0.0)
    run(replace(made, training=still, start=str(folder)), tmp_path / "still", world=World())
    again = load_file(tmp_path / "still" / "model" / "model.safetensors")
    assert again.keys() == stored.keys() and all(torch.equal(again[name], x) for name, x in stored.items()), "begun with all of it"


@pytest.mark.parametrize("adapter", [AdapterDims("words"), AdapterDims("concat")])
def test_a_speech_llm_hears_a_spotter(data: Path, parts: dict[str, Path], tmp_path: Path, adapter: AdapterDims) -> None:
    whisper_with_tokenizer(tmp_path / "whisper", mels=80, positions=200)
    spotting = SpottingEncoder.from_whisper(str(tmp_path / "whisper"), lora=Lora(2, 4.0, (), 0.0))
    encoder = ExtendedEncoder(spotting, TopDims(dim=32, layers=1, kernel=3))
    CtcModel(encoder, CtcModel.load(parts["ctc"]).vocabulary).save(tmp_path / "ctc", card="", dtype=torch.float32)
    made = speech_llm(data, {**parts, "ctc": tmp_path / "ctc"}, encoder="rest", adapter=adapter)
    quiet = replace(made.corpora[0], augment=Augmentation(speeds=(1.0,), noise_chance=0.0, spec=None))
    figures = [
        run(
            replace(made, corpora=(quiet,), learning=Learning(batch_seconds=8.0, decoder_check=3, kept_versions=versions)),
            tmp_path / str(versions),
            world=World(),
        )
        for versions in (0, 1)
    ]
    assert figures[0]["dev ce"] == pytest.approx(figures[1]["dev ce"], rel=1e-3), "kept frames are those that are computed"
    model = load_attention_model(tmp_path / "1" / "model")
    for n, x in CtcModel.load(tmp_path / "ctc").state_dict().items():
        assert torch.equal(model.ctc.state_dict()[n], x), n
    assert isinstance(model, SpeechLlm) and not any(
        n.startswith("encoder.") for n in load_file(tmp_path / "1" / "model" / "model.safetensors")
    )
    labels = torch.tensor([model.vocabulary.encode("the cat")])
    sound = np.random.default_rng(0).standard_normal(16000).astype(np.float32)
    with torch.no_grad():
        whole = model(
            model.ctc.encoder.features(torch.from_numpy(sound))[None], torch.tensor([100]), labels=labels, sizes=torch.tensor([2])
        )
        scorer = model.scorer([sound])
        first = scorer.log_probs(scorer.start(1))
    torch.testing.assert_close(first[0], whole.logits[0, 0].log_softmax(-1), atol=1e-3, rtol=1e-3)


def test_frames_are_kept_below_resting_auxiliary_heads(data: Path, parts: dict[str, Path], tmp_path: Path) -> None:
    vocabulary = CtcModel.load(parts["ctc"]).vocabulary
    CtcModel.load(parts["ctc"]).with_heads({1: vocabulary}).save(tmp_path / "ctc", card="", dtype=torch.float32)
    made = speech_llm(data, {**parts, "ctc": tmp_path / "ctc"}, encoder="rest")
    figures = run(replace(made, learning=Learning(batch_seconds=8.0, decoder_check=3, kept_versions=1)), tmp_path / "out", world=World())
    assert "dev ce" in figures and "dev ctc1" not in figures


def test_a_speech_llm_whose_encoder_learns_has_its_ctc_losses(data: Path, parts: dict[str, Path], tmp_path: Path) -> None:
    low_rank = {"encoder": "lora", "encoder_lora": Lora(2, 2.0, ("query",))}
    made = speech_llm(data, parts, heads=(1,), attention="cross", adapter=AdapterDims("concat"), learns="nothing", **low_rank)
    figures = run(made, tmp_path, world=World())
    losses = {"ce", "ctc", "ctc1"}
    assert figures.keys() == {f"{name} {x}" for name in ("dev", "held-out") for x in ("WER", *losses)} | {"dev decoder WER", "dev runaway"}
    assert losses == json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])["loss"].keys()
    model, source = load_attention_model(tmp_path / "model"), CtcModel.load(parts["ctc"]).state_dict()
    assert isinstance(model, SpeechLlm) and not any("llm." in name for name in load_file(tmp_path / "model" / "model.safetensors"))
    changed = {name for name, x in model.ctc.encoder.named_parameters() if not torch.equal(x, source[f"encoder.{name}"].half().float())}
    assert changed == {f"layers.{i}.attention.query.weight" for i in (0, 1)}
    head = load_acoustic_model(f"{tmp_path / 'model'}#1")
    assert head.vocabulary.digest() == tokenizer().digest() and head.vocabulary.size == tokenizer().size + 1


def test_a_ctc_head_on_the_language_model_learns_beside_it(data: Path, parts: dict[str, Path], tmp_path: Path) -> None:
    made = speech_llm(data, parts, encoder="rest", adapter=AdapterDims("concat"), audio_head=True)
    figures = run(replace(made, training=replace(made.training, steps=12, validate_every=4)), tmp_path, world=World())
    assert {"dev ce", "dev ctc_llm"} <= figures.keys() and "dev ctc" not in figures
    lines = [json.loads(x)["validation"]["dev ctc_llm"] for x in (tmp_path / "metrics.jsonl").read_text().splitlines() if "validation" in x]
    assert lines[-1] < lines[0]
    head = load_acoustic_model(f"{tmp_path / 'model'}#llm")
    assert head.vocabulary.digest() == CtcModel.load(parts["ctc"]).vocabulary.digest()
    assert load_acoustic_model(tmp_path / "model").log_probs_of([np.zeros(16000, np.float32)]).log_probs.shape[0] == 1


def test_a_speech_llm_goes_on_from_another_ones_folder(data: Path, parts: dict[str, Path], tmp_path: Path) -> None:
    """Its model as the encoder's source, or as a warm start of all of it."""
    first = tmp_path / "first" / "model"
    stages = {
        "first": speech_llm(data, parts, encoder="rest", learns="nothing"),
        "second": speech_llm(data, {**parts, "ctc": first}, encoder="rest"),
        "third": replace(speech_llm(data, parts, encoder="rest"), start=str(first)),
    }
    for name, made in stages.items():
        once = replace(made.training, steps=1, validate_every=1, save_every=1, keep_best=0)
        run(replace(made, training=once, learning=Learning(batch_seconds=8.0, decoder_check=0)), tmp_path / name, world=World())
    source = CtcModel.load(parts["ctc"]).state_dict()
    for name, bound in (("second", 1e-6), ("third", 1e-3)):  # the third one's folder is whole, in half precision
        model = load_attention_model(tmp_path / name / "model")
        assert isinstance(model, SpeechLlm)
        for key, x in model.ctc.state_dict().items():
            torch.testing.assert_close(x, source[key], atol=bound, rtol=bound)


def test_speech_llms_that_make_no_sense_are_refused(data: Path, parts: dict[str, Path], tmp_path: Path) -> None:
    made = speech_llm(data, parts)
    with pytest.raises(TrainError, match="a decoder or an llm, not both"):
        run(replace(made, decoder=DecoderDims.of(layers=1, dim=32)), tmp_path / "both", world=World())
    with pytest.raises(TrainError, match="learning_rates of lm: expected "):
        run(replace(made, training=replace(QUICK, learning_rates={"lm": 1.0})), tmp_path / "rates", world=World())
    kept = Learning(batch_seconds=8.0, kept_versions=1)
    with pytest.raises(TrainError, match="keeps the frames of an encoder that rests"):
        run(replace(made, learning=kept), tmp_path / "kept", world=World())


@pytest.mark.parametrize("stack", [1, 2])
def test_layers_on_a_resting_whisper_then_all(data: Path, tmp_path: Path, stack: int) -> None:
    top, whisper = TopDims(dim=32, layers=1, kernel=3, stack=stack), str(data / "whisper")
    first = experiment(
        data,
        encoder=FromWhisper(whisper, 9, top),
        learning=Learning(batch_seconds=8.0, kept_versions=2),
        training=replace(QUICK, average=0.9),
    )
    run(first, tmp_path / "top", world=World())
    model = CtcModel.load(tmp_path / "top" / "model")
    assert isinstance(model.encoder, ExtendedEncoder)
    own = tiny_whisper(tmp_path / "w", mels=80, positions=200).model.encoder
    torch.testing.assert_close(model.encoder.base.layers[1].fc1.weight, own.layers[1].fc1.weight, atol=1e-3, rtol=0)
    second = experiment(data, encoder=FromWhisper(whisper, 1, top), start=str(tmp_path / "top" / "model"))
    run(second, tmp_path / "all", world=World())
    tuned = CtcModel.load(tmp_path / "all" / "model")
    assert isinstance(tuned.encoder, ExtendedEncoder)
    assert torch.equal(tuned.encoder.base.layers[0].fc1.weight, model.encoder.base.layers[0].fc1.weight)
    assert not torch.equal(tuned.encoder.base.layers[1].fc1.weight, model.encoder.base.layers[1].fc1.weight)


def test_of_few_utterances_most_are_learned_from(data: Path) -> None:
    vocabulary = CharacterVocabulary([*"abcdefghijklmnopqrstuvwxyz", "|", "_"], delimiter="|", blank="_")
    items = usable(open_source(data).utterances, vocabulary, seconds_per_frame=0.001).items[:3]
    for speakers in (["a", "a", "a"], ["a", "b", "c"], ["a", "a", "b"]):
        some = [replace(x, utterance=replace(x.utterance, fields={"speaker": s})) for x, s in zip(items, speakers, strict=True)]
        left, held = _held_out(some, 1)
        assert len(left) >= 2 and len(left) + len(held) == 3


def test_a_spotter_learns_and_goes_on(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whisper_with_tokenizer(tmp_path / "whisper", mels=80, positions=200)
    lora = Lora(2, 4.0, (), 0.0)
    made = experiment(
        data,
        encoder=FromWhisper(str(tmp_path / "whisper"), 9, TopDims(dim=32, layers=1, kernel=3), spotter=(2, 8), spotter_lora=lora),
        training=replace(QUICK, learning_rates={**RATES, "spotter": 1e-3}),
    )
    straight_and_resumed(made, tmp_path, monkeypatch)
    stored = load_file(tmp_path / "straight" / "model" / "model.safetensors")
    learned = [name for name in stored if name.startswith("encoder.base.")]
    assert learned and all(name.endswith((".up", ".down")) for name in learned)
    assert any(bool(stored[name].any()) for name in learned if name.endswith(".up"))
    assert CtcModel.load(tmp_path / "straight" / "model").log_probs_of([np.zeros(9000, np.float32)]).log_probs.isfinite().any()
    still = replace(made.training, learning_rates=dict.fromkeys([*RATES, "spotter"], 0.0), steps=1, weight_decay=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run(replace(made, training=still, start=str(tmp_path / "straight" / "model")), tmp_path / "still", world=World())
    again = load_file(tmp_path / "still" / "model" / "model.safetensors")
    assert again.keys() == stored.keys() and all(torch.equal(again[n], x) for n, x in stored.items() if "running" not in n)


def kept_and_computed(model: Trainable, data: Path, loss: str) -> list[float]:
    """The loss on the audio, and on frames kept by `load`, each computed and taken again, for the same augmentation."""
    vocabulary = (model if isinstance(model, CtcModel) else model.ctc).vocabulary
    items = usable(open_source(data).utterances, vocabulary, seconds_per_frame=0.04).items
    corpus = Corpus("x", augment=Augmentation(noise_chance=1.0, spec=None))
    found = []
    for versions in (0, 1):
        task = AsrTask(model, Learning(batch_seconds=8.0, kept_versions=versions), [(corpus, items)], {}, seed=0)
        micro = task.plan(0, 1)[0][0]
        for _ in range(2):
            batch = task.load(micro, Place())
            assert batch is not None and batch.kept == bool(versions)
            found.append(float(task.losses(batch)[loss].detach()))
    return found


@pytest.mark.parametrize("stack", [1, 2])
def test_kept_frames_are_those_of_the_whole_model(data: Path, tmp_path: Path, stack: int) -> None:
    vocabulary = SentencePieceVocabulary((_units(data, tmp_path)).model, blank="last")
    torch.manual_seed(0)
    top = TopDims(dim=32, layers=1, kernel=3, stack=stack)
    encoder = ExtendedEncoder(WhisperEncoder.from_whisper(data / "whisper"), top)
    model = CtcModel(encoder, vocabulary).eval()
    for wrong in (model, CtcModel(ConformerEncoder(DIMS), vocabulary)):  # the encoder learns; there is nothing on top
        with pytest.raises(TrainError, match="layers on top with one CTC head"):
            AsrTask(wrong, Learning(kept_versions=1), [], {}, seed=0)
    encoder.base.requires_grad_(False)
    found = kept_and_computed(model, data, "ctc")
    assert found == pytest.approx([found[0]] * 4, rel=1e-3)
    whisper_with_tokenizer(tmp_path / "whisper", mels=80, positions=200)
    spotting = SpottingEncoder.from_whisper(str(tmp_path / "whisper")).requires_grad_(False)
    model = CtcModel(ExtendedEncoder(spotting, TopDims(dim=32, layers=1, kernel=3)), vocabulary).eval()
    found = kept_and_computed(model, data, "ctc")
    assert found == pytest.approx([found[0]] * 4, rel=1e-3)


def test_masks_hide_kept_frames_but_no_number(data: Path, tmp_path: Path) -> None:
    whisper_with_tokenizer(tmp_path / "whisper", mels=80, positions=200)
    vocabulary = SentencePieceVocabulary((_units(data, tmp_path)).model, blank="last")
    spotting = SpottingEncoder.from_whisper(str(tmp_path / "whisper")).requires_grad_(False)
    model = CtcModel(ExtendedEncoder(spotting, TopDims(dim=32, layers=1, kernel=3)), vocabulary).eval()
    items = usable(open_source(data).utterances, vocabulary, seconds_per_frame=0.04).items
    seen = []
    for spec in (None, SpecAugment(ramp=(0, 0, 0), time_width=10, mel_width=8)):
        corpus = Corpus("x", augment=Augmentation(speeds=(1.0,), noise_chance=0.0, spec=spec))
        task = AsrTask(model, Learning(batch_seconds=8.0, kept_versions=1), [(corpus, items)], {}, seed=0)
        batch = task.load(task.plan(0, 1)[0][0], Place())
        assert batch is not None
        seen.append(batch.sound)
    whole, masked = seen
    hidden = masked != whole
    assert not masked[hidden].any() and hidden[..., : spotting.dim].any()
    assert not (hidden[..., spotting.dim :].any(-1) & masked[..., : spotting.dim].any(-1)).any(), "of hidden frames alone"


@pytest.mark.parametrize("versions", [0, 1])
def test_what_has_no_speech_has_no_labels(data: Path, parts: dict[str, Path], versions: int) -> None:
    llm, vocabulary = load_language_model(parts["llm"])
    resting = SpeechLlm(CtcModel.load(parts["ctc"]), llm, vocabulary, SpeechLlmDims(encoder="rest"))
    for model in (resting,) if versions else (resting, CtcModel.load(parts["ctc"])):
        items = usable(open_source(data).utterances, CtcModel.load(parts["ctc"]).vocabulary, seconds_per_frame=0.04).items
        for share in (0.0, 0.5, 1.0):
            corpus = Corpus("x", augment=Augmentation(speechless=share, spec=None))
            task = AsrTask(model, Learning(batch_seconds=8.0, kept_versions=versions), [(corpus, items)], {}, seed=0)
            micros = [micro for step in task.plan(0, 1) for micro in step]
            for _ in range(2):
                batches = [batch for micro in micros if (batch := task.load(micro, Place())) is not None]
                nothing = [int(n) == 0 for batch in batches for n in batch.label_sizes["ctc" if model is not resting else "ce"]]
                assert len(nothing) == len(items) and {0.0: not any(nothing), 0.5: 0 < sum(nothing) < len(items), 1.0: all(nothing)}[share]
            losses = task.losses(batches[0])
            assert all(bool(x.isfinite()) and float(x.detach()) > 0 for x in losses.values())


@pytest.mark.parametrize("adapter", ["concat", "ctc", "words"])
def test_kept_frames_of_a_speech_llm_are_those_of_the_whole_model(data: Path, parts: dict[str, Path], adapter: Any) -> None:
    llm, vocabulary = load_language_model(parts["llm"])
    torch.manual_seed(0)
    model = SpeechLlm(CtcModel.load(parts["ctc"]), llm, vocabulary, SpeechLlmDims(adapter=AdapterDims(adapter), encoder="rest")).eval()
    torch.nn.init.normal_(model.adapter.linear.weight)
    found = kept_and_computed(model, data, "ce")
    assert found == pytest.approx([found[0]] * 4, rel=1e-3)


def test_context_words_are_drawn_anew_in_each_epoch_and_heard(data: Path, parts: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("duolect.train.asr.CONTEXT_LETTERS", 3)
    llm, vocabulary = load_language_model(parts["llm"])
    model = SpeechLlm(CtcModel.load(parts["ctc"]), llm, vocabulary, SpeechLlmDims(before="the {context} that", encoder="rest")).eval()
    items = usable(open_source(data).utterances, model.ctc.vocabulary, seconds_per_frame=0.04).items
    task = AsrTask(model, Learning(batch_seconds=8.0), [(Corpus("x", augment=Augmentation((1.0,), 0.0, spec=None)), items)], {}, seed=0)
    known, drawn = {x for x in " ".join(TEXTS).split() if len(x) > 2}, []
    for epoch in range(12):
        for micro in (update[0] for update in task.plan(epoch, 1)):
            batch, again = (task.load(micro, Place(epoch=epoch)) for _ in range(2))
            assert batch and again and batch.context == again.context and len(batch.context) == len(micro)
            drawn += [
                (heard.item.utterance.id, set((heard.item.utterance.text or "").split()), x)
                for heard, x in zip(micro, batch.context, strict=True)
            ]
    assert len({x for i, _, x in drawn if i == "3"}) > 6, "other ones in other epochs"
    assert all(len(set(x)) == len(x) <= 13 and set(x) <= known for _, _, x in drawn)
    assert 0.2 < sum(not x for _, _, x in drawn) / len(drawn) < 0.4
    assert sum(bool(own & set(x)) for _, own, x in drawn) > sum(bool(drawn[i - 7][1] & set(x)) for i, (_, _, x) in enumerate(drawn))
    batch = task.load(task.plan(0, 1)[0][0], Place())
    assert batch and any(batch.context)
    alone = 0.0
    for heard, words in zip(task.plan(0, 1)[0][0], batch.context, strict=True):
        fixed = replace(model.dims, before=f"the {', '.join(words)} that")
        task.model = task._network = copy.copy(model)
        task.model.dims, task.model.takes_context = fixed, False
        task.model.prompts = task.model.prompts_with(())
        one = task.load([heard], Place())
        assert one and not one.context
        alone += float(task.losses(one)["ce"].detach())
    task.model = task._network = model
    assert float(task.losses(batch)["ce"].detach()) == pytest.approx(alone, rel=1e-4)
    assert float(task.losses(replace(batch, context=()))["ce"].detach()) != pytest.approx(alone, rel=1e-3)


def test_segmentations_are_drawn_anew_each_epoch(data: Path, tmp_path: Path) -> None:
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


def test_what_is_easy_comes_first(data: Path, tmp_path: Path) -> None:
    items = [Labelled(x, (1,)) for x in open_source(data).utterances]
    corpora = [(Corpus("hard", begin=1), items[:6]), (Corpus("easy"), items[6:])]
    model = CtcModel(ConformerEncoder(DIMS), _units(data, tmp_path))
    task = AsrTask(model, Learning(batch_seconds=4.0, rising=1), corpora, {}, seed=0)
    heard = [[micro for update in task.plan(epoch, 1) for micro in update] for epoch in (0, 1)]
    assert [{x.corpus for micro in epoch for x in micro} for epoch in heard] == [{1}, {0, 1}]
    longest = [[max(x.item.seconds / task._speed(x, n) for x in micro) for micro in epoch] for n, epoch in enumerate(heard)]
    assert len(longest[0]) > 3 and longest[0] == sorted(longest[0]) and longest[1] != sorted(longest[1])


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
    bad.write_text("".join(json.dumps(line) + "\n" for line in lines[:20]))
    run(experiment(data, checks={"real/dev": str(bad)}, held_out=0, max_share_lost=0.7), tmp_path / "dev", world=World())
    assert len((tmp_path / "dev" / "skipped-real-dev.jsonl").read_text().splitlines()) == 12


def test_batches_are_of_utterances_as_long_as_they_are_heard(data: Path, tmp_path: Path) -> None:
    vocabulary = SentencePieceVocabulary((_units(data, tmp_path)).model, blank="last")
    items = usable(open_source(data).utterances, vocabulary, seconds_per_frame=0.04).items
    corpus = Corpus("x", augment=Augmentation(speeds=(0.5, 1.0, 2.0), noise_chance=0.0, spec=None))
    task = AsrTask(CtcModel(ConformerEncoder(DIMS), vocabulary), Learning(batch_seconds=6.0), [(corpus, items)], {}, seed=0)
    for place in (Place(), Place(epoch=1)):
        sizes = [task.load(micro, place).sizes for update in task.plan(place.epoch, 1) for micro in update]  # type: ignore[union-attr]
        assert all(int(x.max()) * len(x) <= 6.01 * 16000 for x in sizes), "no batch is longer than asked, whatever the speeds"
        assert sum(len(x) for x in sizes) == len(items)


def test_kept_frames_do_not_go_with_workers(data: Path, tmp_path: Path) -> None:
    made = experiment(data, learning=Learning(kept_versions=1), training=replace(QUICK, workers=2))
    with pytest.raises(TrainError, match=r"set training\.workers=0"):
        run(made, tmp_path / "out", world=World())


@torch.no_grad()
@pytest.mark.parametrize("attention", ["prefix", "merged", "cross"])
def test_validation_of_a_speech_llm_tells_how_much_it_attends_to_audio(data: Path, parts: dict[str, Path], attention: Any) -> None:
    llm, vocabulary = load_language_model(parts["llm"])
    dims = SpeechLlmDims(attention=attention, before="the", encoder="rest")
    model = SpeechLlm(CtcModel.load(parts["ctc"]), llm, vocabulary, dims).eval()
    items = usable(open_source(data).utterances, model.ctc.vocabulary, seconds_per_frame=0.04).items[:3]
    task = AsrTask(model, Learning(decoder_check=3), [], {"dev": items}, seed=0)
    whole = task.validate(0, 1)
    if attention == "cross":
        assert "dev attention on audio" not in whole
        return
    # Where keys are all the same, every position that is seen gets as much.
    for layer in model.layers:
        layer.self_attn.k_proj.weight.data.zero_()  # type: ignore[union-attr]
    even, shares = task.validate(0, 1)["dev attention on audio"], []
    for item in items:
        text = len(vocabulary.encode(item.utterance.text or "")) + 1
        audio, before = int(model.scorer([load_audio(item.utterance)]).lengths[0]), len(model.prompts[0])
        shares.append(np.mean([audio / (before + audio + seen) for seen in range(1, text + 1)]))
    assert even.value == pytest.approx(100 * np.mean(shares), rel=1e-4) and even.count == 3
    assert whole["dev attention on audio"].value != pytest.approx(even.value, rel=1e-3)
    halves = [task.validate(rank, 2)["dev attention on audio"] for rank in (0, 1)]
    assert sum(x.sum for x in halves) == pytest.approx(even.sum) and sum(x.count for x in halves) == 3
