"""Which way runs an attention: the best that fits, the next where one fails, with one warning."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from triton.runtime.errors import OutOfResources

from attnopt.codegen import dispatch, ways
from attnopt.codegen.dispatch import Dispatch
from attnopt.codegen.kernel import Load
from attnopt.codegen.kernels.flash_prefill import FlashPrefill
from attnopt.codegen.target import target
from attnopt.compiler import attend
from attnopt.compiler.spec import CAUSAL, FULL, AttentionSpec, Mask
from tests.codegen.kernels.host_path import BAR, least_seconds, without_launches
from tests.tolerance import assert_close

H100 = target("h100")
CAPPED = AttentionSpec(4, 2, 32, 32, 32**-0.5, CAUSAL, softcap=5.0)


@pytest.fixture(autouse=True)
def _fresh_warnings() -> Iterator[None]:
    ways.warn.cache_clear()
    yield
    ways.warn.cache_clear()


def _inputs(spec: AttentionSpec, queries: int = 40, keys: int = 40) -> tuple[Tensor, ...]:
    return (
        torch.randn(2, spec.heads, queries, spec.head_dim),
        torch.randn(2, spec.kv_heads, keys, spec.head_dim),
        torch.randn(2, spec.kv_heads, keys, spec.v_dim),
    )


def _extras(spec: AttentionSpec, queries: int = 40) -> list[Tensor]:
    made = {"padding": torch.rand(2, queries) < 0.8, "bias": torch.randn(1, 4, queries, queries)}
    return [made[name] for name in spec.extras]


@pytest.mark.parametrize(
    "spec",
    [
        CAPPED,
        CAPPED.with_(mask=Mask("window", left=9, sink=2)),
        CAPPED.with_(softcap=0.0, extras=("padding",), fill="min"),
        CAPPED.with_(softcap=0.0, mask=FULL, extras=("bias", "padding")),
    ],
)
def test_what_would_need_a_mask_tensor_runs_on_the_generated_kernel(spec: AttentionSpec) -> None:
    run = Dispatch(spec, H100)
    inputs, extras = _inputs(spec), _extras(spec)
    got = run(*inputs, *extras)
    wide = [x.double() if x.is_floating_point() else x for x in (*inputs, *extras)]
    assert_close(got, attend.reference(wide[0], wide[1], wide[2], wide[3:], spec))
    (passed,) = run.passed.values()
    assert passed == ["scaled_dot_product_attention: it would need a mask tensor"]


def test_plain_masks_run_on_torchs_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    def unwanted(*_: Any) -> Any:
        return lambda *_: pytest.fail("not wanted", pytrace=False)

    monkeypatch.setattr(Dispatch, "_generated", unwanted)
    for mask in (FULL, CAUSAL):
        run = Dispatch(CAPPED.with_(softcap=0.0, mask=mask), H100)
        run(*_inputs(run.spec))
        assert list(run.passed.values()) == [[]]


def test_a_causal_flag_is_not_used_for_fewer_queries_than_keys() -> None:
    run = Dispatch(CAPPED.with_(softcap=0.0), H100)
    q, k, v = _inputs(run.spec, queries=7)
    assert_close(run(q, k, v), attend.reference(q, k, v, [], run.spec))
    (passed,) = run.passed.values()
    assert "as many queries as keys" in passed[0]


def test_a_kernel_that_fails_on_the_device_is_passed_over_with_one_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*_: Any) -> Any:
        def run(*_: Any) -> Tensor:
            raise OutOfResources(300000, 232448, "shared memory")

        return run

    monkeypatch.setattr(Dispatch, "_generated", fails)
    monkeypatch.setattr(dispatch, "_flexible", lambda *_: dispatch.Miss("not here"))
    run = Dispatch(CAPPED, H100)
    inputs = _inputs(CAPPED)
    with pytest.warns(UserWarning, match="shared memory") as told:
        got = run(*inputs)
        run(*_inputs(CAPPED, 300, 300))
    assert len(told) == 1
    assert_close(got, attend.reference(*inputs, [], CAPPED))
    assert any("flash_prefill: out of resource" in reason for reason in run.passed.popitem()[1])


def _raising(monkeypatch: pytest.MonkeyPatch, error: Exception) -> Dispatch:
    def run(*_: Any) -> Tensor:
        raise error

    monkeypatch.setattr(Dispatch, "_generated", lambda *_: run)
    monkeypatch.setattr(dispatch, "_flexible", lambda *_: dispatch.Miss("not here"))
    return Dispatch(CAPPED, H100)


def test_what_a_compilers_pass_raises_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    run, inputs = _raising(monkeypatch, RuntimeError("PassManager::run failed")), _inputs(CAPPED)
    with pytest.warns(UserWarning, match="PassManager"):
        assert_close(run(*inputs), attend.reference(*inputs, [], CAPPED))


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, torch.AcceleratorError])
def test_what_no_other_way_would_mend_is_raised(
    monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    with pytest.raises(kind):
        _raising(monkeypatch, kind("the device"))(*_inputs(CAPPED))


def test_inputs_that_no_way_takes_are_told() -> None:
    q, k, v = _inputs(CAPPED)
    with warnings.catch_warnings(), pytest.raises((RuntimeError, ValueError)):
        warnings.simplefilter("ignore")
        Dispatch(CAPPED, H100)(q, k[..., :8], v)


def test_without_triton_torch_attends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "find_spec", lambda name: None)
    run, inputs = Dispatch(CAPPED, H100), _inputs(CAPPED)
    monkeypatch.setattr(dispatch, "_flexible", lambda *_: dispatch.Miss("not here"))
    assert_close(run(*inputs), attend.reference(*inputs, [], CAPPED))
    assert "flash_prefill: triton is not installed" in run.passed.popitem()[1]
    assert len(_learned(run, inputs, [])) == 3


def test_what_is_too_large_is_passed_over() -> None:
    miss = ways.misses(FlashPrefill, CAPPED, H100, Load(batch=70000))
    assert miss is not None and "65535" in miss.reason
    miss = dispatch._flexible(CAPPED, Load(1, 40000, 40000))
    assert isinstance(miss, dispatch.Miss)


def test_other_errors_are_not_swallowed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        def run(*_: Any) -> Tensor:
            raise KeyError("a bug")

        return run

    monkeypatch.setattr(Dispatch, "_generated", broken)
    with pytest.raises(KeyError):
        Dispatch(CAPPED, H100)(*_inputs(CAPPED))


def test_the_guard_finds_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Dispatch._generated

    def off(*given: Any) -> Any:
        run = right(*given)
        return lambda *inputs: run(*inputs) * 1.01

    monkeypatch.setattr(Dispatch, "_generated", off)
    monkeypatch.setattr(dispatch, "_flexible", lambda *_: dispatch.Miss("not here"))
    inputs = _inputs(CAPPED)
    with pytest.warns(UserWarning, match="is wrong on NVIDIA H100"):
        got = Dispatch(CAPPED, H100, check=True)(*inputs)
    assert_close(got, attend.reference(*inputs, [], CAPPED))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Dispatch(CAPPED, H100, check=False)(*inputs)


def test_a_call_takes_less_than_twenty_microseconds_beyond_its_launch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On the host, for a bucket that has had its first call. All of the path counts but what
    Triton does with the launch: the choice, the launcher with its checks of shapes, memory for the
    result (on a CPU here), the strides, and the call that hands all arguments to the kernel."""
    stubs = without_launches(monkeypatch)
    q, k, v = _inputs(CAPPED)
    run = Dispatch(CAPPED, H100)
    least = least_seconds(lambda: run(q, k, v))
    assert stubs["flash_prefill._flash_prefill"].calls > 8000
    assert least < BAR


