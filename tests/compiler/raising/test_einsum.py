"""Attention written with einsum: any order of axes is raised and equal, a mixture of heads is
not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from attnopt.compiler.intake.loaded import Loaded
from attnopt.compiler.program import Program
from attnopt.compiler.raising import raise_program
from attnopt.compiler.trace import trace
from tests.tolerance import assert_close

ORDERS = {  # how q, k and v are laid out from [b, s, h, d], the scores, the product with values
    "heads first": ("bhsd", "bhtd", "bhsd,bhtd->bhst", "bhst,bhtd->bhsd"),
    "heads last": ("bshd", "bthd", "bshd,bthd->bhst", "bhst,bthd->bshd"),
    "length first": ("sbhd", "tbhd", "sbhd,tbhd->bhst", "bhst,tbhd->sbhd"),
    "values first": ("bhsd", "bhtd", "bhsd,bhtd->bhst", "bhtd,bhst->bhsd"),
    "an ellipsis": ("bhsd", "bhtd", "...sd,...td->...st", "...st,...td->...sd"),
    "one key head": ("bhsd", "btd", "bhsd,btd->bhst", "bhst,btd->bhsd"),
}


class Spelled(nn.Module):
    def __init__(self, order: tuple[str, str, str, str], mixed: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(32, 32) for _ in range(3))
        self.out, self.order = nn.Linear(32, 32), order
        self.mix = nn.Parameter(torch.randn(4, 4)) if mixed else None

    def forward(self, x: Tensor) -> Tensor:
        mine, theirs, scores, product = self.order
        q, k, v = (layer(x).unflatten(2, (4, 8)) for layer in (self.q, self.k, self.v))
        q = q.permute(*("bshd".index(letter) for letter in mine))
        k, v = ((y[:, :, 0] if len(theirs) == 3 else y) for y in (k, v))
        whole = "btd" if len(theirs) == 3 else "bthd"
        k, v = (y.permute(*(whole.index(letter) for letter in theirs)) for y in (k, v))
        weights = (torch.einsum(scores, q, k) * 8**-0.5).softmax(-1)
        if self.mix is not None:
            weights = torch.einsum("bhst,hg->bgst", weights, self.mix)
        y = torch.einsum(product, weights, v) if product[:4] != "bhtd" else torch.einsum(
            product, v, weights)  # fmt: skip
        made = product.partition("->")[2].replace("...", "bh")
        y = y.permute(*(made.index(letter) for letter in "bshd"))
        return x + self.out(y.flatten(2))


def _raised(model: nn.Module) -> Program:
    inputs = {"x": torch.randn(2, 9, 32)}
    return raise_program(trace(Loaded(model.eval(), None, (), inputs, "einsum", "callable")))


@pytest.mark.parametrize("name", ORDERS)
def test_any_order_of_axes_is_raised_and_equal(name: str) -> None:
    model = Spelled(ORDERS[name])
    program = _raised(model)
    (site,) = program.sites
    assert (site.spec.heads, site.kv_heads) == (4, 1 if name == "one key head" else 4)
    assert site.q is not None and site.spelling == "eager"
    for shape in ((2, 9), (3, 14)):
        x = torch.randn(*shape, 32)
        with torch.no_grad():
            assert_close(program(x=x), model(x), f"{name} at {shape}")


def test_a_mixture_of_heads_is_told() -> None:
    program = _raised(Spelled(ORDERS["heads first"], mixed=True))
    assert not program.sites
    assert "mixes the heads' weights" in program.unraised[0].reason
