"""What the monitor counts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from duolect.train.monitor import flop_counter


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_gradients_of_convolutions_cost_what_the_forward_pass_did(groups: int) -> None:
    convolution = nn.Conv1d(8, 16, 3, padding=1, groups=groups)
    x = torch.randn(2, 8, 10, requires_grad=True)
    with flop_counter() as forward:
        out = convolution(x)
    products = 2 * out.numel() * (8 // groups) * 3
    assert forward.get_total_flops() == products
    with flop_counter() as both:
        convolution(x).sum().backward()
    assert both.get_total_flops() == 3 * products
