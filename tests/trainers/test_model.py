"""The learned scalars: precise in bf16, gathered at ZeRO-3, in the graph once."""

import pytest
import torch
from torch import nn

from trainers.model import Trained


class Doubling(nn.Module):
    def forward(self, x):
        return 2 * x


def test_nothing_learned_is_nothing_added():
    model = Trained(Doubling(), {})
    vectors, learned, auxiliary = model(torch.ones(2, 3))
    assert auxiliary.shape == (0,)
    assert vectors.tolist() == [[2, 2, 2]] * 2
    assert learned.shape == (0,)
    assert list(model.parameters()) == []
    assert model.learned_names == ()


def test_learned_scalars_come_in_order_with_gradient_and_start_unrounded_in_bf16():
    model = Trained(Doubling(), {"log_temperature": -2.6592600, "bias": -10.0}).bfloat16()
    _, learned, _ = model(torch.ones(1, 1))
    assert learned.tolist() == pytest.approx([-2.6592600, -10.0], abs=1e-6)
    learned.sum().backward()
    assert model.learned.moved.grad.tolist() == [1, 1]
