"""The training loop: it learns, resumes to the bit, stops on NaN, halves what does not fit, keeps the best weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from duolect.train.checkpoint import STATE, TrainError, mean_weights, read_weights, write_weights
from duolect.train.loop import TrainConfig, train
from duolect.train.optim import Average, Piecewise, WarmUp, adamw, set_rates
from duolect.train.task import Batch, Place, Ratio, Task

CONFIG = TrainConfig(
    steps=10, learning_rates={"body": 0.01, "head": 0.1}, schedule=WarmUp(steps=2), log_every=5, validate_every=5, save_every=5
)


@dataclass(frozen=True)
class Points(Batch):
    x: Tensor

    @property
    def counts(self) -> Mapping[str, int]:
        return {"error": len(self.x)}


class Line(Task[int, Points]):
    """y = 3 x by two linear layers with dropout between; item i is one x. Updates have 8 items."""

    def __init__(self, *, poison: int | None = None, dropout: float = 0.1, room: int = 8, items: int = 32) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(1, 8), nn.Dropout(dropout), nn.Linear(8, 1))
        self.poison, self.room, self.items, self.heard = poison, room, items, []

    def groups(self) -> Mapping[str, nn.Module]:
        return {"head": self.model[2], "body": self.model}

    def plan(self, epoch: int, parts: int) -> Sequence[Sequence[tuple[int, ...]]]:
        # Micro-batches of unequal sizes, so that a mean of means would be wrong; the last one of some is empty.
        cut = [0, *(8 * (i + 1) // parts - (i % 2 if i + 1 < parts else 0) for i in range(parts))]
        return [[tuple(range(start + a, min(self.items, start + b))) for a, b in pairwise(cut)] for start in range(0, self.items, 8)]

    def load(self, items: Sequence[int], place: Place) -> Points | None:
        x = torch.tensor([[(i % 32) / 16 - 1 + place.epoch / 100] for i in items])
        return Points(x, seconds=0.1 * len(items)) if items else None

    def losses(self, batch: Points) -> Mapping[str, Tensor]:
        if len(batch.x) > self.room:
            raise torch.OutOfMemoryError("no room")
        self.heard.append(len(batch.x))
        error = (self.model(batch.x) - 3 * batch.x).square().sum()
        poisoned = self.poison is not None and bool((batch.x == self.poison / 16 - 1).any())
        return {"error": error * (torch.nan if poisoned else 1.0)}

    def validate(self, rank: int, world: int) -> Mapping[str, Ratio]:
        assert not self.model.training and not torch.is_grad_enabled()
        return {"error": Ratio(float((self.model(torch.ones(1, 1)) - 3).abs()), 1)}

    def save(self, folder: Path, weights: Mapping[str, Tensor], *, note: str) -> None:
        folder.mkdir(exist_ok=True)
        save_file(dict(weights), folder / "weights.safetensors")
        (folder / "note").write_text(note)


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_it_learns_and_writes_what_it_did(tmp_path: Path) -> None:
    task = Line()
    before = task.model(torch.ones(1, 1)).item()
    figures = train(task, replace(CONFIG, steps=200), tmp_path)
    assert figures["error"] < 0.3 < abs(before - 3)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"]["error"] for line in lines if "loss" in line]
    assert len(losses) == 40 and losses[-1] < losses[0] / 10
    assert {"step", "epoch", "lr", "grad_norm", "audio_per_second"} <= lines[0].keys()
    assert (tmp_path / "model" / "note").read_text().startswith("update 200")
    assert json.loads((tmp_path / "result.json").read_text())["error"] == figures["error"]


@pytest.mark.parametrize("stop", [1, 4, 7])
@pytest.mark.parametrize(("average", "workers"), [(0.0, 0), (0.9, 0), (0.0, 2)])
def test_a_stopped_run_goes_on_to_the_bit(tmp_path: Path, average: float, workers: int, stop: int) -> None:
    straight, first, second = Line(), Line(), Line()
    config = replace(CONFIG, average=average, workers=workers, save_every=2, keep_best=2, validate_every=3)
    expected = train(straight, config, tmp_path / "straight")

    def broken_off(batch: Points) -> Mapping[str, Tensor]:
        if len(first.heard) == stop:
            raise KeyboardInterrupt
        return Line.losses(first, batch)

    first.losses = broken_off  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        train(first, config, tmp_path / "resumed")
    assert train(second, config, tmp_path / "resumed") == expected
    assert len(second.heard) == 10 - stop // 2 * 2
    assert equal(straight.model, second.model)
    files = [tmp_path / run / "model" / "weights.safetensors" for run in ("straight", "resumed")]
    assert files[0].read_bytes() == files[1].read_bytes()
    # A line about losses covers what came since the start, figures are those of the weights alone.
    logged = [
        [(line["step"], line["of"], line["validation"]) for line in map(json.loads, path.read_text().splitlines()) if "of" in line]
        for path in (tmp_path / run / "metrics.jsonl" for run in ("straight", "resumed"))
    ]
    assert logged[0] == logged[1] and len(logged[0]) == 6


def test_accumulation_is_the_same_update(tmp_path: Path) -> None:
    """8 at once, 4 + 4 (unequal: 4 and 4, 3 and 5 ...) in two, and in three: one gradient."""
    models = []
    for accumulate in (1, 2, 3):
        task = Line(dropout=0.0)
        train(task, replace(CONFIG, accumulate=accumulate), tmp_path / str(accumulate))
        models.append(task.model)
    for model in models[1:]:
        for x, y in zip(models[0].parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-5)


def test_what_does_not_fit_is_halved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    roomy, tight = Line(dropout=0.0), Line(dropout=0.0, room=3)
    train(roomy, CONFIG, tmp_path / "roomy")
    train(tight, CONFIG, tmp_path / "tight")
    assert set(tight.heard) == {2} and "out of memory, in halves: 0, 1, 2, 3, 4, 5, 6, 7" in capsys.readouterr().err
    for x, y in zip(roomy.model.parameters(), tight.model.parameters(), strict=True):
        torch.testing.assert_close(x, y, atol=1e-6, rtol=1e-5)


def test_one_item_too_large_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(Line(room=0), replace(CONFIG, steps=1), tmp_path)
    assert "out of memory, left out: 5" in capsys.readouterr().err


def test_the_best_weights_and_their_mean_are_tried(tmp_path: Path) -> None:
    class Worse(Line):
        """Its figure is best in the middle of the run; the mean of weights is judged by what the weights are."""

        def validate(self, rank: int, world: int) -> Mapping[str, Ratio]:
            seen.append(self.model[0].weight.detach().clone())
            return {"odd": Ratio(abs(len(seen) - 3), 1)}  # the first one is asked before training

    seen: list[Tensor] = []
    task = Worse()
    figures = train(task, replace(CONFIG, validate_every=2, keep_best=2, watch="odd"), tmp_path)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["step-4.safetensors", "step-6.safetensors"]  # figures 0 and 1, the newer of equals
    assert torch.equal(read_weights(tmp_path / "checkpoints" / "step-4.safetensors")[0]["0.weight"], seen[2])
    assert torch.equal(load_file(tmp_path / "model" / "weights.safetensors")["0.weight"], task.model[0].weight)  # after trying others
    assert figures == {"odd": 3.0} and json.loads((tmp_path / "result.json").read_text())["weights"] == "last"
    other = Worse()
    with pytest.raises(TrainError, match="watch names 'even', but validation gives odd"):
        train(other, replace(CONFIG, validate_every=2, keep_best=2, watch="even"), tmp_path / "other")
    assert not other.heard


def test_trying_other_weights_leaves_the_last_ones(tmp_path: Path) -> None:
    plain, tried = Line(), Line()
    train(plain, replace(CONFIG, validate_every=3), tmp_path / "plain")
    train(tried, replace(CONFIG, validate_every=3, keep_best=2), tmp_path / "tried")
    assert equal(plain.model, tried.model)


def test_the_mean_of_weights(tmp_path: Path) -> None:
    for i in range(3):
        write_weights(tmp_path / f"{i}.safetensors", {"w": torch.full((2,), float(i)), "n": torch.tensor(i)})
    mean = mean_weights([tmp_path / f"{i}.safetensors" for i in range(3)])
    assert mean["w"].tolist() == [1.0, 1.0] and mean["n"].item() == 2


def test_the_average_is_used_and_put_back() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    average = Average([parameter], 0.5)
    for step in range(200):
        parameter.data.fill_(float(step % 2))
        average.update(step)
    assert 0.6 < float(average.values[0][0]) < 0.7  # 1/2 of the last (1) + 1/4 of the one before (0) + ...
    with pytest.raises(KeyError), average.used():
        assert torch.equal(parameter, average.values[0])
        raise KeyError
    assert parameter.tolist() == [1.0, 1.0]
    with Average([parameter], 0.0).used():
        assert parameter.tolist() == [1.0, 1.0]


def test_a_finished_run_is_not_trained_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = train(Line(), CONFIG, tmp_path)
    again = Line()
    assert train(again, CONFIG, tmp_path) == figures and again.heard == []
    assert f"{tmp_path} is finished: its model is {tmp_path / 'model'}\n" in (said := capsys.readouterr().err) and "goes on" not in said
    train(Line(), replace(CONFIG, steps=11), tmp_path)
    assert f"{tmp_path} goes on at update 10, epoch 2\n" in capsys.readouterr().err


def test_of_equal_figures_the_newer_weights_are_kept(tmp_path: Path) -> None:
    class Flat(Line):
        def validate(self, rank: int, world: int) -> Mapping[str, Ratio]:
            return {"WER": Ratio(100.0, 1.0)}

    train(Flat(), replace(CONFIG, validate_every=2, keep_best=2), tmp_path)
    assert sorted(path.stem for path in (tmp_path / "checkpoints").iterdir()) == ["step-6", "step-8"]


@pytest.mark.parametrize("name", ["epochs", "steps", "seconds"])
def test_a_run_without_an_end_above_zero_is_refused_at_once(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is -1, expected > 0"):
        replace(CONFIG, **{name: -1})


def test_nan_stops_with_the_batch_on_disk(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"update 1, epoch 0: the losses are error nan.*the batch is in .*lower the learning rate"):
        train(Line(poison=11), CONFIG, tmp_path)
    tensors, note = read_weights(next(tmp_path.glob("not-finite-1-0.safetensors")))
    assert note["ids"] == [str(i) for i in range(8, 16)] and tensors["0.x"].shape == (8, 1)


def test_a_state_of_another_model_is_refused(tmp_path: Path) -> None:
    train(Line(), CONFIG, tmp_path)
    other = Line()
    other.model = nn.Sequential(nn.Linear(1, 4), nn.Dropout(0.1), nn.Linear(4, 1))
    with pytest.raises(TrainError, match=r"was saved by another configuration \(the weights are of another model: 0.bias"):
        train(other, CONFIG, tmp_path)


def test_a_damaged_state_is_said(tmp_path: Path) -> None:
    train(Line(), CONFIG, tmp_path)
    (tmp_path / STATE).write_bytes((tmp_path / STATE).read_bytes()[:100])
    with pytest.raises(TrainError, match=r"state\.safetensors: cannot be read"):
        train(Line(), CONFIG, tmp_path)


def test_no_room_is_said_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 100})())
    task = Line()
    with pytest.raises(TrainError, match=r"0 MB are free, checkpoints need 1 MB"):
        train(task, CONFIG, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainError, match="cannot be written"):
        train(task, CONFIG, tmp_path / "file" / "run")
    assert task.heard == []


def test_a_run_without_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="a run needs an end: epochs, steps or seconds"):
        train(Line(), replace(CONFIG, steps=None), tmp_path)


def test_the_time_budget_ends_the_run(tmp_path: Path) -> None:
    task = Line()
    train(task, replace(CONFIG, steps=None, seconds=0.2), tmp_path)
    assert (tmp_path / "model" / "note").is_file() and 0 < len(task.heard) < 10**5


def test_epochs_end_the_run(tmp_path: Path) -> None:
    task = Line()
    train(task, replace(CONFIG, steps=None, epochs=2.5), tmp_path)
    assert len(task.heard) == 10
    assert load_file(tmp_path / "model" / "weights.safetensors").keys() == task.model.state_dict().keys()


def test_norms_biases_and_embeddings_do_not_decay_and_frozen_stay_out() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 1), nn.Embedding(5, 2))
    model[0].weight.requires_grad_(False)
    optimizer = adamw({"head": model[2], "body": model}, {"head": 1.0, "body": 0.1}, weight_decay=0.3)
    found = {(g["name"], g["weight_decay"]): sum(p.numel() for p in g["params"]) for g in optimizer.param_groups}
    assert found == {("head", 0.3): 3, ("head", 0.0): 1, ("body", 0.0): 3 + 3 + 3 + 10}
    assert set_rates(optimizer, 0.5) == {"head": 0.5, "body": 0.05}
    with pytest.raises(ValueError, match=r"\['tail'\] have no learning rate"):
        adamw({"tail": model}, {"head": 1.0}, weight_decay=0.0)


def test_a_group_learns_in_its_epochs_only(tmp_path: Path) -> None:
    def body(until: float) -> Tensor:
        task = Line()
        config = replace(CONFIG, steps=None, epochs=until, learns={"body": (1.0, 2.0)})  # four updates an epoch
        train(task, config, tmp_path / str(until))
        return task.model[0].weight.detach().clone()

    start = Line().model[0].weight
    one, two, three = body(1.0), body(2.0), body(3.0)
    assert torch.equal(one, start) and not torch.equal(two, start)
    assert torch.equal(body(1.75), body(1.75)) and not torch.equal(three, start)
    task = Line()
    train(task, replace(CONFIG, steps=None, epochs=3.0, learns={"body": (5.0, 6.0)}), tmp_path / "never")
    assert torch.equal(task.model[0].weight, start)
    with pytest.raises(ValueError, match="learns names tail, which have no learning rate: they are body, head"):
        replace(CONFIG, learns={"tail": (0.0, 1.0)})


def test_rates_warm_up_and_decay() -> None:
    cosine, linear, constant = (WarmUp(10, then, 0.1) for then in ("cosine", "linear", "constant"))  # type: ignore[arg-type]
    assert cosine.share(0, 0.0) == pytest.approx(0.1) and cosine.share(9, 0.0) == cosine.share(10, 0.0) == 1.0
    assert cosine.share(99, 0.5) == pytest.approx(0.55) == linear.share(99, 0.5)
    assert linear.share(3, 0.05) == pytest.approx(0.4 * 0.955)  # of 80 updates: the warm-up is as long as it says
    assert linear.share(1, 0.5) == pytest.approx(0.55)  # of 4 updates: not all of them are warm-up
    assert cosine.share(99, 1.0) == cosine.share(99, 2.0) == pytest.approx(0.1) and constant.share(99, 1.0) == 1.0


def test_the_one_cycle_of_the_paper() -> None:
    cycle = Piecewise()
    assert [cycle.share(0, x) for x in (0.0, 0.225, 0.45, 0.675, 0.9, 1.0, 1.5)] == pytest.approx(
        [0.01, 0.505, 1, 0.505, 0.01, 0.001, 0.001]
    )
    with pytest.raises(ValueError, match="rising numbers from 0 to 1"):
        Piecewise(((0.0, 1.0), (0.5, 0.0)))
