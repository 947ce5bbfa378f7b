"""fuse_attention: the fused backend gives what the reference gives, under every mask; soft caps
stay.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attnopt.compiler import attend
from attnopt.compiler.contract import Edit, Miss, Notes, passes, read_pass
from attnopt.compiler.program import peek
from attnopt.compiler.spec import CAUSAL, FULL, AttentionSpec, Mask
from tests.programs import one_attention
from tests.tolerance import assert_close

SPEC = AttentionSpec(6, 2, head_dim=5, v_dim=7, scale=0.3, mask=CAUSAL)


def answer(spec: AttentionSpec) -> Edit | Miss:
    program = one_attention(spec)
    return read_pass("fuse_attention{}").rewrite(program.sites[0], program, Notes(program))


def test_fires_and_changes_the_backend_alone() -> None:
    edit = answer(SPEC)
    assert isinstance(edit, Edit)
    assert edit.spec == SPEC.with_(backend="sdpa")


@pytest.mark.parametrize(
    ("change", "reason"), [({"softcap": 30.0}, "soft cap"), ({"backend": "sdpa"}, "already")]
)
def test_stays_where_it_must_and_says_why(change: dict[str, float | str], reason: str) -> None:
    miss = answer(SPEC.with_(**change))
    assert isinstance(miss, Miss)
    assert reason in miss.reason


PADDINGS = {
    "real": torch.ones(2, 7, dtype=torch.bool),
    "right": torch.arange(7)[None] < torch.tensor([[7], [3]]),
    "left": torch.arange(7)[None] >= torch.tensor([[0], [3]]),
    "nothing": torch.arange(7)[None] < torch.tensor([[7], [0]]),
}


@pytest.mark.parametrize("fill", ["-inf", "min"])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("mask", [FULL, CAUSAL, Mask("window", left=3, sink=1)])
def test_equals_the_reference_under_every_mask(mask: Mask, padding: str, fill: str) -> None:
    spec = SPEC.with_(mask=mask, extras=("padding",), fill=fill)
    q, k, v = one_attention(SPEC).example.args[:3]
    extras = [PADDINGS[padding]]
    assert_close(attend.sdpa(q, k, v, extras, spec), attend.reference(q, k, v, extras, spec))


@pytest.mark.parametrize("backend", ["sdpa", "chunked"])
@pytest.mark.parametrize("fill", ["-inf", "min"])
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("mask", [FULL, CAUSAL, Mask("window", left=3, sink=1)])
def test_sinks_take_their_share(mask: Mask, padding: str, fill: str, backend: str) -> None:
    spec = SPEC.with_(mask=mask, extras=("padding", "sinks"), fill=fill)
    q, k, v = one_attention(SPEC).example.args[:3]
    extras = [PADDINGS[padding], torch.randn(6, 1, 1, dtype=q.dtype)]
    expected = attend.reference(q, k, v, extras, spec)
    assert_close(attend.BACKENDS[backend](q, k, v, extras, spec), expected)
    kept = attend.kept(q, k, extras, spec)
    assert kept is not None
    logits = q @ k.repeat_interleave(3, 1).transpose(-1, -2) * spec.scale
    lowest = torch.finfo(q.dtype).min if fill == "min" else -torch.inf
    weights = logits.masked_fill(~kept, lowest).exp()
    shares = weights / (weights.sum(-1, keepdim=True) + extras[1].exp())
    assert_close(expected, shares @ v.repeat_interleave(3, 1))


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("extra", ["padding", "bias"])
def test_a_row_without_keys_is_their_mean_in_half_precision(half: torch.dtype, extra: str) -> None:
    """Float16's lowest number does not swallow a score that is added to it in float32."""
    q, k, v = (4 * x.to(half) for x in one_attention(SPEC, seq=7).example.args[:3])
    spec = SPEC.with_(mask=FULL, extras=(extra,), fill="min")
    keep = PADDINGS["nothing"]
    lowest = torch.finfo(half).min
    bias = torch.zeros(2, 1, 1, 7, dtype=half).masked_fill(~keep[:, None, None, :], lowest)
    made = attend.sdpa(q, k, v, [keep if extra == "padding" else bias], spec)
    expected = v.float().mean(2, keepdim=True).repeat_interleave(SPEC.group, 1)
    torch.testing.assert_close(made[1].float(), expected[1].expand_as(made[1]), rtol=0, atol=0.05)


