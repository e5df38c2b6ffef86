"""What holds for every input: the invariants of the equations and of whole attacks."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays

from adaea import DI, AdaEA, Ens, Momentum, Nesterov, Variance, agm_weights, disparity_filter, disparity_map
from adaea.budget import project, step
from adaea.candidates import candidate_losses
from adaea.draws import Draws, Recorded
from adaea.fusion import fused_loss
from adaea.losses import cross_entropy
from adaea.surrogates import prepared
from adaea.transforms import smoothing_kernel
from fusion_core.seeding import generator

EPS = 8 / 255
quick = settings(max_examples=40, deadline=None)
counts = st.integers(2, 5)


@st.composite
def matrices(draw, batch=False):
    """Loss matrices whose weights do not underflow at beta <= 1."""
    k = draw(counts)
    shape = (k, k, draw(st.integers(1, 3))) if batch else (k, k)
    return torch.from_numpy(draw(arrays("float64", shape, elements=st.floats(0.1, 2.0))))


@st.composite
def gradients(draw, low=2, channels=None):
    shape = (draw(st.integers(low, 6)), 2, channels or draw(st.integers(1, 4)), 2, 3)
    numbers = st.one_of(st.just(0.0), st.floats(1e-3, 10.0), st.floats(-10.0, -1e-3))
    return torch.from_numpy(draw(arrays("float64", shape, elements=numbers)))


@st.composite
def images_in_a_ball(draw):
    clean = draw(arrays("float32", (2, 3, 2, 2), elements=st.floats(0, 1, width=32)))
    moved = draw(arrays("float32", (2, 3, 2, 2), elements=st.floats(-3, 4, width=32)))
    return torch.from_numpy(clean), torch.from_numpy(moved), draw(st.floats(0.0, 2.0))


def within(adv, clean, eps, norm):
    change = adv.double() - clean.double()
    if norm == "linf":
        ulp = torch.finfo(adv.dtype).eps * torch.maximum(adv.abs(), clean.abs()).double().clamp_min(eps)
        return bool((change.abs() <= eps + ulp).all())
    return bool((change.flatten(1).norm(dim=1) <= eps * (1 + 1e-6) + 1e-6).all())


# 1: the budget
@quick
@given(images_in_a_ball(), st.sampled_from(["linf", "l2"]))
def test_projection_stays_in_ball_and_bounds(drawn, norm):
    clean, moved, eps = drawn
    found = project(moved, clean, eps, norm)
    assert within(found, clean, eps, norm)
    assert found.min() >= 0
    assert found.max() <= 1
    inside = project(found, clean, eps, norm)
    torch.testing.assert_close(inside, found, rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("start", ["normal", "projected", "uniform"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_an_attack_keeps_the_budget(nets, batch, norm, start, dtype):
    x, y = batch(3, dtype=dtype)
    x = (x - 0.2) / 0.6  # reaches both bounds
    eps = 0.5 if norm == "l2" else EPS
    attack = AdaEA(nets(dtype=torch.float32), eps=eps, norm=norm, start=start, noise=0.1, steps=3)
    adv = attack(x, y)
    assert adv.dtype == dtype
    assert not torch.equal(adv, x)
    assert adv.min() >= 0
    assert adv.max() <= 1
    slack = 0.0 if dtype != torch.bfloat16 else torch.finfo(dtype).eps * math.sqrt(x[0].numel())
    assert within(adv.double(), x.double(), eps + 1e-6 + slack, norm)


def test_uniform_starts_in_the_ball(nets, batch):
    x, y = batch(3)
    for norm, eps in (("linf", 0.1), ("l2", 0.7)):
        first = []
        attack = AdaEA(nets(), start="uniform", norm=norm, eps=eps, steps=1, alpha=1e-9)
        attack(x, y, on_step=lambda record, first=first: first.append(record.point))
        assert within(first[0], x, eps, norm)
        assert (first[0] - x).abs().max() > eps / 100


# 2: weights are a distribution
@quick
@given(st.one_of(matrices(), matrices(batch=True)), st.floats(0, 1), st.booleans())
def test_weights_are_positive_and_sum_to_one(matrix, beta, targeted):
    for ratio in ("given", "received"):
        weights = agm_weights(matrix, beta, ratio=ratio, targeted=targeted)
        assert weights.shape == (matrix.shape[0], *matrix.shape[2:])
        assert (weights > 0).all()
        torch.testing.assert_close(weights.sum(0), torch.ones_like(weights[0]), rtol=0, atol=1e-12)


# 3: the order of the surrogates
@quick
@given(matrices(), st.randoms(use_true_random=False))
def test_permuting_surrogates_permutes_weights(matrix, random):
    order = list(range(len(matrix)))
    random.shuffle(order)
    found = agm_weights(matrix[order][:, order], 1.0)
    torch.testing.assert_close(found, agm_weights(matrix, 1.0)[order], rtol=0, atol=1e-12)


def test_the_order_does_not_matter_with_the_symmetric_filter(nets, batch):
    x, y = batch(2)
    models = nets(3)
    turned = {name: models[name] for name in ("net2", "net0", "net1")}
    attack = AdaEA(eta=0.2, steps=4, update=Momentum(0.9))
    adv, trace = attack(x, y, surrogates=models, trace=True)
    again, other = attack(x, y, surrogates=turned, trace=True)
    assert 0 < trace.kept.mean() < 1, "the filter acts"
    torch.testing.assert_close(again, adv, rtol=0, atol=1e-9)
    torch.testing.assert_close(other.weights, trace.weights[:, [2, 0, 1]], rtol=0, atol=1e-9)


# 4: without sharpness it is the even ensemble
@pytest.mark.parametrize("agm", ["exact", "linear", "per_sample", "linear_per_sample"])
def test_beta_zero_is_ens(nets, batch, agm):
    x, y = batch(2)
    models = nets(3)
    adv, trace = AdaEA(models, beta=0, drf=False, agm=agm, steps=3)(x, y, trace=True)
    assert (trace.weights == 1 / 3).all()
    assert (trace.keep).all()
    torch.testing.assert_close(adv, Ens(models, steps=3)(x, y), rtol=0, atol=1e-12)
    torch.testing.assert_close(adv, AdaEA(models, agm=False, drf=False, steps=3)(x, y), rtol=0, atol=1e-12)


# 5: copies of one model
@pytest.mark.parametrize("count", [2, 3])
def test_copies_are_the_single_model(nets, batch, count):
    x, y = batch(2)
    (net,) = nets(1).values()
    scores = []
    keep = lambda record: scores.append((record.score, record.gradients))
    adv, trace = AdaEA([net] * count, steps=4)(x, y, trace=True, on_step=keep)
    single, alone = AdaEA([net], steps=4)(x, y, trace=True)
    torch.testing.assert_close(adv, single, rtol=0, atol=1e-12)
    assert (alone.weights == 1).all()
    assert (alone.kept == 1).all()
    for score, gradient in scores:
        there = gradient[0].abs().sum(1, keepdim=True) > 0
        torch.testing.assert_close(score[there], torch.ones_like(score[there]), rtol=0, atol=1e-12)
    torch.testing.assert_close(trace.weights, torch.full_like(trace.weights, 1 / count), rtol=0, atol=1e-9)


# 6: the unit of a surrogate's loss
@quick
@given(matrices(), st.integers(0, 4), st.floats(0.01, 100.0))
def test_scaling_a_row_leaves_the_weights(matrix, row, factor):
    other = matrix.clone()
    other[row % len(matrix)] *= factor
    torch.testing.assert_close(agm_weights(other, 1.0), agm_weights(matrix, 1.0), rtol=0, atol=1e-9)


# 7: batch mates
@pytest.mark.parametrize("agm", ["per_sample", "linear_per_sample"])
def test_per_sample_does_not_see_the_batch(nets, batch, agm):
    x, y = batch(3)
    made = lambda: generator(0, "test")
    noise = torch.randn(x.shape, generator=made(), dtype=x.dtype)
    resizes = [[(6 + t % 2, 0, 1, 0.1 * k) for k in range(3)] for t in range(3)]
    attack = AdaEA(nets(3), agm=agm, steps=3, update=Momentum(), transforms=DI(0.75, 0.2))
    whole = attack(x, y, draws=Recorded(made(), noise=noise, resizes=resizes))
    for b in range(3):
        alone = Recorded(made(), noise=noise[b : b + 1], resizes=resizes)
        torch.testing.assert_close(
            attack(x[b : b + 1], y[b : b + 1], draws=alone), whole[b : b + 1], rtol=0, atol=1e-9
        )
    mates = attack.with_(agm="exact")
    together = mates(x, y, draws=Recorded(made(), noise=noise, resizes=resizes))
    alone = mates(x[:1], y[:1], draws=Recorded(made(), noise=noise[:1], resizes=resizes))
    assert (together[:1] - alone).abs().max() > 1e-3, "batch means do see it"


# 8: the map
@quick
@given(gradients(), st.lists(st.floats(1e-3, 1e3), min_size=6, max_size=6))
def test_map_is_bounded_and_knows_no_lengths(g, scales):
    count = len(g)
    score = disparity_map(g)
    assert score.min() >= -1 / (count - 1) - 1e-12
    assert score.max() <= 1 + 1e-12
    factors = torch.tensor(scales[:count], dtype=g.dtype).view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(disparity_map(g * factors), score, rtol=0, atol=1e-9)


@quick
@given(gradients(), st.floats(-1, 1), st.floats(0, 1), st.sampled_from(["symmetric", "official"]))
def test_a_larger_threshold_keeps_a_subset(g, eta, more, form):
    few, many = disparity_filter(g, eta + more, form), disparity_filter(g, eta, form)
    assert (few <= many).all()


# 9: closed form against pairs
@quick
@given(gradients(), st.sampled_from(["symmetric", "official"]))
def test_closed_form_is_the_mean_over_pairs(g, form):
    count = len(g)
    unit = g / g.norm(dim=2, keepdim=True).clamp_min(1e-12)
    rows = []
    for i in range(count if form == "symmetric" else count - 1):
        others = [(unit[i] * unit[j]).sum(1, keepdim=True) for j in range(count) if j != i]
        rows.append(torch.stack(others).sum(0) / (count - 1))
    pairs = torch.stack(rows).sum(0) / count
    torch.testing.assert_close(disparity_map(g, form), pairs, rtol=0, atol=1e-10)


# 10: it attacks
@pytest.mark.parametrize("fusion", ["logits", "probs", "loss"])
@pytest.mark.parametrize("agm", ["exact", "linear", "per_sample"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_losses_go_where_they_should(nets, batch, agm, fusion, norm):
    x, y = batch(4)
    models = {name: net.eval() for name, net in nets(3).items()}
    size = {"eps": 0.3, "alpha": 0.05} if norm == "l2" else {"eps": 0.03, "alpha": 0.005}
    attack = AdaEA(models, fusion=fusion, agm=agm, norm=norm, steps=6, noise=0, **size)
    mean_loss = lambda images: sum(cross_entropy(net(images), y).mean().item() for net in models.values())
    assert mean_loss(attack(x, y)) > mean_loss(x)
    assert mean_loss(attack.with_(targeted=True)(x, y)) < mean_loss(x)


@pytest.mark.parametrize("loss", ["logit", "margin", "dlr"])
@pytest.mark.parametrize("fusion", ["logits", "probs", "loss"])
def test_the_ensembles_loss_goes_where_it_should(nets, batch, loss, fusion):
    x, y = batch(4)
    models = {name: net.eval() for name, net in nets(3).items()}
    attack = AdaEA(models, fusion=fusion, loss=loss, beta=0, eps=0.03, alpha=0.005, steps=6, noise=0)
    even = torch.full((3,), 1 / 3, dtype=x.dtype)

    def ensemble(images):
        logits = torch.stack([net(images) for net in models.values()])
        return fused_loss(logits, even, y, fusion, loss).mean().item()

    assert ensemble(attack(x, y)) > ensemble(x)
    assert ensemble(attack.with_(targeted=True)(x, y)) < ensemble(x)


# 11: stop and go on
@pytest.mark.parametrize(
    "options",
    [
        {"update": Momentum(0.9), "transforms": DI(0.8, 0.7)},
        {"update": [Nesterov(1.0), Variance(2)], "agm_every": 2},
        {"agm": "per_sample", "agm_every": 0, "start": "uniform"},
        {"target": "random"},
        {"norm": "l2", "update": Momentum()},
    ],
    ids=["mi-di", "vni", "first", "random", "l2"],
)
def test_a_stopped_attack_goes_on_to_the_same_end(nets, batch, options, tmp_path):
    x, y = batch(2)
    models = nets(3)
    whole, trace = AdaEA(models, steps=5, **options)(x, y, trace=True)
    half, first = AdaEA(models, steps=2, **options)(x, y, trace=True)
    first.state.save(tmp_path / "state.npz")
    state = type(first.state).load(tmp_path / "state.npz")
    rest, last = AdaEA(models, steps=3, **options)(x, y, trace=True, state=state)
    assert not torch.equal(half, whole)
    assert torch.equal(rest, whole)
    assert torch.equal(torch.cat([first.weights, last.weights]), trace.weights)
    assert int(last.state.step) == 5


# 12: mirrored images
def test_mirrored_images_give_mirrored_attacks(nets, batch):
    x, y = batch(2)
    noise = torch.randn(x.shape, generator=generator(0), dtype=x.dtype)
    attack = AdaEA(nets(3, symmetric=True), steps=4, update=Momentum())
    adv = attack(x, y, draws=Recorded(generator(0), noise=noise))
    turned = attack(x.flip(-1), y, draws=Recorded(generator(0), noise=noise.flip(-1)))
    torch.testing.assert_close(turned.flip(-1), adv, rtol=0, atol=1e-9)
    other = AdaEA(nets(3), steps=4)(x.flip(-1), y, draws=Recorded(generator(0), noise=noise.flip(-1)))
    assert (other.flip(-1) - AdaEA(nets(3), steps=4)(x, y, draws=Recorded(generator(0), noise=noise))).any()


# 14: a constant on all logits
@pytest.mark.parametrize("fusion", ["logits", "probs", "loss"])
def test_a_constant_on_the_logits_changes_nothing(nets, batch, fusion):
    x, y = batch(2)
    models = nets(3)
    attack = AdaEA(models, steps=3, fusion=fusion)
    shifted = models | {"net1": lambda images: models["net1"](images) + 7.0}
    models["net1"].eval()
    torch.testing.assert_close(attack(x, y, surrogates=shifted), attack(x, y), rtol=0, atol=1e-9)


# 15: the chunk
@pytest.mark.parametrize("chunk", [1, 2, 5, 6, 100])
def test_the_chunk_of_candidates_changes_nothing(nets, batch, chunk):
    x, y = batch(2)
    attack = AdaEA(nets(3), steps=3)
    adv, trace = attack(x, y, trace=True)
    again, other = attack.with_(agm_batch_size=chunk)(x, y, trace=True)
    torch.testing.assert_close(again, adv, rtol=0, atol=1e-9)
    torch.testing.assert_close(other.weights, trace.weights, rtol=0, atol=1e-10)


def test_candidate_losses_are_those_of_single_calls(nets, batch):
    x, y = batch(2)
    moved = torch.stack([x, 1 - x, x.flip(-1)])
    with prepared(nets(3), None) as models:
        found, _ = candidate_losses(models, moved, y, chunk=4)
        for i, model in enumerate(models):
            for j in range(3):
                torch.testing.assert_close(found[i, j], cross_entropy(model(moved[j]), y))


# the pieces
@quick
@given(arrays("float64", (2, 3, 2, 2), elements=st.floats(-5, 5)), st.floats(0.01, 1))
def test_a_step_has_its_length(direction, alpha):
    direction = torch.from_numpy(direction)
    linf, l2 = step(direction, alpha), step(direction, alpha, "l2")
    moved = direction != 0
    torch.testing.assert_close(linf[moved].abs(), torch.full_like(linf[moved], alpha))
    assert not linf[~moved].any()
    lengths = l2.flatten(1).norm(dim=1)
    for length, image in zip(lengths.tolist(), direction, strict=True):
        assert length == pytest.approx(alpha if image.any() else 0.0, rel=1e-6)


@quick
@given(st.integers(0, 2**32), st.integers(2, 40), st.floats(0.3, 1.7))
def test_resize_draws_stay_on_the_canvas(seed, side, rate):
    other = int(rate * side)
    if other in (0, side):
        return
    sides, canvas = DI(rate, 1.0).plan(side, side)
    draws = Draws(generator(seed))
    r, top, left, u = draws.resize(sides, canvas, (side, side), step=0, surrogate=0)
    assert min(side, other) <= r < max(side, other) == canvas
    assert 0 <= top < canvas - r
    assert 0 <= left < canvas - r
    assert 0 <= u < 1
    out = DI(rate, 1.0).apply(torch.ones(1, 1, side, side), (r, top, left, 0.0))
    assert out.shape[-2:] == (canvas, canvas)
    assert out.sum() == pytest.approx(r * r, rel=1e-5)


@quick
@given(st.integers(1, 20), st.sampled_from(["gaussian", "linear", "uniform"]), st.booleans())
def test_kernels_sum_to_one_and_are_even(size, kind, rounded):
    kernel = smoothing_kernel(size, kind, rounded=rounded)
    assert kernel.sum().item() == pytest.approx(1.0, abs=1e-6)
    torch.testing.assert_close(kernel, kernel.flip(0), rtol=0, atol=1e-7)
    torch.testing.assert_close(kernel, kernel.T)


@quick
@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 99))
def test_partners_are_other_images(size, count, seed):
    partners = Draws(generator(seed)).partners(size, count)
    assert partners.shape == (count, size)
    own = torch.arange(size)
    assert ((partners >= 0) & (partners < size)).all()
    assert (partners != own).all() if size > 1 else (partners == 0).all()
