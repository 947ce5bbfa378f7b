"""What attnopt does on the CPU it does on a device beside it: no tensor of the one meets one of the
other, and what comes out is the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from attnopt.compiler.contract import Notes, Pass, passes, read_pass
from attnopt.compiler.decode import derive
from attnopt.compiler.decode.generate import Generation, generate
from attnopt.compiler.device import CPU, Carried
from attnopt.compiler.healing.checkpoint import Checkpoint
from attnopt.compiler.healing.heal import Healed, heal
from attnopt.compiler.healing.settings import Settings
from attnopt.compiler.intake.source import from_module
from attnopt.compiler.pipeline import apply_pass, read
from attnopt.compiler.program import Batch, Program
from tests.device import twin
from tests.families import FAMILIES
from tests.tolerance import assert_close

DECODERS = ("llama", "gpt2")
KINDS = (*DECODERS, "bert", "vit")
FITTED = ("llama", "gpt2", "bert")
LINES = {"sliding_window": "sliding_window{left=4 sink=2}"}  # for sequences as short as these
IDLE = {"cpu_dtype", "generate_kernel", "refit", "toeplitz_bias", "unpad"}  # at all of them
OFF = {  # passes that find nothing to do at one of them
    "llama": {"prune_heads", "route_heads", "share_kv_layers"},
    "gpt2": {"fold_repeated_kv"},
    "bert": {"fold_repeated_kv", "fuse_blocks"},
}
ROWS, LENGTH = 2, 12


@pytest.fixture(scope="module")
def there() -> torch.device:
    """The device beside the CPU."""
    return torch.device(twin(), 0)


@cache
def model(kind: str) -> Program:
    """A tiny model of a family, on the CPU."""
    family = next(family for family in FAMILIES if family.name == kind)
    torch.manual_seed(0)
    return read(from_module(family.build(family.spellings[0]), family.inputs(ROWS, LENGTH)))


@cache
def batches(kind: str, count: int) -> tuple[Batch, ...]:
    """Batches of a family's inputs."""
    family = next(family for family in FAMILIES if family.name == kind)
    torch.manual_seed(1)
    made = [family.inputs(ROWS, LENGTH) for _ in range(count)]
    masks = [each.get("attention_mask") for each in made]
    return tuple(
        Batch((), each, None if mask is None else mask.bool())
        for each, mask in zip(made, masks, strict=True)
    )


def on_cpu(value: Any) -> Any:
    """Outputs on the CPU."""
    return pytree.tree_map_only(Tensor, Tensor.cpu, value)


def notes(kind: str, device: torch.device) -> Notes:
    """Notes of a model with its data, both on a device."""
    data = [batch.to(device) for batch in batches(kind, 6)]
    return Notes(model(kind).to(device), data[:4], data[4:])


def test_the_device_refuses_what_a_gpu_would(there: torch.device) -> None:
    ours, cpu = torch.ones(2, 3, device=there), torch.ones(2, 3)
    assert ours.device == there
    for mixed in (lambda: ours + cpu, lambda: ours @ cpu.T, lambda: torch.where(cpu > 0, ours, 0)):
        with pytest.raises(RuntimeError, match="same device"):
            mixed()


@pytest.mark.parametrize("kind", KINDS)
def test_a_program_moves_and_comes_back(kind: str, there: torch.device) -> None:
    home, batch = model(kind), batches(kind, 1)[0]
    away = home.to(there)
    made = away.run(batch.to(there))
    assert all(leaf.device == there for leaf in pytree.tree_leaves(made))
    assert away.device == there and home.device == CPU and away.sites == home.sites
    back = away.to(CPU)
    assert back.device == CPU and back.example.kwargs.keys() == home.example.kwargs.keys()
    for found in (on_cpu(made), back.run(batch)):
        pytree.tree_map(assert_close, found, home.run(batch))


def test_what_shares_memory_shares_it_there(there: torch.device) -> None:
    carried, weight = Carried(there), torch.randn(3, 4)
    made = carried(weight)
    assert made.device == there and carried(nn.Parameter(weight)) is made
    assert carried(weight.T) is not made and carried(made) is not weight