def test_a_padding_that_drops_nothing_is_not_traced_away() -> None:
    """The shortcut for whole batches is for eager runs: an exported program must read its
    padding.
    """
    spec = SPEC.with_(extras=("padding",))
    q, k, v = one_attention(SPEC).example.args[:3]

    class Call(torch.nn.Module):
        def forward(self, padding: Tensor) -> Tensor:
            return attend.sdpa(q, k, v, [padding], spec)

    run = torch.export.export(Call(), (PADDINGS["real"],), strict=False).module()
    expected = attend.reference(q, k, v, [PADDINGS["right"]], spec)
    assert_close(run(PADDINGS["right"]), expected)


def test_reads_back_from_its_text() -> None:
    made = passes()["fuse_attention"]()
    assert read_pass(made.text) == made


class _Called(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names = list[str]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


WIDTHS = [(5, 7), (24, 16), (16, 16)]


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize(("width", "v_dim"), WIDTHS)
def test_a_cpu_runs_it_fused_whatever_the_widths_of_keys_and_values(
    width: int, v_dim: int, padding: str | None
) -> None:
    extras = [PADDINGS[padding]] if padding else []
    spec = SPEC.with_(head_dim=width, v_dim=v_dim, extras=("padding",) if padding else ())
    q, k, v = one_attention(spec.with_(extras=())).example.args[:3]
    with _Called() as called:
        made = attend.sdpa(q, k, v, extras, spec)
    assert any("flash_attention_for_cpu" in name for name in called.names), called.names
    assert_close(made, attend.reference(q, k, v, extras, spec))
    one = attend.sdpa(q[:, :, -1:], k, v, extras, spec.with_(mask=FULL))
    assert_close(one, attend.reference(q[:, :, -1:], k, v, extras, spec.with_(mask=FULL)))


@pytest.mark.parametrize("fill", ["-inf", "min"])
@pytest.mark.parametrize("padding", [None, *PADDINGS])
@pytest.mark.parametrize(("width", "v_dim"), WIDTHS)
def test_gradients_are_those_of_the_reference(
    width: int, v_dim: int, padding: str | None, fill: str
) -> None:
    extras = [PADDINGS[padding]] if padding else []
    names = ("padding",) if padding else ()
    spec = SPEC.with_(head_dim=width, v_dim=v_dim, extras=names, fill=fill)
    operands = [x.requires_grad_() for x in one_attention(spec.with_(extras=())).example.args[:3]]
    q, k, v = operands
    out = attend.sdpa(q, k, v, extras, spec)
    towards = torch.randn_like(out)
    kept = attend.kept(q, k, extras, spec)
    assert kept is not None
    towards = towards * kept.any(-1, keepdim=True)  # rows that read no key are padding
    found = torch.autograd.grad(out, operands, towards)
    exact = attend.reference(q, k, v, extras, spec)
    for name, mine, theirs in zip(
        "qkv", found, torch.autograd.grad(exact, operands, towards), strict=True
    ):
        assert_close(mine, theirs, name)


@pytest.mark.parametrize(
    ("spec", "run"),
    [
        (SPEC, "flash_attention_for_cpu"),
        (SPEC.with_(softcap=30.0), "tanh"),
        (SPEC.with_(mask=Mask("window", left=3), backend="chunked"), "constant_pad"),
    ],
)
def test_what_is_recorded_runs_on_the_best_backend_there_is(spec: AttentionSpec, run: str) -> None:
    program = one_attention(spec)
    (node,) = program.attentions()
    with _Called() as called:
        found = peek(program, [node.name], program.example)[node.name]
    assert any(run in name for name in called.names), called.names
    assert_close(found, attend.reference(*program.example.args, spec))


def test_a_float64_model_and_shapes_alone_pass_under_autocast() -> None:
    spec = SPEC.with_(extras=("padding",), fill="min")
    q, k, v = one_attention(SPEC).example.args[:3]
    extras = [PADDINGS["left"]]
    with torch.autocast("cpu", torch.bfloat16):
        made = attend.sdpa(q, k, v, extras, spec)
    assert_close(made, attend.reference(q, k, v, extras, spec))
    q, k, v = (x.to("meta") for x in (q, k, v))
    assert attend.sdpa(q, k, v, [extras[0].to("meta")], spec).shape == made.shape


@pytest.mark.parametrize("padding", PADDINGS)
def test_rows_that_read_no_key_stay_numbers_under_autocast(padding: str) -> None:
    spec = SPEC.with_(extras=("padding",), fill="min")
    q, k, v = (x.float() for x in one_attention(SPEC).example.args[:3])
    extras = [PADDINGS[padding]]
    with torch.autocast("cpu", torch.bfloat16):
        made = attend.sdpa(q, k, v, extras, spec)
    assert made.dtype == torch.bfloat16
    assert_close(made, attend.reference(*(x.bfloat16() for x in (q, k, v)), extras, spec))
