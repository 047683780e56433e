"""The training loop: it learns, resumes to the bit, stops on NaN, keeps its time budget; the optimizer's groups and rates."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from duolect.train.loop import Average, Loss, Task, TrainConfig, TrainError, train
from duolect.train.optim import adamw, rate_share, set_rates

CONFIG = TrainConfig(steps=10, learning_rates={"body": 0.01, "head": 0.1}, warmup_steps=2, log_every=5, validate_every=5, save_every=5)


class Line(Task[int]):
    """y = 3 x by two linear layers with dropout between."""

    def __init__(self, *, poison: int | None = None) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.1), nn.Linear(8, 1))
        self.poison, self.heard = poison, []

    def groups(self) -> Mapping[str, nn.Module]:
        return {"head": self.model[2], "body": self.model}

    def plan(self, epoch: int) -> Sequence[int]:
        return [epoch * 10 + i for i in range(4)]

    def loss(self, batch: int, epoch: int) -> Loss:
        self.heard.append(batch)
        x = torch.linspace(-1, 1, 16)[:, None] + batch % 10 / 100
        error = (self.model(x) - 3 * x).square().sum()
        return Loss(error * (torch.nan if batch == self.poison else 1.0), 16, 1.6)

    def validate(self) -> Mapping[str, float]:
        assert not self.model.training and not torch.is_grad_enabled()
        return {"error": float((self.model(torch.ones(1, 1)) - 3).abs())}

    def save(self, folder: Path, *, note: str) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "note").write_text(note)


def test_it_learns_and_writes_what_it_did(tmp_path: Path) -> None:
    task = Line()
    before = task.model(torch.ones(1, 1)).item()
    figures = train(task, replace(CONFIG, steps=200), tmp_path)
    assert figures["error"] < 0.3 < abs(before - 3)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 40 and losses[-1] < losses[0] / 10
    assert {"step", "epoch", "lr", "grad_norm", "audio_per_second"} <= lines[0].keys()
    assert (tmp_path / "model" / "note").read_text().startswith("step 200")


@pytest.mark.parametrize("average", [0.0, 0.9])
def test_five_and_five_more_are_ten(tmp_path: Path, average: float) -> None:
    straight, first, second, config = Line(), Line(), Line(), replace(CONFIG, average=average)
    expected = train(straight, config, tmp_path / "straight")

    def broken_off(batch: int, epoch: int) -> Loss:
        if len(first.heard) == 7:
            raise KeyboardInterrupt
        return Line.loss(first, batch, epoch)

    first.loss = broken_off  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        train(first, config, tmp_path / "resumed")
    assert train(second, config, tmp_path / "resumed") == expected
    assert first.heard[:5] + second.heard == straight.heard == [0, 1, 2, 3, 10, 11, 12, 13, 20, 21]
    for a, b in zip(straight.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


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


def test_a_finished_run_is_not_trained_on(tmp_path: Path) -> None:
    train(Line(), CONFIG, tmp_path)
    again = Line()
    train(again, CONFIG, tmp_path)
    assert again.heard == []


def test_nan_stops_with_place_and_advice(tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"step 5: the loss is nan.*epoch 1, batch 1; lower the learning rate"):
        train(Line(poison=11), CONFIG, tmp_path)


def test_a_state_of_another_model_is_refused(tmp_path: Path) -> None:
    train(Line(), CONFIG, tmp_path)
    other = Line()
    other.model = nn.Sequential(nn.Linear(1, 4), nn.Dropout(0.1), nn.Linear(4, 1))
    with pytest.raises(TrainError, match="was saved by another configuration"):
        train(other, CONFIG, tmp_path)


def test_the_time_budget_ends_the_run(tmp_path: Path) -> None:
    task = Line()
    train(task, replace(CONFIG, steps=10**9, seconds=0.2), tmp_path)
    assert (tmp_path / "model" / "note").is_file() and 0 < len(task.heard) < 10**5


def test_norms_and_biases_do_not_decay_and_frozen_stay_out() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 1))
    model[0].weight.requires_grad_(False)
    optimizer = adamw({"head": model[2], "body": model}, {"head": 1.0, "body": 0.1}, weight_decay=0.3)
    found = {(g["name"], g["weight_decay"]): sum(p.numel() for p in g["params"]) for g in optimizer.param_groups}
    assert found == {("head", 0.3): 3, ("head", 0.0): 1, ("body", 0.0): 3 + 3 + 3}
    assert set_rates(optimizer, 0.5) == {"head": 0.5, "body": 0.05}
    with pytest.raises(ValueError, match=r"\['tail'\] have no learning rate"):
        adamw({"tail": model}, {"head": 1.0}, weight_decay=0.0)


def test_rates_warm_up_and_decay() -> None:
    def share(step: int, progress: float, decay: str = "cosine") -> float:
        return rate_share(step, progress, warmup_steps=10, decay=decay, final_share=0.1)  # type: ignore[arg-type]

    assert share(0, 0.0) == pytest.approx(0.1) and share(9, 0.0) == share(10, 0.0) == 1.0
    assert share(99, 0.5) == pytest.approx(0.55) == share(99, 0.5, "linear")
    assert share(99, 1.0) == share(99, 2.0) == pytest.approx(0.1) and share(99, 1.0, "constant") == 1.0