@pytest.mark.parametrize("kind", FITTED)
@pytest.mark.parametrize("name", sorted(passes().keys() - {"heal"} - IDLE))
def test_a_pass_does_the_same_on_both(name: str, kind: str, there: torch.device) -> None:
    rewrite, batch = read_pass(LINES.get(name, name)), batches(kind, 6)[5]
    (here, said), (away, told) = (_applied(rewrite, notes(kind, device)) for device in (CPU, there))
    assert [(o.target, o.applied, o.reason) for o in told] == [
        (o.target, o.applied, o.reason) for o in said
    ]
    assert any(o.applied for o in told) == (name not in OFF[kind])
    pytree.tree_map(assert_close, on_cpu(away.run(batch.to(there))), here.run(batch))


def _applied(rewrite: Pass, known: Notes) -> tuple[Program, Sequence[Any]]:
    torch.manual_seed(0)
    return apply_pass(known.original, rewrite, ("*",), known)


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("line", ("", "merge_kv_heads", "latent_kv", "sliding_window"))
def test_a_decoder_gives_the_same_tokens(line: str, kind: str, there: torch.device) -> None:
    program = model(kind)
    if line:
        program, _ = _applied(passes()[line](), notes(kind, CPU))
    ids = batches(kind, 1)[0].kwargs["input_ids"]
    for how in (
        Generation(max_new_tokens=6),
        Generation(max_new_tokens=6, do_sample=True, top_k=5, seed=3),
    ):
        expected = generate(derive(program, check=False), ids, how)
        made = generate(derive(program.to(there)), ids.to(there), how)
        assert made.device == there and torch.equal(made.cpu(), expected)


def healed(device: torch.device, checkpoint: Checkpoint | None = None) -> Healed:
    """A healing of a merged model on a device."""
    known = notes("llama", device)
    changed, _ = _applied(passes()["merge_kv_heads"](), known)
    made = heal(
        changed, known.original, known.calibration, known.heldout,
        Settings(tokens=8 * ROWS * LENGTH, local=4 * ROWS * LENGTH, rate=0.02), checkpoint,
    )  # fmt: skip
    assert isinstance(made, Healed), made
    return made


def test_healing_trains_on_the_device_as_on_the_cpu(
    there: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("attnopt.compiler.healing.products.native_products", lambda *_: False)
    here, away = healed(CPU), healed(there)
    assert away.accepted and away.after < away.before
    assert {value.device for value in away.weights.values()} == {there}
    assert away.weights.keys() == here.weights.keys()
    assert (away.before, away.after) == pytest.approx((here.before, here.after), rel=1e-3)


class _Stopped(Exception):
    pass


def test_healing_on_the_device_goes_on_after_an_interruption(
    there: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Checkpoint(tmp_path / "healing.pt", seconds=0.0)
    saved = Checkpoint.save

    def interrupted(self: Checkpoint, state: Any) -> None:
        saved(self, state)
        if state["stage"] == 1 and state["at"] == 3:
            raise _Stopped

    with monkeypatch.context() as patched, pytest.raises(_Stopped):
        patched.setattr(Checkpoint, "save", interrupted)
        healed(there, kept)
    again = healed(there, replace(kept))
    assert again.after == healed(there).after and not kept.path.exists()  # type: ignore[union-attr]


@pytest.mark.parametrize("kind", KINDS)
def test_torch_compile_raises_graphs_of_the_device(
    kind: str, there: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[str] = []

    def uncompiled(module: nn.Module, inputs: object, config_patches: object = None) -> nn.Module:
        taken.extend(str(node.target) for node in module.graph.nodes)  # type: ignore[union-attr]
        return module

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", uncompiled)
    family = next(family for family in FAMILIES if family.name == kind)
    made = family.build(family.spellings[-1]).to(there)
    inputs = {name: x.to(there) for name, x in family.inputs(ROWS, LENGTH).items()}
    torch._dynamo.reset()
    with torch.no_grad():
        expected = made(**inputs)
        found = torch.compile(made, backend="attnopt")(**inputs)
    assert_close(found, expected)
    assert not any("softmax" in name for name in taken)
    assert found.device == there
