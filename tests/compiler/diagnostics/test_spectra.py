"""Ranks and spectra on forms whose ranks are known."""

from __future__ import annotations

import pytest
import torch

from attnopt.compiler.diagnostics import kv_similarity
from attnopt.compiler.diagnostics.centred import Centred
from attnopt.compiler.diagnostics.spectra import effective_rank, product, rank_of_energy, spectrum
from tests.tolerance import assert_close


def test_the_product_of_moments_has_the_singular_values_of_the_form() -> None:
    q, k = torch.randn(2, 3, 5, 20, dtype=torch.float64).unbind()  # [heads, dim, width]
    found = product(q @ q.transpose(1, 2), k @ k.transpose(1, 2))
    assert_close(found, torch.linalg.svdvals(q.transpose(1, 2) @ k)[:, :5])


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_a_form_with_equal_singular_values_has_its_rank(rank: int) -> None:
    basis = torch.linalg.qr(torch.randn(20, 8, dtype=torch.float64))[0][:, :rank]
    values = spectrum(basis @ basis.T)
    assert float(effective_rank(values)) == pytest.approx(rank, abs=1e-6)
    assert float(rank_of_energy(values)) == rank


def test_unequal_singular_values_count_for_less() -> None:
    values = torch.tensor([3.0, 1.0], dtype=torch.float64)
    energy = torch.tensor([0.9, 0.1], dtype=torch.float64)
    assert_close(effective_rank(values), torch.special.entr(energy).sum().exp())
    assert float(rank_of_energy(values)) == 2 and float(rank_of_energy(values, 0.9)) == 1


def test_a_form_that_is_zero_has_rank_zero() -> None:
    nothing = torch.zeros(2, 4, dtype=torch.float64)
    assert effective_rank(nothing).tolist() == rank_of_energy(nothing).tolist() == [0.0, 0.0]


def test_what_all_tokens_share_is_left_out() -> None:
    x = torch.randn(30, 2, 4, dtype=torch.float64)
    one, other = Centred(2, 4), Centred(2, 4)
    one.add(x[:10])
    one.add(x[10:])
    other.add(x + 5.0)
    assert_close(one.moment(), other.moment())


def _moment(heads: torch.Tensor) -> torch.Tensor:
    flat = heads.reshape(-1, heads.shape[-1])
    return flat @ flat.T


def test_heads_that_differ_by_what_the_attention_absorbs_are_the_same() -> None:
    head, other = torch.randn(2, 6, 40, dtype=torch.float64).unbind()
    pairs = torch.tensor([[0, 3], [1, 4]])
    turned = head.clone()
    for (a, b), angle, size in zip(pairs.tolist(), (0.7, 2.1), (2.0, 0.5), strict=True):
        z = torch.complex(head[a], head[b]) * torch.polar(torch.tensor(size), torch.tensor(angle))
        turned[a], turned[b] = z.real, z.imag
    turned[2], turned[5] = head[2] + 3 * head[5], head[2] - head[5]
    query = torch.eye(6, dtype=torch.float64).expand(3, 6, 6)
    found = kv_similarity.of_keys(_moment(torch.stack((head, turned, other))), 3, query, pairs)
    assert float(found[0, 1]) == pytest.approx(1, abs=1e-4)
    assert float(found[0, 2]) < 0.5
    assert_close(found, found.T)
    reflected = turned.clone()
    reflected[[0, 1]] *= -1  # of a pair (a, b) only a: no rotation does that
    back = kv_similarity.of_keys(_moment(torch.stack((head, reflected))), 2, query[:2], pairs)
    assert float(back[0, 1]) < 0.9


def test_values_may_be_mixed_by_any_matrix() -> None:
    head, other = torch.randn(2, 4, 50, dtype=torch.float64).unbind()
    mixed = torch.randn(4, 4, dtype=torch.float64) @ head
    metric = torch.eye(4, dtype=torch.float64).expand(3, 4, 4)
    found = kv_similarity.of_values(_moment(torch.stack((head, mixed, other))), 3, metric)
    assert float(found[0, 1]) == pytest.approx(1, abs=1e-6)
    assert float(found[0, 2]) < 0.6
