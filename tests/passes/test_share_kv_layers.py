"""share_kv_layers: exact where the later keys and values are images of the first, one cache for
both, and told what is lost where they are not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from attnopt.compiler.contract import Edit, Miss, Notes, read_pass
from attnopt.compiler.decode import derive
from attnopt.compiler.decode.phase_cost import decoding
from attnopt.compiler.pipeline import apply_edit
from attnopt.compiler.program import Batch, Program
from attnopt.passes.share_kv_layers import ShareKvLayers
from tests.compiler.decode.test_derive import singly, traced, whole, zoo
from tests.tolerance import assert_close
from tests.zoo.survey import ALL, read

WIDTH, HEADS, DIM = 32, 4, 8


class Twins(nn.Module):
    """Two attentions on the same input; with `images` the second's keys and values are images of
    the first's, in another order of the heads."""

    def __init__(self, images: bool, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.parts = nn.ModuleList(nn.ModuleDict({
            name: nn.Linear(WIDTH, WIDTH, bias=bias) for name in ("q", "k", "v", "out")
        }) for _ in range(2))  # fmt: skip
        self.head = nn.Linear(WIDTH, 50)
        self.double()
        if images:
            for name in ("k", "v"):
                first, second = (part[name] for part in self.parts)  # type: ignore[index]
                maps = torch.randn(HEADS, DIM, DIM, dtype=torch.float64)
                weight = first.weight.detach().view(HEADS, DIM, -1)[[2, 0, 3, 1]]
                second.weight.data = (maps @ weight).flatten(0, 1)
                second.bias.data = (maps @ first.bias.detach().view(HEADS, DIM, 1)[
                    [2, 0, 3, 1]
                ]).flatten()  # fmt: skip

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        h = self.norm(x)
        for part in self.parts:
            q, k, v = (
                part[name](h).unflatten(-1, (HEADS, DIM)).transpose(1, 2)  # type: ignore[index]
                for name in ("q", "k", "v")
            )
            a = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + part["out"](a.transpose(1, 2).flatten(2))  # type: ignore[index]
        made: Tensor = self.head(x)
        return made


def ids(batch: int, seq: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 50, (batch, seq), generator=torch.Generator().manual_seed(seed))


def twins(images: bool = True) -> Program:
    return traced(Twins(images), input_ids=ids(2, 12))


def notes(program: Program) -> Notes:
    name = next(iter(program.example.kwargs), "input_ids")
    batches = [Batch((), {name: ids(4, 24, seed)}) for seed in (1, 2)]
    return Notes(program, batches, [Batch((), {name: ids(4, 24, 9)})])


def shared(program: Program, rewrite: ShareKvLayers) -> tuple[Program, list[Edit]]:
    known, edits = notes(program), list[Edit]()
    for id in [site.id for site in program.sites]:
        answer = rewrite.rewrite(program.site(id), program, known)
        if isinstance(answer, Edit):
            program = apply_edit(program, program.site(id), answer)
            edits.append(answer)
    return program, edits


def test_images_of_the_first_are_shared_exactly() -> None:
    program = twins()
    made, (edit,) = shared(program, ShareKvLayers())
    tokens = ids(3, 17, 5)
    expected = whole(program, derive(program, check=False), tokens)
    assert_close(whole(made, derive(made), tokens), expected)
    assert edit.evidence["k_residual"] < 1e-9 and edit.evidence["v_heldout"] < 1e-9
    names = [name for name, _ in made.module.named_parameters()]
    assert not any("parts.1.k" in name or "parts.1.v" in name for name in names)


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "Qwen3"])
def test_one_cache_serves_both_and_steps_are_exact(name: str) -> None:
    program = zoo(name)
    made, edits = shared(program, ShareKvLayers())
    assert len(edits) == len(program.sites) // 2
    assert 0 < edits[0].evidence["v_residual"] < 1
    before, after = derive(program, check=False), derive(made)
    assert 2 * after.bytes_per_token() == before.bytes_per_token()
    assert decoding(made).cache_bytes_per_token * 2 == decoding(program).cache_bytes_per_token
    tokens = ids(2, 20)
    state = after.state(2, 20)
    found = torch.cat([after.prefill(state, tokens[:, :9]), *singly(after, state, tokens)], 1)
    assert_close(found.float(), whole(made, after, tokens).float())
    assert len(state.caches) == len(program.sites) // 2


def test_without_images_less_is_lost_than_with_the_keys_of_anyone() -> None:
    program = twins(images=False)
    made, (edit,) = shared(program, ShareKvLayers())
    tokens = ids(3, 17, 5)
    decoder = derive(program, check=False)
    expected = whole(program, decoder, tokens)
    off = (whole(made, decoder, tokens) - expected).norm()
    plain = program.copy()
    first, second = plain.attentions()
    second.args = (second.args[0], *first.args[1:3], *second.args[3:])
    plain.clean()
    assert 0 < off < (whole(plain, decoder, tokens) - expected).norm()
    assert 0 < edit.evidence["k_residual"] < 1


def test_says_why_it_does_not_fire() -> None:
    program = twins()
    known = notes(program)
    first, second = program.sites

    def why(rewrite: ShareKvLayers, site: object, known: Notes) -> str:
        answer = rewrite.rewrite(site, program, known)  # type: ignore[arg-type]
        assert isinstance(answer, Miss)
        return answer.reason

    assert "first of its run" in why(ShareKvLayers(), first, known)
    assert "calibration" in why(ShareKvLayers(), second, Notes(program))
    made, _ = shared(program, ShareKvLayers())
    again = ShareKvLayers().rewrite(made.sites[1], made, known)
    assert isinstance(again, Miss) and "reads the keys" in again.reason


def test_heads_that_are_still_repeated_are_folded_first() -> None:
    (padded,) = [a for a in ALL if a.name == "Llama, padded"]
    _, program = read(padded, "sdpa")
    answer = ShareKvLayers().rewrite(program.sites[1], program, Notes(program, [program.example]))
    assert isinstance(answer, Miss) and "repeated" in answer.reason


def test_reads_back_from_its_text() -> None:
    assert read_pass("share_kv_layers{span=3}") == ShareKvLayers(3)
