"""Low-rank adaptation of linear layers (arXiv 2106.09685), rank-stabilized where asked (arXiv 2312.03732).

Our own rather than peft's: forty lines, so that a trained folder loads with what duolect needs anyway, in names that stay plain.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from duolect.config import registered
from duolect.models import ModelError


@registered
@dataclass(frozen=True)
class Lora:
    """rank and alpha as in the paper, scaled by alpha / rank, or alpha / sqrt(rank) where `stabilized`; targets: names of linear layers,
    none for all of them (paper.md 1.8: rank 320, alpha 16, dropout 0.1, q_proj and v_proj, stabilized)."""

    rank: int = 16
    alpha: float = 16.0
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    dropout: float = 0.1
    stabilized: bool = True

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"low-rank paths of rank {self.rank} make no sense: give 1 or more")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"a dropout of {self.dropout} leaves nothing: give 0 or more, and less than 1")

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.stabilized else self.rank)


class LoraLinear(nn.Module):
    """linear(x) + scale * up(down(dropout(x))), the linear layer at rest."""

    def __init__(self, linear: nn.Linear | Conv1D, config: Lora) -> None:
        super().__init__()
        rows, columns = linear.weight.shape
        inputs, outputs = (rows, columns) if isinstance(linear, Conv1D) else (columns, rows)
        self.linear, self.scale, self.dropout = linear.requires_grad_(False), config.scale, config.dropout
        self.down = nn.Parameter(torch.empty(config.rank, inputs, dtype=linear.weight.dtype, device=linear.weight.device))
        self.up = nn.Parameter(torch.zeros(outputs, config.rank, dtype=linear.weight.dtype, device=linear.weight.device))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(F.dropout(x, self.dropout, self.training), self.down)
        return self.linear(x) + self.scale * F.linear(low, self.up)

    def change(self, up: Tensor, down: Tensor) -> Tensor:
        """What low-rank matrices add to the weight, in its layout."""
        product = self.scale * up @ down
        return product.T if isinstance(self.linear, Conv1D) else product

    @torch.no_grad()
    def merged(self) -> nn.Linear | Conv1D:
        """The linear layer with the product added to its weight."""
        self.linear.weight.add_(self.change(self.up, self.down))
        return self.linear


def add_lora(model: nn.Module, config: Lora) -> int:
    """How many linear layers of the names in `targets` were given a low-rank path; everything else of the model rests from then on.

    Raises ModelError if there is none.
    """
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    found = {name: m for name, m in linear.items() if not config.targets or name.rsplit(".", 1)[-1] in config.targets}
    if missing := sorted(set(config.targets) - {name.rsplit(".", 1)[-1] for name in found}):
        known = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linear}))
        raise ModelError(f"no linear layer of {type(model).__name__} is called {', '.join(missing)}: set lora.targets to some of {known}")
    model.requires_grad_(False)
    for name, module in found.items():
        _set(model, name, LoraLinear(module, config))
    return len(found)


def merge_lora(model: nn.Module) -> None:
    """Adds every low-rank path to the weight beside it: the model computes the same and has its old names again."""
    for name, module in [(n, m) for n, m in model.named_modules() if isinstance(m, LoraLinear)]:
        _set(model, name, module.merged())


def merged_state(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of the model with its low-rank paths merged into the weights beside them, by the names from before `add_lora`."""
    merged = dict(state)
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            change = module.change(merged.pop(f"{name}.up"), merged.pop(f"{name}.down"))
            merged[f"{name}.weight"] = merged.pop(f"{name}.linear.weight") + change
            if f"{name}.linear.bias" in merged:
                merged[f"{name}.bias"] = merged.pop(f"{name}.linear.bias")
    return merged


def _set(model: nn.Module, name: str, module: nn.Module) -> None:
    owner, _, last = name.rpartition(".")
    setattr(model.get_submodule(owner), last, module)
