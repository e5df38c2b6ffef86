"""Derivatives by gradcheck, closed forms, the optimisers' answers to a gradient, and low precision."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck
from torch.nn import functional as F

import kd_trilateral as kdt
from kd_trilateral.directional import logit_gradient
from kd_trilateral.geometry import presets
from kd_trilateral.losses import generalized_ce, kd_terms, mix, standardize


def draw(*shape, seed=0, scale=1.0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=generator, dtype=torch.float64).to(device)


def leaf(*shape, **options):
    return draw(*shape, **options).requires_grad_()


LABELS = torch.tensor([0, 2, 1, 2])

# ---------------------------------------------------------------- geometry, terms, networks


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("preset", sorted(presets()))
def test_features(preset, classes):
    """The vertices stay interior: softmax of moderate logits, and a smoothed label."""
    y = LABELS % classes

    def phi(zs, zt, zo, g):
        return kdt.features(zs.softmax(-1), zt.softmax(-1), g, zo.softmax(-1), preset)

    g = (0.8 * F.one_hot(y, classes) + 0.2 / classes).double().requires_grad_()
    inputs = [leaf(4, classes, seed=i) for i in range(3)]
    assert gradcheck(phi, (*inputs, g))


VARIANTS = {
    "multiclass": {},
    "hot": {"temperature": 50.0},  # the other branch of the divergence
    "ce_on": {"ce_on": "probs"},
    "label_smoothing": {"label_smoothing": 0.1},
    "class_weight": {"class_weight": torch.tensor([0.5, 1.0, 2.0])},
    "standardize_logits": {"standardize_logits": True},
    "ignored": {"ignore_index": 2},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_kd_terms(options):
    options = {"temperature": 2.0, **options}
    terms = lambda zs, zt: kd_terms(zs, zt, LABELS, **options)
    assert gradcheck(terms, (leaf(4, 3, scale=2.0), leaf(4, 3, seed=1, scale=2.0)))


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 2)])
def test_binary_kd_terms(shape):
    terms = lambda zs, zt: kd_terms(zs, zt, LABELS % 2, 2.0, task="binary")
    assert gradcheck(terms, (leaf(*shape, scale=2.0), leaf(*shape, seed=1, scale=2.0)))


def test_mix():
    inputs = leaf(4), leaf(4, seed=1), leaf(4, seed=2)
    assert gradcheck(lambda a, kl, ce: mix(a.sigmoid(), kl, ce), inputs)
    assert gradcheck(mix, (torch.tensor(0.3, dtype=torch.float64, requires_grad=True), *inputs[1:]))


@pytest.mark.parametrize("shape", ["tgeo", "cifar", "criteo"])
@pytest.mark.parametrize("prior", [False, True])
def test_ratio_net(shape, prior):
    net = kdt.RatioNet(6, shape, alpha_range=(0.1, 0.8), hidden=[4], seed=0).double()
    prior = torch.tensor([0.2, 0.9, 0.5, 0.6], dtype=torch.float64, requires_grad=True) if prior else None
    names = [name for name, _ in net.named_parameters()]

    def alpha(phi, prior, *values):
        given = dict(zip(names, values, strict=True))
        return torch.func.functional_call(net, given, (phi, prior))

    assert gradcheck(alpha, (leaf(4, 6), prior, *net.parameters()))


@pytest.mark.parametrize("q", [0.1, 0.7, 1.0])
def test_generalized_ce(q):
    z = leaf(4, 3)
    assert gradcheck(lambda logits: generalized_ce(logits, LABELS, q), z)
    expected = ((1 - z.softmax(-1)[torch.arange(4), LABELS] ** q) / q).mean()
    torch.testing.assert_close(generalized_ce(z, LABELS, q), expected)


def test_generalized_ce_tends_to_cross_entropy():
    z = draw(4, 3)
    torch.testing.assert_close(generalized_ce(z, LABELS, 1e-7), F.cross_entropy(z, LABELS), rtol=1e-5, atol=0)


def test_standardize():
    assert gradcheck(standardize, leaf(4, 5))
    z = standardize(draw(4, 5, scale=9.0) + 3.0)
    torch.testing.assert_close(z.mean(-1), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(z.std(-1), torch.ones(4, dtype=torch.float64), rtol=1e-6, atol=0)


# ---------------------------------------------------------------- closed forms and edges


@pytest.mark.parametrize("tau", [0.5, 1.0, 4.0, 1000.0])
def test_logit_gradient_is_the_closed_form(device, tau):
    zs, zt = draw(4, 3, scale=3.0, device=device), draw(4, 3, seed=1, scale=3.0, device=device)
    labels = LABELS.to(device)
    found = logit_gradient(lambda a, b, y: kd_terms(a, b, y, tau), zs, zt, labels)
    p, q = (zs / tau).softmax(-1), (zt / tau).softmax(-1)
    expected = tau * (p - q) - (zs.softmax(-1) - F.one_hot(labels, 3))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


def test_hot_divergence_does_not_cancel():
    """At tau = 1000 the plain sum of p log(p/q) in float32 has lost its digits; ours has not."""
    zs, zt = draw(64, 10, scale=2.0), draw(64, 10, seed=1, scale=2.0)
    y = torch.zeros(64, dtype=torch.int64)
    exact, _ = kd_terms(zs, zt, y, 1000.0)
    q, p = (zt / 1000).double().softmax(-1), (zs / 1000).double().log_softmax(-1)
    torch.testing.assert_close(exact, 1e6 * (q * (q.log() - p)).sum(-1), rtol=1e-6, atol=0)
    ours, _ = kd_terms(zs.float(), zt.float(), y, 1000.0)
    log_q, log_p = ((z.float() / 1000).log_softmax(-1) for z in (zt, zs))
    naive = 1e6 * (log_q.exp() * (log_q - log_p)).sum(-1)
    error = lambda found: ((found.double() - exact).abs() / exact).max()
    assert error(naive) > 1e-2
    assert error(ours) < 1e-5


@pytest.mark.parametrize("distance", [1e-1, 1e-3, 1e-5])
def test_small_divergences_keep_their_digits_and_sign(distance):
    zt = draw(64, 10).float()
    zs = zt + distance * draw(64, 10, seed=1).float()
    y = torch.zeros(64, dtype=torch.int64)
    found, _ = kd_terms(zs, zt, y, 1000.0)
    q = (zt.double() / 1000).softmax(-1)
    difference = (zt.double() - zs.double()) / 1000
    x = difference - (q * difference).sum(-1, keepdim=True)
    expected = 1e6 * (q * (x**2 / 2 - x**3 / 6 + x**4 / 24 - x**5 / 120)).sum(-1)
    assert (found > 0).all()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("tau", [1.0, 4.0, 1000.0])
def test_both_forms_of_the_divergence_meet(tau):
    """Just inside and outside the switch between the forms, value and gradient go on smoothly."""
    zt = draw(1, 5)
    steps = torch.linspace(0.8, 1.3, 101, dtype=torch.float64)
    direction = draw(1, 5, seed=1)
    x = -direction + (zt / tau).softmax(-1) @ direction.T
    unit = 0.5 * tau / x.abs().max()
    zs = (zt + unit * steps[:, None] * direction).requires_grad_()
    kl, _ = kd_terms(zs, zt.expand_as(zs), torch.zeros(101, dtype=torch.int64), tau)
    log_q, log_p = (zt / tau).log_softmax(-1), (zs / tau).log_softmax(-1)
    torch.testing.assert_close(kl, tau**2 * (log_q.exp() * (log_q - log_p)).sum(-1), rtol=1e-7, atol=0)
    (gradient,) = torch.autograd.grad(kl.sum(), zs)
    torch.testing.assert_close(gradient, tau * (log_p.exp() - log_q.exp()), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_saturated_logits_have_finite_gradients(dtype):
    z = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0], [0.0, 0.0, 0.0]], dtype=dtype, requires_grad=True)
    zt = torch.tensor([[-1e4, 1e4, 0.0]] * 3, dtype=dtype)
    kl, ce = kd_terms(z, zt, torch.tensor([1, 1, 0]), 2.0)
    (kl + ce).sum().backward()
    assert torch.isfinite(kl).all()
    assert torch.isfinite(ce).all()
    assert torch.isfinite(z.grad).all()
    phi = kdt.features(z.softmax(-1), zt.softmax(-1), torch.eye(3, dtype=dtype), zt.softmax(-1), "compact")
    assert torch.isfinite(phi).all()


def test_alpha_has_a_gradient_to_omega_and_none_to_the_student(problem):
    p = problem()
    out = p.loss(p.logits(), p.zt, p.y)
    assert not out.context.phi.requires_grad
    found = torch.autograd.grad(out.alpha.sum(), list(p.student.parameters()), allow_unused=True)
    assert found == (None,) * 4
    out.loss.backward()
    assert all(q.grad is None for q in p.loss.parameters())
    assert all(q.grad is not None for q in p.student.parameters())


# ---------------------------------------------------------------- preconditioner

OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"weight_decay": 0.1}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "dampening": (torch.optim.SGD, {"momentum": 0.9, "dampening": 0.4}),
    "nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
}


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("key", OPTIMIZERS)
def test_preconditioner_of_sgd_is_the_derivative_of_its_step(key, steps):
    kind, options = OPTIMIZERS[key]
    v = draw(3, 2, seed=9)

    def run(shift):
        w = nn.Parameter(draw(3, 2))
        optimizer = kind([w], lr=0.1, **options)
        for i in range(steps):
            w.grad = draw(3, 2, seed=i + 1) + (shift * v if i == steps - 1 else 0.0)
            optimizer.step()
        return w, optimizer

    h = 1e-4  # the step is affine in the gradient, so the difference is exact up to rounding
    numeric = -(run(h)[0] - run(-h)[0]).detach() / (2 * h)
    _, optimizer = run(0.0)
    (found,) = kdt.precondition([v], optimizer, first_step=steps == 1)
    torch.testing.assert_close(found, numeric, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_preconditioner_of_adam_holds_the_second_moment(kind, amsgrad, steps):
    """The derivative of the step with vhat held: theta' = decay(theta) - lr mhat(g) / (sqrt(vhat) + eps)."""
    beta1, beta2, eps, lr, decay = 0.8, 0.95, 1e-3, 0.1, 0.01
    w = nn.Parameter(draw(3, 2))
    options = {"betas": (beta1, beta2), "eps": eps, "weight_decay": decay, "amsgrad": amsgrad}
    optimizer = kind([w], lr=lr, **options)
    coupled = kind is torch.optim.Adam
    first, second, largest = (torch.zeros(3, 2, dtype=torch.float64) for _ in range(3))
    for k in range(1, steps + 1):
        w.grad = draw(3, 2, seed=k, scale=3.0 / k)  # falling, so that the running maximum matters
        theta, raw, old = w.detach().clone(), w.grad.clone(), first.clone()
        gradient = raw + decay * theta * coupled
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient**2
        largest = torch.maximum(largest, second)
        optimizer.step()
    vhat = (largest if amsgrad else second) / (1 - beta2**steps)

    def step(g):
        mean = beta1 * old + (1 - beta1) * (g + decay * theta * coupled)
        decayed = theta if coupled else theta * (1 - lr * decay)
        return decayed - lr * mean / (1 - beta1**steps) / (vhat.sqrt() + eps)

    torch.testing.assert_close(step(raw), w.detach(), rtol=1e-9, atol=1e-12)  # it is the optimiser's step
    v = draw(3, 2, seed=9)
    numeric = -(step(raw + 1e-4 * v) - step(raw - 1e-4 * v)) / 2e-4
    torch.testing.assert_close(kdt.precondition([v], optimizer)[0], numeric, rtol=1e-8, atol=1e-10)


