"""Randomised SVD: what it says it kept it kept, and that is nearly the best there is."""

from __future__ import annotations

import pytest
import torch

from lorchestra.fusion.methods.randomised import randomised_svd


def matrix(m, n, decay, dtype=torch.float32, seed=0):
    """Singular values k^-decay."""
    generator = torch.Generator().manual_seed(seed)
    k = min(m, n)
    U, _ = torch.linalg.qr(torch.randn(m, k, generator=generator, dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64))
    return ((U * torch.arange(1, k + 1).double() ** -decay) @ V.T).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("m", "n"), [(120, 90), (90, 120)])
@pytest.mark.parametrize("decay", [0.0, 0.5, 2.0])
def test_against_the_whole_svd(m, n, decay, dtype):
    """With a flat spectrum no direction is much better than another: there a sketch may lose 15 % of the best."""
    dense = matrix(m, n, decay, dtype)
    update, kept, whole = randomised_svd(dense, 20, "key")
    S = torch.linalg.svdvals(dense.double())
    best = float(S[:20].square().sum())
    error = float((update.dense(torch.float64) - dense.double()).square().sum())
    assert update.rank == 20
    assert whole == pytest.approx(float(S.square().sum()), rel=1e-6)
    assert error == pytest.approx(whole - kept, rel=1e-3, abs=1e-6 * whole)
    assert best * (0.85 if decay == 0 else 0.97 if decay < 1 else 0.9999) <= kept <= best * (1 + 1e-5)
    torch.testing.assert_close(update.B.norm(dim=0), update.A.norm(dim=1), rtol=1e-3, atol=1e-5)


def test_exact_where_the_rank_is_reached():
    low = matrix(100, 80, 1.0)[:, :7] @ torch.randn(7, 80, generator=torch.Generator().manual_seed(1))
    update, kept, whole = randomised_svd(low, 7, "key")
    torch.testing.assert_close(update.dense(), low, rtol=1e-4, atol=1e-5)
    assert kept == pytest.approx(whole, rel=1e-6)
    update, kept, whole = randomised_svd(torch.eye(9), 30, "key")
    assert update.rank == 9
    torch.testing.assert_close(update.dense(), torch.eye(9), rtol=1e-5, atol=1e-6)


def test_chance_comes_from_the_key():
    dense = matrix(100, 80, 0.1)
    one, again, other = (randomised_svd(dense, 5, key)[0] for key in ("a", "a", "b"))
    assert torch.equal(one.B, again.B)
    assert not torch.equal(one.B, other.B)


def test_of_nothing():
    update, kept, whole = randomised_svd(torch.zeros(50, 40), 3, "key")
    assert (kept, whole) == (0.0, 0.0)
    assert not update.dense().any()
