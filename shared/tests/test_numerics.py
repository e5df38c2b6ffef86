import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from fusion_core.errors import ConfigError, DataError, ShapeError
from fusion_core.numerics import TopK, kl_divergence, masked_mean
from fusion_core.seeding import generator

INF, NAN = math.inf, math.nan
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
seeds = st.integers(0, 10**6)


def draw(seed, *shape, scale=3.0):
    return scale * torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


@given(seed=seeds, dim=st.sampled_from([None, 0, 1, -1, (0, 2)]))
def test_masked_mean_is_the_mean_of_the_kept(seed, dim):
    x, mask = draw(seed, 3, 4, 5), draw(seed + 1, 3, 4, 5) > 0.5
    wanted = x.masked_fill(~mask, NAN).nanmean(dim) if dim is not None else x[mask].mean()
    torch.testing.assert_close(masked_mean(x, mask, dim), wanted.nan_to_num(0.0))


def test_masked_mean_empty_and_nan():
    x = torch.tensor([[NAN, 1.0], [INF, 2.0]], requires_grad=True)
    mean = masked_mean(x, torch.tensor([[False, True], [False, False]]), 1)
    assert mean.tolist() == [1.0, 0.0]
    mean.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[0.0, 1.0], [0.0, 0.0]]
    empty = masked_mean(torch.zeros(0, requires_grad=True), torch.zeros(0, dtype=torch.bool))
    assert empty.item() == 0.0
    assert empty.requires_grad


def test_masked_mean_broadcasts_and_checks():
    x = torch.arange(6.0).reshape(2, 3)
    assert masked_mean(x, torch.tensor([True, False, True])).item() == 2.5
    assert masked_mean(x, torch.tensor([[True], [False]])).item() == 1.0
    assert masked_mean(x > 2, torch.tensor(True)).item() == 0.5
    with pytest.raises(DataError, match=r"mask is torch.float32, wanted torch.bool"):
        masked_mean(x, torch.ones(2, 3))
    for shape in [(2,), (1, 2, 3), (2, 2)]:
        with pytest.raises(ShapeError, match=r"mask has shape .*wanted one that broadcasts to x, \(2, 3\)"):
            masked_mean(x, torch.ones(shape, dtype=torch.bool))


@pytest.mark.parametrize("dtype", DTYPES)
def test_half_precision_does_not_overflow(dtype):
    x = torch.full((4000,), 100.0, dtype=dtype)
    mean = masked_mean(x, torch.ones(4000, dtype=torch.bool))
    assert mean.dtype is dtype
    assert mean.item() == 100.0
    log_p = torch.zeros(4000, dtype=dtype).log_softmax(0)
    assert kl_divergence(log_p, log_p).dtype is dtype


