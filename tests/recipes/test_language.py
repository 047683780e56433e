"""Language models from texts: tiny runs from a text file to a folder that loads, stopped and taken up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from duolect.config import digest, from_json, to_json, with_overrides
from duolect.data.text import TextLines
from duolect.models import decoder
from duolect.models.decoder import OutputLayer
from duolect.models.finetuned import Learns, LmDims, fitted
from duolect.models.lm import HFCausalLM, load_language_model
from duolect.models.lora import Lora
from duolect.recipes.language import LmExperiment, LmShape, Text, finetune, run, scratch
from duolect.run import RunError
from duolect.search.rescore import text_scores
from duolect.train.checkpoint import STATE, TrainError, read_weights
from duolect.train.language import IGNORED, LmTask, TextLearning
from duolect.train.loop import TrainConfig
from duolect.train.optim import WarmUp
from duolect.train.parallel import World
from duolect.train.task import Place
from tests.conftest import sentence_pieces
from tests.models.test_finetuned import sources
from tests.models.test_speech_llm import TEXTS

__all__ = ["sources"]
QUICK = TrainConfig(
    {"llm": 3e-3, "embeddings": 3e-3}, steps=6, schedule=WarmUp(2), log_every=2, validate_every=3, save_every=2, keep_best=2
)
GOLDEN = {"finetune": "e96cfa7486", "scratch": "a37fc6d35d"}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(TEXTS * 3) + "\n")
    return path


@pytest.fixture(scope="module")
def units(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("units")
    sentence_pieces(TEXTS * 5, size=14).save(folder)
    return folder


def test_the_recipes_resolve_to_what_they_did() -> None:
    made = {"finetune": finetune("smollm2-135m", ["a.txt"], ["b.txt"], ""), "scratch": scratch(["a.txt"], ["b.txt"], "duolect-ctc")}
    assert {name: digest(x) for name, x in made.items()} == GOLDEN
    assert all(from_json(to_json(x)) == x for x in made.values())
    deep = with_overrides(made["scratch"], {"model.layers": "6", "learning.sampling": "0.5"})
    assert isinstance(deep.model, LmShape) and deep.model.layers == 6 and deep.learning.sampling == 0.5


@pytest.mark.parametrize("how", ["whole", "lora", "reheaded", "scratch", "sampled"])
def test_a_killed_run_repeats_itself_and_the_model_is_that_of_the_figures(
    how: str, text: Path, units: Path, sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = LmExperiment(
        "x", (Text(str(text)),), QUICK, str(sources["llama"]), checks={"c": str(text)}, learning=TextLearning(40, checked=5)
    )
    made = {
        "whole": plain,
        "lora": replace(plain, dims=LmDims("lora", Lora(2, dropout=0.1), "rest", end="\n")),
        "reheaded": replace(plain, units=str(units), dims=LmDims("lora", Lora(2))),
        "scratch": replace(plain, model=LmShape(16, 1, 1, 16), units=str(units)),
        "sampled": replace(plain, model=LmShape(16, 1, 1, 16), units=str(units), learning=TextLearning(40, sampling=0.3, checked=5)),
    }[how]
    figures = run(made, tmp_path / "straight", world=World())
    assert list(figures) == ["c word PPL", "c label PPL"] and figures["c word PPL"] >= figures["c label PPL"] > 1

    updates, load = [], LmTask.load

    def killed(task: LmTask, items: tuple[int, ...], place: Place):
        if place.step == 4 and not updates:
            updates.append(place.step)
            raise KeyboardInterrupt
        return load(task, items, place)

    monkeypatch.setattr(LmTask, "load", killed)
    with pytest.raises(KeyboardInterrupt):
        run(made, tmp_path / "resumed", world=World())
    assert run(made, tmp_path / "resumed", world=World()) == figures
    one, two = ((tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("straight", "resumed"))
    assert one == two
    state = [name for name in read_weights(tmp_path / "resumed" / STATE)[0] if name.startswith("model.")]
    assert how != "lora" or (state and all(".up" in name or ".down" in name for name in state)), "what rests is not written"
    with pytest.raises(RunError, match=r"training.steps: 6 -> 7"):
        run(replace(made, training=replace(QUICK, steps=7)), tmp_path / "resumed", world=World())

    scorer = HFCausalLM.load(tmp_path / "straight" / "model")
    checked = TextLines(text, case="lower")[:: max(1, len(TextLines(text)) // 5)][:5]
    scores = text_scores(scorer, checked)
    words = sum(len(x.split()) + 1 for x in checked)
    assert torch.tensor(-sum(s for s, _ in scores) / words).exp().item() == pytest.approx(figures["c word PPL"], rel=0.02)


def test_batches_hold_every_sentence_once_and_losses_are_those_of_single_sentences(text: Path, units: Path, tmp_path: Path) -> None:
    vocabulary = sentence_pieces(TEXTS * 5, size=14)
    torch.manual_seed(0)
    made = LmExperiment("x", (Text(str(text), 2),), QUICK, LmShape(16, 2, 2, 16), units=str(units))
    from duolect.recipes.language import _model

    model = _model(made, vocabulary)[0]
    lines = TextLines(text)
    learning = TextLearning(batch_labels=30, longest=7)
    task = LmTask(model, vocabulary, learning, [(lines, 2), (TextLines(text, case="upper"), 1)], {}, seed=0, save=lambda *a, **b: None)
    plan = task.plan(0, 2)
    assert sorted(i for parts in plan for micro in parts for i in micro) == list(range(3 * len(lines)))
    assert task._text(len(lines) + 1) == lines[1] and task._text(2 * len(lines) + 1) == lines[1].upper()
    for micro in plan[0]:
        batch = task.load(micro, Place())
        assert batch is not None and batch.inputs.numel() <= 30 + 2 * len(micro)
        total = sum(float(task.losses(single)["nats"].detach()) for i in micro if (single := task.load([i], Place())))
        assert float(task.losses(batch)["nats"].detach()) == pytest.approx(total, rel=1e-5)
        for row, i in zip(batch.targets, micro, strict=True):
            wanted = [*vocabulary.encode(task._text(i)), vocabulary.eos][:8]
            assert [x for x in row.tolist() if x != IGNORED] == wanted


@pytest.mark.parametrize("learns", ["all", "lora", "nothing"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_losses_in_pieces_give_the_gradients_of_whole_logits(
    kind: str, learns: Learns, text: Path, sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def made() -> tuple[LmTask, dict[str, torch.nn.Parameter]]:
        torch.manual_seed(0)
        model, own = load_language_model(sources[kind])
        model.config.final_logit_softcapping = 3.0  # pyright: ignore[reportAttributeAccessIssue]
        vocabulary = fitted(model, own, LmDims(learns, Lora(2, targets=(), dropout=0.0), "rest" if learns == "lora" else "learn"))
        model.eval()
        task = LmTask(model, vocabulary, TextLearning(), [(TextLines(text), 1)], {}, seed=0, save=lambda *a, **b: None)
        return task, {name: p for name, p in model.named_parameters() if p.requires_grad}

    most: list[int] = []
    whole = OutputLayer.__call__

    def watched(layer: OutputLayer, hidden: Tensor) -> Tensor:
        most.append(len(hidden))
        return whole(layer, hidden)

    monkeypatch.setattr(OutputLayer, "__call__", watched)
    task, learned = made()
    monkeypatch.setattr(decoder, "LOGITS_AT_ONCE", 4 * task.vocabulary.size)
    batch = task._batch([task.vocabulary.encode(x) for x in TEXTS[:5]])
    (task.losses(batch)["nats"] / 7).backward()
    assert set(most[:-1]) == {4} and sum(most) == batch.counts["nats"], "padding has no logits"

    other, wanted = made()
    logits: Tensor = other.model(input_ids=batch.inputs).logits[..., : other.vocabulary.size]
    logits = 3.0 * (logits / 3.0).tanh()
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED, reduction="sum")
    (nats / 7).backward()
    assert learned.keys() == wanted.keys() and learned
    for name, p in learned.items():
        torch.testing.assert_close(p.grad, wanted[name].grad, atol=1e-5, rtol=1e-4, msg=name)
    with torch.inference_mode():
        assert float(task.losses(batch)["nats"]) == pytest.approx(float(nats.detach()), rel=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert float(task.losses(batch)["nats"].detach()) == pytest.approx(float(nats.detach()), rel=0.02)


def test_what_is_wrong_is_said_before_training(text: Path, units: Path, sources: dict[str, Path], tmp_path: Path, capsys) -> None:
    plain = LmExperiment("x", (Text(str(text)),), QUICK, str(sources["llama"]), units=str(units))
    (tmp_path / "empty.txt").write_text("\n \n")
    for wrong, said in (
        (replace(plain, texts=()), "no text to learn from"),
        (replace(plain, texts=(Text(str(tmp_path / "empty.txt")),)), "has no sentence"),
        (replace(plain, units=str(sources["llama"])), r"is missing|expected SentencePiece"),
        (replace(plain, model=LmShape(), units=""), "name a CTC model's folder with --units"),
    ):
        with pytest.raises((TrainError, ValueError), match=said):
            run(wrong, tmp_path / "out", world=World())
    (tmp_path / "odd.txt").write_text("ab ж\nab\n")
    run(replace(plain, texts=(Text(str(tmp_path / "odd.txt")),), training=replace(QUICK, steps=1)), tmp_path / "odd", world=World())
    assert "50.0% have letters outside the units, such as 'ab ж'" in capsys.readouterr().err


def test_a_large_text_is_measured_by_its_bytes(text: Path, units: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import duolect.train.language as language

    vocabulary, lines = sentence_pieces(TEXTS * 5, size=14), TextLines(text)
    made = LmExperiment("x", (Text(str(text)),), QUICK, LmShape(16, 1, 1, 16), units=str(units))
    from duolect.recipes.language import _model

    exact = LmTask(_model(made, vocabulary)[0], vocabulary, TextLearning(), [(lines, 1)], {}, seed=0, save=lambda *a, **b: None).sizes
    monkeypatch.setattr(language, "_MEASURED", 10)
    rough = LmTask(_model(made, vocabulary)[0], vocabulary, TextLearning(), [(lines, 1)], {}, seed=0, save=lambda *a, **b: None).sizes
    assert exact == [len(vocabulary.encode(x)) + 1 for x in lines]
    assert rough != exact and sum(rough) == pytest.approx(sum(exact), rel=0.02)