def test_preconditioner_knows_groups_and_strangers():
    a, b, c = (nn.Parameter(draw(2, seed=i)) for i in range(3))
    optimizer = torch.optim.SGD([{"params": [a], "lr": 0.5}, {"params": [b], "lr": 0.25}], lr=1.0)
    v = [torch.ones(2, dtype=torch.float64)] * 3
    found = kdt.precondition(v, optimizer, [b, c, a])
    assert [float(x[0]) for x in found] == [0.25, 0.0, 0.5]


@pytest.mark.parametrize("key", ["sgd", "momentum", "dampening", "nesterov", "adam", "adamw", "amsgrad"])
@pytest.mark.parametrize("engine", ["jvp", "fd"])
def test_bilevel_follows_the_optimizer(problem, relative_error, key, engine):
    """C of the second step against the difference of held-out losses, statistics held by hand."""
    adam = {
        "adam": (torch.optim.Adam, {"weight_decay": 0.1}),
        "adamw": (torch.optim.AdamW, {"weight_decay": 0.1}),
        "amsgrad": (torch.optim.Adam, {"amsgrad": True}),
    }
    kind, options = {**OPTIMIZERS, **adam}[key]
    p = problem()
    bilevel = p.bilevel(engine, kind(p.student.parameters(), lr=0.05, **options), outer_lr=0.0)
    p.step(bilevel)
    theta = copy.deepcopy(p.student)
    p.step(bilevel)
    after = list(p.student.parameters())
    v = torch.autograd.grad(F.cross_entropy(p.student(p.xv), p.yv), after)
    pv = kdt.precondition(v, bilevel.optimizer)
    h = 1e-5
    ahead, behind = (copy.deepcopy(theta) for _ in range(2))
    with torch.no_grad():
        for model, sign in ((ahead, 1.0), (behind, -1.0)):
            for q, d in zip(model.parameters(), pv, strict=True):
                q += sign * h * d
        (kl1, ce1), (kl0, ce0) = (kd_terms(m(p.x), p.zt, p.y, 2.0) for m in (ahead, behind))
    expected = ((kl1 - ce1) - (kl0 - ce0)) / (2 * h)
    assert relative_error(bilevel.last_c, expected) < 1e-6


