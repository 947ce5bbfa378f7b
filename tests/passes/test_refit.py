"""refit: solves its normal equations, mends what was changed, keeps nothing that hurts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from attnopt.compiler.contract import Edit, Notes, passes, read_pass
from attnopt.compiler.grams import Gram
from attnopt.compiler.pipeline import apply_edit
from attnopt.compiler.program import Batch, Program
from attnopt.compiler.ridge import solve
from attnopt.compiler.site_weights import write_output_whole
from attnopt.compiler.spec import Mask
from attnopt.passes.refit import Refit
from tests.decoder import VOCABULARY, decoder

LENGTH = 24


def tokens(seed: int, rows: int = 8, valid: Tensor | None = None) -> Batch:
    made = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (rows, LENGTH), generator=made)
    return Batch((), {"input_ids": ids}, valid)


def known(original: Program) -> Notes:
    return Notes(original, [tokens(s) for s in (1, 2, 3, 4)], [tokens(9)])


def windowed(program: Program) -> Program:
    """The program with a narrow window at every site."""
    made = program.copy()
    for site in made.sites:
        spec = made.spec(site).with_(mask=Mask("window", left=3))
        made.node(site.node).update_arg(4, spec.text)
    made.clean()
    return made


def refitted(program: Program, notes: Notes, rewrite: Refit) -> tuple[Program, list[Edit]]:
    edits = []
    for id in [site.id for site in program.sites]:
        edit = rewrite.rewrite(program.site(id), program, notes)
        assert isinstance(edit, Edit), edit
        program = apply_edit(program, program.site(id), edit)
        edits.append(edit)
    return program, edits


def drift(program: Program, original: Program) -> float:
    batch = tokens(77)
    ours, theirs = (p.run(batch)["logits"] for p in (program, original))
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("against", ("branch", "residual"))
def test_mends_a_window_and_shows_both_errors(against: str) -> None:
    original = decoder()
    changed = windowed(original)
    mended, edits = refitted(changed, known(original), Refit(against=against))
    assert drift(mended, original) < drift(changed, original)
    for edit in edits:
        told = edit.evidence
        assert told["heldout_after"] < told["heldout_before"]
        assert told["calibration_after"] <= told["calibration_before"]
        assert told["gradient"] < 1e-8
    assert "->" in edits[0].note


def test_the_held_out_error_is_that_of_the_outputs() -> None:
    """The error worked out from second moments is the one that running both programs shows."""
    original = decoder()
    changed = windowed(original)
    notes = known(original)
    mended, edits = refitted(changed, notes, Refit())
    site = original.sites[0]
    assert site.out is not None
    name = site.out.projection
    for program, key in ((changed, "heldout_before"), (mended, "heldout_after")):
        (ours, _), (theirs, _) = (
            next(iter(notes.record(p, [name], notes.heldout))) for p in (program, original)
        )
        lost = (ours[name].double() - theirs[name].double()).square().sum()
        share = float(lost / theirs[name].double().square().sum())
        assert share == pytest.approx(edits[0].evidence[key], rel=1e-4)


def test_undoes_any_change_of_the_values_basis() -> None:
    """Heads mixed by an orthogonal matrix lose nothing: the output projection undoes it."""
    original = decoder()
    site = original.sites[0]
    assert site.out is not None
    changed = original.copy()
    weight = changed.weight(site.out.weight).T.double()
    mixed = torch.linalg.qr(torch.randn(len(weight), len(weight), dtype=torch.float64))[0] @ weight
    write_output_whole(changed, site, mixed, None)
    edit = Refit(damping=1e-4).rewrite(site, changed, known(original))
    assert isinstance(edit, Edit)
    assert edit.evidence["heldout_before"] > 0.5
    assert edit.evidence["heldout_after"] < 1e-3


def test_padding_takes_no_part() -> None:
    original = decoder()
    changed = windowed(original)
    real = torch.ones(8, LENGTH, dtype=torch.bool)
    real[:, 15:] = False
    short = [Batch((), {"input_ids": tokens(s).kwargs["input_ids"][:, :15]}) for s in (1, 2, 3)]
    padded = [tokens(s, valid=real) for s in (1, 2, 3)]
    weights = []
    for batches in (short, padded):
        edit = Refit().rewrite(changed.sites[0], changed, Notes(original, batches[:2], batches[2:]))
        assert isinstance(edit, Edit)
        made = apply_edit(changed, changed.sites[0], edit)
        assert made.sites[0].out is not None
        weights.append(made.weight(made.sites[0].out.weight))
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-5)


def test_keeps_nothing_that_makes_held_out_data_worse() -> None:
    original = decoder()
    changed = windowed(original)
    few = Batch((), {"input_ids": tokens(5).kwargs["input_ids"][:1, :6]})
    miss = Refit(damping=1e-4).rewrite(
        changed.sites[0], changed, Notes(original, [few], [tokens(9)])
    )
    assert not miss
    assert "held-out error would go from" in miss.reason


def test_leaves_what_is_right_already() -> None:
    original = decoder()
    miss = Refit().rewrite(original.sites[0], original, known(original))
    assert not miss
    assert "nothing to refit" in miss.reason


def test_says_what_it_lacks() -> None:
    original = decoder()
    changed = windowed(original)
    site = changed.sites[0]
    notes = known(original)
    assert "held-out data" in Refit().rewrite(site, changed, Notes(original)).reason  # type: ignore[union-attr]
    bare = replace(site, out=None, missing={"out": "it feeds two projections"})
    assert "two projections" in Refit().rewrite(bare, changed, notes).reason  # type: ignore[union-attr]
    alone = changed.copy()
    alone.sublayers = ()
    miss = Refit(against="residual").rewrite(site, alone, notes)
    assert not miss
    assert "residual sublayer" in miss.reason


@pytest.mark.parametrize("damping", (1e-4, 1e-2))
def test_the_solution_has_no_gradient_and_never_more_error(damping: float) -> None:
    for seed in range(5):
        made = torch.Generator().manual_seed(seed)
        z = torch.randn(50, 12, generator=made) @ torch.randn(12, 12, generator=made)
        y, old = torch.randn(50, 7, generator=made), torch.randn(12, 7, generator=made).double()
        sums = Gram.empty(12, 7)
        sums.add(z, y)
        new, gradient = solve(sums, old, damping)
        ridge = damping * sums.xx.diagonal().mean()
        left = z.double().T @ (z.double() @ new - y.double()) + ridge * (new - old)
        assert float(left.norm() / sums.xy.norm()) < 1e-8
        assert gradient < 1e-8
        assert sums.error(new) <= sums.error(old)


def test_reads_back_from_its_text() -> None:
    made = passes()["refit"](damping=1e-2, against="residual")
    assert read_pass(made.text) == made
    assert passes()["refit"].heals