def _learned(run: Dispatch, inputs: tuple[Tensor, ...], extras: list[Tensor]) -> list[Tensor]:
    """Gradients of a sum of squares to every floating-point input."""
    given = [x.detach().requires_grad_(x.is_floating_point()) for x in (*inputs, *extras)]
    run(*given).square().sum().backward()
    return [x.grad for x in given if x.grad is not None]


@pytest.mark.parametrize(
    "spec", [CAPPED, CAPPED.with_(softcap=0.0, mask=FULL, extras=("bias", "padding"))], ids=str
)
def test_gradients_come_from_the_generated_kernels(spec: AttentionSpec) -> None:
    run = Dispatch(spec, H100)
    inputs, extras = _inputs(spec), _extras(spec)
    with torch.no_grad():
        run(*inputs, *extras)
    got = _learned(run, inputs, extras)
    wide = [x.double().requires_grad_() if x.is_floating_point() else x for x in (*inputs, *extras)]
    attend.reference(wide[0], wide[1], wide[2], wide[3:], spec).square().sum().backward()
    wanted = [x.grad for x in wide if x.grad is not None]
    for x, y in zip(got, wanted, strict=True):
        assert_close(x / y.abs().max(), y / y.abs().max())
    unlearned, learned = run.passed.values()
    assert unlearned == learned and len(run._ways) == 2


def test_where_there_is_no_backward_kernel_torch_differentiates() -> None:
    spec = CAPPED.with_(softcap=0.0, mask=FULL, extras=("padding",))
    run = Dispatch(spec, target("t4"))
    assert len(_learned(run, _inputs(spec), _extras(spec))) == 3
    ((_, generated, flexible),) = run.passed.values()
    assert generated.startswith("flash_prefill: its gradients: Triton has no matrix units on")
    assert flexible.startswith("FlexAttention: it is not used")


def test_a_way_without_gradients_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = CAPPED.with_(softcap=0.0, mask=FULL, extras=("padding",))
    run = Dispatch(spec, H100)
    bare = run._generated(Load(2, 40, 40, "float32"), False)
    assert not isinstance(bare, dispatch.Miss)
    without = torch.no_grad()(bare)
    monkeypatch.setattr(Dispatch, "_generated", lambda *_: without)
    assert len(_learned(run, _inputs(spec), _extras(spec))) == 3
    assert "flash_prefill: it gives no gradients" in run.passed.popitem()[1]


def test_a_backward_kernel_that_fails_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise OutOfResources(300000, 232448, "shared memory")

    monkeypatch.setattr("attnopt.codegen.flash_attention.flash_prefill_backward", fails)
    spec = CAPPED.with_(softcap=0.0, mask=FULL, extras=("padding",))
    run = Dispatch(spec, H100)
    with pytest.warns(UserWarning, match="flash_prefill failed on NVIDIA H100"):
        assert len(_learned(run, _inputs(spec), _extras(spec))) == 3


def test_gradients_under_a_checkpoint() -> None:
    """What is tried at first is not what the checkpoint computes again."""
    run = Dispatch(CAPPED, H100)
    given = [x.requires_grad_() for x in _inputs(CAPPED)]
    checkpoint(run, *given, use_reentrant=False).sum().backward()
    again = [x.detach().requires_grad_() for x in given]
    run(*again).sum().backward()
    for x, y in zip(given, again, strict=True):
        assert x.grad is not None and y.grad is not None and torch.equal(x.grad, y.grad)