# ---------------------------------------------------------------- low precision


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("engine", ["jvp", "fd", "fd1", "head", "unrolled", "neumann", "joint", "val_mix"])
def test_students_in_low_precision_run(problem, device, engine, dtype):
    p = problem(device=device, dtype=dtype)
    bilevel = p.bilevel(engine)
    before = copy.deepcopy(p.loss.network.state_dict())
    for _ in range(3):
        out = p.step(bilevel)
    assert out.loss.dtype == torch.float32
    assert torch.isfinite(out.loss)
    if engine not in ("joint", "val_mix"):
        assert bilevel.last_c.dtype == torch.float32
        assert torch.isfinite(bilevel.last_c).all()
    assert bilevel.outer.skipped == 0
    after = p.loss.network.state_dict()
    assert any(not torch.equal(after[k], before[k]) for k in before)
    assert all(q.dtype == dtype and torch.isfinite(q).all() for q in p.student.parameters())


@pytest.mark.parametrize("engine", ["jvp", "head", "unrolled"])
def test_bfloat16_c_is_near_the_float64_one(problem, relative_error, device, engine):
    c = {}
    for dtype in (torch.bfloat16, torch.float64):
        p = problem(device=device, dtype=dtype)
        bilevel = p.bilevel(engine)
        p.step(bilevel)
        c[dtype] = bilevel.last_c.double()
    assert relative_error(c[torch.bfloat16], c[torch.float64]) < 0.1


@pytest.mark.parametrize("engine", ["jvp", "fd", "fd1"])
def test_c_stays_in_float32_under_autocast(problem, relative_error, device, engine):
    """The training forward rounds its logits to bfloat16; the differences must not use those."""
    c = {}
    for cast in (False, True):
        p = problem(device=device, dtype=torch.float32)
        bilevel = p.bilevel(engine, torch.optim.SGD(p.student.parameters(), lr=1e-3))
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16, enabled=cast):
            out = p.loss(p.student(p.x), p.zt, p.y)
        out.loss.backward()
        bilevel.step(p.x, out)
        c[cast] = bilevel.last_c
    assert relative_error(c[True], c[False]) < 2e-2
