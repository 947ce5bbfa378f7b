"""Tracing leaves a model that caches in its forward pass as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from attnopt.compiler.intake.loaded import Loaded
from attnopt.compiler.trace import trace
from attnopt.compiler.untouched import untouched


class Caching(nn.Module):
    """Keeps what it computed in a buffer and in attributes, as position biases are kept."""

    seen: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("seen", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.seen is None:
            self.seen = torch.arange(x.shape[-1]) * 0.5
            self.linear.last = self.seen
        made: Tensor = self.linear(x) + self.seen
        return made


def test_a_traced_model_runs_as_before() -> None:
    model, x = Caching().eval(), torch.randn(3, 8)
    traced = trace(Loaded(model, None, (x,), {}, "caching", "module"))
    assert model.seen is None and not hasattr(model.linear, "last")
    assert type(model(x)) is Tensor
    assert torch.equal(traced(x), model(x))


def test_what_a_failing_block_set_is_undone() -> None:
    model = Caching()
    weight = model.linear.weight
    with pytest.raises(KeyError), untouched(model):
        model.linear.weight = nn.Parameter(torch.zeros(8, 8))
        del model.linear.bias
        model.extra = nn.Linear(2, 2)
        raise KeyError
    assert model.linear.weight is weight and model.linear.bias is not None
    assert not hasattr(model, "extra") and list(model._modules) == ["linear"]
