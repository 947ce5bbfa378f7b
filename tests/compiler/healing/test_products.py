"""Healing multiplies in bfloat16 where the CPU has it and rounding is far below what is to heal;
what decides is computed in float32 all the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attnopt.compiler.contract import Notes, read_pass
from attnopt.compiler.healing import products
from attnopt.compiler.healing.checkpoint import Checkpoint
from attnopt.compiler.healing.heal import Healed, Healing, heal, start
from attnopt.compiler.healing.settings import Settings
from attnopt.compiler.pipeline import apply_pass
from attnopt.compiler.program import Program
from tests.compiler.healing.test_heal import (
    HELDOUT,
    QUICK,
    TRAINING,
    divergence,
    merged,
    with_weights,
)
from tests.decoder import decoder


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that multiplies bfloat16."""
    monkeypatch.setattr(products, "cpu_flags", lambda: frozenset({"avx512_bf16"}))


def begun(program: Program, settings: Settings = QUICK) -> Healing:
    made = start(program, decoder(), TRAINING, HELDOUT, settings)
    assert isinstance(made, Healing)
    return made


class _Dtypes(TorchDispatchMode):
    """The dtypes that matrix products run in."""

    def __init__(self) -> None:
        super().__init__()
        self.found = set[torch.dtype]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        made = func(*args, **(kwargs or {}))
        if func.__name__.split(".")[0] in ("mm", "addmm", "bmm"):
            self.found.add(made.dtype)
        return made


def test_a_step_multiplies_in_bfloat16_and_the_judge_in_float32(native: None) -> None:
    healing = begun(merged())
    assert healing.products.narrow
    with _Dtypes() as judging:
        healing.judge()
    assert judging.found == {torch.float32}
    optimizer = torch.optim.SGD(healing.factors.groups(list(healing.factors.base)), lr=0.0)
    with _Dtypes() as training:
        healing.step(optimizer, 0, 1)
    assert torch.bfloat16 in training.found


def test_what_is_trained_so_is_as_good(native: None, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = heal(merged(), decoder(), TRAINING, HELDOUT, QUICK)
    monkeypatch.setattr(products, "cpu_flags", frozenset)
    exact = heal(merged(), decoder(), TRAINING, HELDOUT, QUICK)
    assert isinstance(fast, Healed) and isinstance(exact, Healed)
    assert fast.narrow and not exact.narrow
    assert all(weight.dtype == torch.float32 for weight in fast.weights.values())
    assert fast.before == exact.before
    assert fast.after == pytest.approx(exact.after, rel=0.05)
    after = divergence(with_weights(merged(), dict(fast.weights)))
    assert fast.after == pytest.approx(after, rel=1e-4)


def test_a_program_that_is_almost_right_is_healed_in_float32(native: None) -> None:
    program = decoder()
    name = next(n for n, _ in program.module.named_parameters() if "o_proj" in n or "out" in n)
    near = with_weights(program, {name: program.weight(name).detach() * 1.0001})
    assert not begun(near).products.narrow


def test_without_instructions_it_stays_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "cpu_flags", frozenset)
    assert not begun(merged()).products.narrow


def test_an_operator_that_takes_no_two_dtypes_is_no_failure(
    native: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(form: object, *given: object) -> object:
        if torch.is_autocast_enabled("cpu"):
            raise NotImplementedError  # without a message, as torch has some
        return plain(form, *given)

    plain = products.Working.__call__
    monkeypatch.setattr(products.Working, "__call__", refuses)
    assert not begun(merged()).products.narrow


def test_one_interrupted_in_another_arithmetic_begins_anew(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    keys = set[str]()
    for flags in (frozenset({"avx512_bf16"}), frozenset[str]()):
        monkeypatch.setattr(products, "cpu_flags", lambda flags=flags: flags)
        saved = Checkpoint(tmp_path / "healing.pt")
        made = start(merged(), decoder(), TRAINING, HELDOUT, QUICK, saved)
        assert isinstance(made, Healing)
        keys.add(made.checkpoint.key)
    assert len(keys) == 2


def test_the_note_tells_of_it(native: None) -> None:
    original = decoder()
    notes = Notes(original, TRAINING, HELDOUT)
    rewrite = read_pass("heal{tokens=1000 local=0}")
    _, (outcome,) = apply_pass(merged(), rewrite, ("*",), notes)
    assert "bfloat16" in outcome.note
