"""sliding_window: the mask it sets is the one it names, on all heads or on chosen ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attnopt.compiler.attend import weights
from attnopt.compiler.contract import Edit, Miss, Notes, passes, read_pass
from attnopt.compiler.lower import export
from attnopt.compiler.pipeline import apply_edit
from attnopt.compiler.program import Batch, Program
from attnopt.compiler.spec import CAUSAL, FULL, AttentionSpec, Mask
from attnopt.passes.sliding_window import SlidingWindow
from tests.decoder import VOCABULARY, decoder
from tests.programs import one_attention
from tests.tolerance import assert_close

SEQ = 33


def attention(mask: Mask = CAUSAL, seq: int = SEQ, **changes: object) -> Program:
    spec = AttentionSpec(4, 2, head_dim=8, v_dim=8, scale=0.3, mask=mask).with_(**changes)
    return one_attention(spec, seq=seq)


def answer(program: Program, line: str, notes: Notes | None = None) -> Edit | Miss:
    rewrite = read_pass(line)
    return rewrite.rewrite(program.sites[0], program, notes or Notes(program))  # type: ignore[no-any-return]


def edited(program: Program, line: str, notes: Notes | None = None) -> Program:
    edit = answer(program, line, notes)
    assert isinstance(edit, Edit), edit
    return apply_edit(program, program.sites[0], edit)


def run(program: Program) -> torch.Tensor:
    out: torch.Tensor = program.run(program.example)
    return out


@pytest.mark.parametrize("backend", ("chunked", "sdpa", "reference", "auto"))
def test_reads_the_window_and_the_sink(backend: str) -> None:
    program = attention()
    made = edited(program, f"sliding_window{{left=8 sink=2 backend={backend}}}")
    spec = made.spec(made.sites[0])
    assert spec.mask == Mask("window", left=8, sink=2)
    q, k, v, _ = program.example.args
    keep = torch.tensor([[(i - j < 8 or j < 2) and j <= i for j in range(SEQ)] for i in range(SEQ)])
    logits = (q @ k.repeat_interleave(2, 1).transpose(-1, -2)) * 0.3
    dense = logits.masked_fill(~keep, float("-inf")).softmax(-1) @ v.repeat_interleave(2, 1)
    assert_close(run(made), dense)
    assert (run(made) - run(program)).abs().max() > 1e-3


def test_an_encoder_gets_a_two_sided_window() -> None:
    made = edited(attention(FULL), "sliding_window{left=8 sink=0}")
    assert made.spec(made.sites[0]).mask == Mask("window", left=8, sink=0, causal=False)


def test_a_window_of_the_model_is_only_narrowed() -> None:
    own = Mask("window", left=20)
    made = edited(attention(own), "sliding_window{left=8 sink=4}")
    assert made.spec(made.sites[0]).mask == Mask("window", left=8, sink=0)
    miss = answer(attention(own), "sliding_window{left=24}")
    assert not miss
    assert "20 keys already" in miss.reason


def test_takes_the_class_from_the_site_where_the_mask_is_a_tensor() -> None:
    keep = Mask("causal").dense(SEQ, SEQ)[None, None]
    spec = AttentionSpec(4, 2, head_dim=8, v_dim=8, scale=0.3, extras=("keep",))
    program = one_attention(spec, seq=SEQ, extras=[keep])
    seen = program.with_sites([replace(program.sites[0], mask="causal+padding")])
    made = edited(seen, "sliding_window{left=8 sink=2}")
    mask = made.spec(made.sites[0]).mask
    assert mask == Mask("window", left=8, sink=2)
    assert made.spec(made.sites[0]).backend == "sdpa"  # the tensor spans all queries and keys
    plain = edited(attention(), "sliding_window{left=8 sink=2}")
    q, k, v, _ = program.example.args
    assert_close(made.module(q, k, v, [keep]), plain.module(q, k, v, []))

    blind = program.with_sites([replace(program.sites[0], mask="tensor")])
    miss = answer(blind, "sliding_window{left=8}")
    assert not miss
    assert "`tensor`" in miss.reason


def test_blocks_are_chosen_where_they_save_half() -> None:
    assert edited(attention(seq=300), "sliding_window{left=16}").sites[0].spec.backend == "chunked"
    assert edited(attention(seq=64), "sliding_window{left=16}").sites[0].spec.backend == "sdpa"
    capped = edited(attention(seq=64, softcap=9.0), "sliding_window{left=16}")
    assert capped.sites[0].spec.backend == "reference"


def test_says_why_it_does_not_fire() -> None:
    program = attention()
    assert "longer than 33" in answer(program, "sliding_window{left=64}").reason  # type: ignore[union-attr]
    assert "none is [5]" in answer(program, "sliding_window{left=8 groups=[5]}").reason  # type: ignore[union-attr]
    assert "backend" in answer(program, "sliding_window{left=8 backend=magic}").reason  # type: ignore[union-attr]
    assert "calibration" in answer(program, "sliding_window{left=8 kept=0.9}").reason  # type: ignore[union-attr]
    lost = program.with_sites([replace(program.sites[0], position="unknown")])
    assert "position" in answer(lost, "sliding_window{left=8}").reason  # type: ignore[union-attr]


def test_queries_of_another_sequence_are_left_alone() -> None:
    class Cross(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            from attnopt.compiler.ops import ATTENTION

            line = AttentionSpec(2, 2, 8, 8, 0.3).text
            made: torch.Tensor = ATTENTION(q, k, k, [], line)
            return made

    q, k = torch.randn(1, 2, 30, 8), torch.randn(1, 2, 50, 8)
    module = torch.export.export(Cross(), (q, k)).module()
    assert isinstance(module, torch.fx.GraphModule)
    site = replace(attention().sites[0], node=next(
        n.name for n in module.graph.nodes if "attnopt" in str(n.target)))  # fmt: skip
    miss = answer(Program(module, Batch((q, k)), sites=(site,)), "sliding_window{left=8}")
    assert not miss
    assert "not the same sequence" in miss.reason


@pytest.mark.parametrize("groups", ([0], [1]))
def test_some_heads_alone(groups: list[int]) -> None:
    """Heads outside `groups` give what they gave; heads inside give what a full window gives."""
    program = attention()
    whole = edited(program, "sliding_window{left=8 sink=2}")
    made = edited(program, f"sliding_window{{left=8 sink=2 groups=[{groups[0]}]}}")
    inside = [h for h in range(4) if h // 2 in groups]
    outside = [h for h in range(4) if h // 2 not in groups]
    assert_close(run(made)[:, inside], run(whole)[:, inside])
    assert_close(run(made)[:, outside], run(program)[:, outside])
    assert [site.id for site in made.sites] == ["s0", "s0.split"]
    assert made.spec(made.sites[1]).mask.kind == "window"
    assert made.spec(made.sites[0]).mask == CAUSAL
    assert "split" in made.sites[0].missing["k"]


def test_a_bias_per_head_is_split_with_the_heads() -> None:
    spec = AttentionSpec(4, 2, head_dim=8, v_dim=8, scale=0.3, mask=CAUSAL, extras=("bias",))
    bias = torch.randn(1, 4, SEQ, SEQ, dtype=torch.float64)
    program = one_attention(spec, seq=SEQ, extras=[bias])
    whole = edited(program, "sliding_window{left=8 sink=2}")
    made = edited(program, "sliding_window{left=8 sink=2 groups=[1]}")
    assert_close(run(made)[:, 2:], run(whole)[:, 2:])
    assert_close(run(made)[:, :2], run(program)[:, :2])


def tokens(seed: int) -> Batch:
    made = torch.Generator().manual_seed(seed)
    return Batch((), {"input_ids": torch.randint(0, VOCABULARY, (2, 40), generator=made)})


def test_heads_are_chosen_by_the_mass_they_keep() -> None:
    program = decoder()
    notes = Notes(program, [tokens(1), tokens(2)], [tokens(3)])
    mass = [measured(program, notes, group) for group in (0, 1)]
    between = sum(mass) / 2
    rewrite = SlidingWindow(left=8, sink=2, kept=between)
    edit = rewrite.rewrite(program.sites[0], program, notes)
    assert isinstance(edit, Edit)
    assert edit.evidence["kept_mass"] == pytest.approx(max(mass))
    made = apply_edit(program, program.sites[0], edit)
    assert {"s0", "s0.split", "s1"} == {site.id for site in made.sites}
    module = export(made).module()
    assert_close(module(**tokens(5).kwargs)["logits"], made.run(tokens(5))["logits"])
    miss = SlidingWindow(left=8, sink=2, kept=0.999999).rewrite(program.sites[0], program, notes)
    assert not miss
    assert "the best keeps" in miss.reason


def measured(program: Program, notes: Notes, group: int) -> float:
    """The kept mass of one key/value head, by the definition."""
    node = program.node(program.sites[0].node)
    q, k = (str(arg.name) for arg in node.args[:2])  # type: ignore[union-attr]
    keep = Mask("window", left=8, sink=2).dense(40, 40)
    shares = []
    for values, _ in notes.record(program, [q, k]):
        mass = weights(values[q], values[k], [], program.spec(program.sites[0]))
        shares.append((mass * keep).sum(-1)[:, 2 * group : 2 * group + 2].mean())
    return float(torch.stack(shares).mean())


def test_reads_back_from_its_text() -> None:
    made = passes()["sliding_window"](left=64, sink=0, groups=(0, 2))
    assert made.text == "sliding_window{left=64 sink=0 groups=[0,2]}"
    assert read_pass(made.text) == made