@given(seed=seeds)
def test_kl_laws(seed):
    log_p, log_q = draw(seed, 4, 6).log_softmax(-1), draw(seed + 1, 4, 6).log_softmax(-1)
    found = kl_divergence(log_p, log_q)
    assert (found >= 0).all()
    assert torch.equal(kl_divergence(log_p, log_p), torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(
        found, torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    )
    torch.testing.assert_close(found, kl_divergence(log_p.T, log_q.T, dim=0))
    torch.testing.assert_close(found[:1], kl_divergence(log_p[0], log_q[:1]))


def test_kl_zeros():
    half = torch.tensor([0.5, 0.5, 0.0]).log()
    other = torch.tensor([0.25, 0.0, 0.75]).log()
    assert kl_divergence(half, half).item() == 0.0
    assert kl_divergence(half, other).item() == INF
    assert kl_divergence(torch.tensor([0.0, -INF, -INF]), other).item() == pytest.approx(math.log(4))
    # p too small for its exponential, q exactly 0: still no NaN
    assert kl_divergence(torch.tensor([0.0, -200.0]), torch.tensor([0.0, -INF])).item() == 0.0
    with pytest.raises(ShapeError, match="log_q has 2 classes, wanted those of log_p, 3"):
        kl_divergence(half, half[:2])


def test_kl_gradient_with_zeros():
    log_p = torch.tensor([[0.7, 0.3, 0.0, 0.0], [0.1, 0.2, 0.3, 0.4]], dtype=torch.float64).log()
    log_q = torch.tensor([[0.2, 0.3, 0.5, 0.0], [0.4, 0.3, 0.2, 0.1]], dtype=torch.float64).log()
    assert gradcheck(kl_divergence, (log_p.requires_grad_(), log_q.requires_grad_()))
    assert gradgradcheck(kl_divergence, (log_p, log_q))  # bilevel methods differentiate twice
    logits = torch.tensor([[1.0, 2.0, -INF]], dtype=torch.float64, requires_grad=True)
    other = torch.tensor([[0.5, -1.0, -INF]], dtype=torch.float64, requires_grad=True)
    log_probs = logits.log_softmax(-1), other.log_softmax(-1)
    with pytest.warns(UserWarning, match="Anomaly Detection"), torch.autograd.detect_anomaly():
        kl_divergence(*log_probs).sum().backward()  # no NaN on the way either
    for leaf in (logits, other):
        assert leaf.grad is not None
        assert torch.isfinite(leaf.grad).all()
        assert leaf.grad[0, :2].abs().min() > 0
        assert leaf.grad[0, 2] == 0


@given(seed=seeds, size=st.integers(1, 9), data=st.data(), tail=st.sampled_from(["none", "uniform"]),
       dtype=st.sampled_from(DTYPES), scale=st.sampled_from([0.0, 1.0, 30.0]))  # fmt: skip
def test_top_k_rows_sum_to_one(seed, size, data, tail, dtype, scale):
    k = data.draw(st.integers(1, size))
    logits = draw(seed, 2, 3, size, scale=scale).to(dtype)
    found = TopK.from_logits(logits, k).log_probs(size, tail)
    assert found.shape == logits.shape
    assert found.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones_like(found[..., 0]), rtol=1e-5, atol=1e-5)
    if k == size:
        torch.testing.assert_close(found, logits.to(found.dtype).log_softmax(-1))


@given(seed=seeds)
def test_top_k_uniform_keeps_the_true_probabilities(seed):
    logits = draw(seed, 5, 8)
    top = TopK.from_logits(logits, 3)
    found, true = top.log_probs(8, "uniform"), logits.log_softmax(-1)
    torch.testing.assert_close(found.gather(-1, top.indices), true.gather(-1, top.indices))
    kept = torch.zeros_like(true).scatter(-1, top.indices, 1.0).bool()
    rest = true.exp().masked_fill(kept, 0.0).sum(-1, keepdim=True) / 5
    torch.testing.assert_close(found[~kept], rest.log().expand_as(true)[~kept])
    alone = top.log_probs(8)
    assert (alone[~kept] == -INF).all()
    torch.testing.assert_close(alone.gather(-1, top.indices), top.values.log_softmax(-1))


def test_top_k_stored_in_half_never_claims_more_than_one():
    logits = draw(0, 200, 50, scale=10.0)
    top = TopK.from_logits(logits, 40)
    stored = TopK((top.values + 0.01).half(), top.indices, top.lse.float())
    assert (stored.values.float().logsumexp(-1) > stored.lse).any()
    found = stored.log_probs(50, "uniform")
    assert not found.isnan().any()
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(200), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tail", ["none", "uniform"])
def test_top_k_gradient(tail):
    logits = draw(1, 2, 5).requires_grad_()
    assert gradcheck(lambda x: TopK.from_logits(x, 2).log_probs(5, tail).exp(), (logits,))
    peaked = torch.tensor([[200.0, 0.0, 1.0]], requires_grad=True)
    found = TopK.from_logits(peaked, 1).log_probs(3, tail)
    assert found.tolist() == [[0.0, -INF, -INF]]
    found.exp().sum().backward()
    assert peaked.grad is not None
    assert torch.isfinite(peaked.grad).all()


def test_top_k_complaints():
    logits = torch.zeros(2, 5)
    for k in (0, 6):
        with pytest.raises(ConfigError, match=f"k is {k}, wanted 1 to the number of classes, 5"):
            TopK.from_logits(logits, k)
    top = TopK.from_logits(logits, 3)
    with pytest.raises(ConfigError, match="size is 2, wanted at least the 3 kept classes"):
        top.log_probs(2)
    with pytest.raises(ConfigError, match="tail is 'flat', wanted 'none' or 'uniform'"):
        top.log_probs(5, "flat")
    with pytest.raises(ShapeError, match=r"shapes \[\(2, 3\), \(2, 3\), \(3,\)\]"):
        TopK(top.values, top.indices, torch.zeros(3))
