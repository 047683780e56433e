"""The optimizer and its learning rate over time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import nn

Decay = Literal["cosine", "linear", "constant"]


def adamw(groups: Mapping[str, nn.Module], rates: Mapping[str, float], *, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over the trainable parameters of named modules, each with the peak rate of its name; no decay on norms and biases.

    A parameter of two groups belongs to the first. Raises ValueError if a group has no rate.
    """
    if missing := groups.keys() - rates.keys():
        raise ValueError(f"parameter groups {sorted(missing)} have no learning rate; rates are given for {sorted(rates)}")
    seen: set[int] = set()
    parts = []
    for name, module in groups.items():
        own = [p for p in module.parameters() if p.requires_grad and id(p) not in seen]
        seen |= {id(p) for p in own}
        for decay, chosen in ((weight_decay, [p for p in own if p.ndim > 1]), (0.0, [p for p in own if p.ndim <= 1])):
            if chosen:
                parts.append({"params": chosen, "peak": rates[name], "lr": 0.0, "weight_decay": decay, "name": name})
    return torch.optim.AdamW(parts, betas=(0.9, 0.98), eps=1e-8)


def rate_share(step: int, progress: float, *, warmup_steps: int, decay: Decay, final_share: float) -> float:
    """The share of the peak rate at a step (0-based) and a progress 0..1 of the whole run: linear warm-up, then decay to final_share."""
    progress = min(1.0, max(0.0, progress))
    shape = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress, "constant": 1.0}[decay]
    return min(1.0, (step + 1) / max(1, warmup_steps)) * (final_share + (1 - final_share) * shape)


def set_rates(optimizer: torch.optim.Optimizer, share: float) -> dict[str, float]:
    """Sets each group to its share of its peak; the rates by group name."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * share
    return {group["name"]: group["lr"] for group in optimizer.param_groups}
