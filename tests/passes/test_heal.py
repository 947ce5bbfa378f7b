"""heal: a pass that is made where it is asked for, in its place among the others."""

from __future__ import annotations

import pytest
import torch

from attnopt.autotune.order import approximate, compose, healing, ordered
from attnopt.compiler.contract import Edit, Miss, Notes, passes, read_pass
from attnopt.compiler.errors import Problem
from attnopt.compiler.pipeline import apply_pass
from attnopt.compiler.plan import Step
from attnopt.compiler.program import Batch, Program
from tests.decoder import VOCABULARY, decoder

ROWS, LENGTH = 4, 12
FEW = "heal{tokens=960 local=96 rate=0.02}"


def text(seed: int) -> Batch:
    made = torch.Generator().manual_seed(seed)
    return Batch((), {"input_ids": torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=made)})


def notes(original: Program) -> Notes:
    return Notes(original, [text(1)], [text(9)], training=[text(seed) for seed in range(1, 5)])


def merged(original: Program) -> Program:
    rewrite = read_pass("merge_kv_heads{factor=2 method=mean}")
    return apply_pass(original, rewrite, ("*",), Notes(original))[0]


def test_brings_the_outputs_nearer_and_tells_what_it_did() -> None:
    original = decoder()
    edit = read_pass(FEW).rewrite(merged(original), merged(original), notes(original))
    assert isinstance(edit, Edit) and edit.graph is None and edit.spec is None
    told = edit.evidence
    assert told["loss_after"] < told["loss_before"] and told["sites"] == 2
    assert told["trained_tokens"] == 960 + 96
    assert told["trained_numbers"] == sum(value.numel() for value in edit.weights.values())
    assert "held-out loss" in edit.note and "->" in edit.note


def test_leaves_what_nothing_touched_and_says_why() -> None:
    original = decoder()
    miss = read_pass(FEW).rewrite(original, original, notes(original))
    assert isinstance(miss, Miss) and "no site differs" in miss.reason
    miss = read_pass(FEW).rewrite(merged(original), merged(original), Notes(original))
    assert isinstance(miss, Miss) and "calibration data" in miss.reason


def test_says_what_the_loss_would_have_been_where_it_rises() -> None:
    original = decoder()
    rewrite = read_pass("heal{tokens=480 local=0 rate=0.9}")
    miss = rewrite.rewrite(merged(original), merged(original), notes(original))
    assert isinstance(miss, Miss) and "the held-out loss would go from" in miss.reason


def test_the_search_never_makes_it_and_it_comes_before_what_packs_or_casts() -> None:
    names = [kind.name for kind in ordered()]
    assert "heal" not in {kind.name for kind in (*healing(), *approximate())}
    for earlier in ("refit", "merge_kv_heads", "sliding_window", "skip_sublayers", "fuse_blocks"):
        assert names.index(earlier) < names.index("heal")
    assert names.index("heal") < names.index("unpad") < names.index("cpu_dtype")
    steps = [step.rewrite.partition("{")[0] for step in compose([Step(FEW)]).steps]
    assert steps.index("fuse_attention") < steps.index("heal") < steps.index("unpad")
    assert "heal" not in {step.rewrite.partition("{")[0] for step in compose([]).steps}


def test_reads_back_from_its_text() -> None:
    made = passes()["heal"](tokens=1234, local=56, rank=8)
    assert made.text == "heal{tokens=1234 local=56 rank=8}" and read_pass(made.text) == made
    assert made.heals and made.asked
    with pytest.raises(Problem, match="rate"):
        read_pass("heal{rate=7.0}").rewrite(merged(decoder()), merged(decoder()), notes(decoder()))
