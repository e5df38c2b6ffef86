"""What each setting means; where the authors' code and the paper part ways, both sides."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kd_trilateral as kdt
from fusion_core.checkpoint import load_tensors, save_tensors
from fusion_core.errors import FusionWarning
from kd_trilateral.losses import kd_terms, mix

PLAIN_OUTER = {"max_grad_norm": None}


def omega_of(p):
    return [q.detach().clone() for q in p.loss.parameters()]


def outer_sgd(p, lr=0.5, **options):
    return torch.optim.SGD(p.loss.parameters(), lr=lr, **options)


def moved(before, p):
    return [a - b for a, b in zip(p.loss.parameters(), before, strict=True)]


# ---------------------------------------------------------------- paper versus published code


def test_omega_is_trained_unless_frozen(problem):
    for engine, trained in (("jvp", True), ("frozen", False)):
        p = problem()
        before = omega_of(p)
        p.step(p.bilevel(engine))
        assert any(bool(d.abs().max() > 0) for d in moved(before, p)) == trained


def test_ce_on_probs_is_the_double_softmax(problem):
    p = problem()
    z = 40.0 * F.one_hot(p.y, 3).double()
    _, right = kd_terms(z, p.zt, p.y, 2.0)
    _, double = kd_terms(z, p.zt, p.y, 2.0, ce_on="probs")
    assert right.max() < 1e-12
    torch.testing.assert_close(double, torch.full_like(double, math.log(1 + 2 / math.e)))
    out = {on: problem(ce_on=on).loss(z, p.zt, p.y) for on in ("logits", "probs")}
    assert torch.equal(out["logits"].ce, right)
    assert torch.equal(out["probs"].ce, double)


def test_joint_descends_the_training_loss(problem):
    p, still = problem(), problem()
    before = omega_of(p)
    p.step(p.bilevel("joint", outer_optimizer=outer_sgd(p), every=7, val_batches=None, **PLAIN_OUTER))
    out = still.loss(still.logits(), still.zt, still.y)
    loss = mix(out.alpha, out.kl.detach(), out.ce.detach()).mean()
    slope = torch.autograd.grad(loss, list(still.loss.parameters()))
    for d, g in zip(moved(before, p), slope, strict=True):
        torch.testing.assert_close(d, -0.5 * g, rtol=1e-9, atol=1e-12)
    hyper = problem()
    hyper.step(hyper.bilevel("jvp", outer_optimizer=outer_sgd(hyper), **PLAIN_OUTER))
    assert not torch.allclose(moved(before, hyper)[-1], moved(before, p)[-1])
    for a, b in zip(p.student.parameters(), hyper.student.parameters(), strict=True):
        assert torch.equal(a, b)  # the student's own step is the same


def test_joint_keeps_nothing_of_the_warmup(problem):
    p, late = problem(), problem()
    bilevel = p.bilevel("joint", warmup_steps=2, outer_optimizer=outer_sgd(p), **PLAIN_OUTER)
    for _ in range(2):
        p.step(bilevel)
    assert bilevel.outer_steps == 0
    late.student.load_state_dict(p.student.state_dict())
    late.step(late.bilevel("joint", outer_optimizer=outer_sgd(late), **PLAIN_OUTER))
    p.step(bilevel)
    for a, b in zip(p.loss.parameters(), late.loss.parameters(), strict=True):
        assert torch.equal(a, b)


def test_val_mix_descends_the_mixed_loss_of_held_out_rows(problem):
    p = problem(dropout=0.5, input_norm=True)
    before, buffers = omega_of(p), copy.deepcopy(dict(p.loss.named_buffers()))
    bilevel = p.bilevel("val_mix", outer_optimizer=outer_sgd(p), **PLAIN_OUTER)
    reference = copy.deepcopy(p.loss).eval()
    train_out = p.loss(p.logits(), p.zt, p.y)
    reference.network.norm.load_state_dict(p.loss.network.norm.state_dict())
    train_out.loss.backward()
    bilevel.step(p.x, train_out)
    out = reference(p.student(p.xv), p.ztv, p.yv)
    loss = mix(out.alpha, out.kl.detach(), out.ce.detach()).mean()
    for d, g in zip(moved(before, p), torch.autograd.grad(loss, list(reference.parameters())), strict=True):
        torch.testing.assert_close(d, -0.5 * g, rtol=1e-9, atol=1e-12)
    assert p.loss.training
    assert float(p.loss.network.norm.count) == float(buffers["network.norm.count"]) + 6


def test_each_sample_has_its_own_ratio(problem):
    """The published (B, 1) against (B,) made the loss that of the mean ratio."""
    p = problem()
    out = p.loss(p.logits(), p.zt, p.y)
    own = (out.alpha * out.kl + (1 - out.alpha) * out.ce).mean()
    averaged = (out.alpha[:, None] * out.kl + (1 - out.alpha[:, None]) * out.ce).mean()
    torch.testing.assert_close(out.loss, own.detach(), check_dtype=False)
    assert (averaged - own).abs().item() > 1e-6
    for i in range(6):
        alone = p.loss(p.logits()[i : i + 1], p.zt[i : i + 1], p.y[i : i + 1])
        torch.testing.assert_close(alone.alpha, out.alpha[i : i + 1])


def test_kl_is_batchmean_times_tau_squared(problem):
    p = problem()
    q, log_p = (p.zt / 2.0).softmax(-1), (p.logits() / 2.0).log_softmax(-1)
    kl = p.loss(p.logits(), p.zt, p.y).kl.mean()
    torch.testing.assert_close(kl, 4.0 * F.kl_div(log_p, q, reduction="batchmean"))
    torch.testing.assert_close(kl, 4.0 * 3 * F.kl_div(log_p, q, reduction="none").mean())


def test_anl_falls_linearly_from_one_to_zero(problem):
    p = problem(ratio="anl", total_steps=4)
    bilevel = p.bilevel(val_batches=None)
    alphas = [p.step(bilevel).alpha.unique().item() for _ in range(6)]
    assert alphas == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    p.loss.eval()
    assert p.loss(p.logits(), p.zt, p.y).alpha.unique().item() == 0.0


def test_rw_is_free_per_sample_and_stays_in_the_unit_interval(problem):
    p = problem(ratio="rw", num_samples=9)
    bilevel = p.bilevel("jvp", outer_lr=5.0, val_batches=None)
    assert bilevel.engine == "joint"
    ids = torch.tensor([0, 2, 4, 5, 7, 8])
    for _ in range(4):
        out = p.loss(p.logits(), p.zt, p.y, sample_id=ids)
        bilevel.optimizer.zero_grad()
        out.loss.backward()
        bilevel.step(p.x, out)
    weights = p.loss.free_logit.sigmoid()
    assert ((weights >= 0) & (weights <= 1)).all()
    assert (weights[ids] != 0.5).all()
    assert (weights[torch.tensor([1, 3, 6])] == 0.5).all()
    assert torch.equal(weights[ids] > 0.5, out.kl < out.ce)  # it picks the smaller of the two


@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_decay_of_omega(problem, decay):
    """A student that does not move gives c = 0: without decay omega stays, with the authors' it shrinks."""
    p = problem()
    before = omega_of(p)
    options = {} if not decay else {
        "outer_optimizer": torch.optim.Adam(p.loss.parameters(), lr=0.1, weight_decay=decay)
    }  # fmt: skip
    bilevel = p.bilevel("jvp", p.sgd(0.0), **options)
    p.step(bilevel)
    assert not bilevel.last_c.any()
    assert any(bool(d.any()) for d in moved(before, p)) == bool(decay)
    default = problem().bilevel().outer.optimizer
    assert isinstance(default, torch.optim.AdamW)
    assert default.param_groups[0]["weight_decay"] == 0.0


def test_state_travels_without_pickles(problem, tmp_path):
    p, other = problem(), problem(seed=1)
    p.step(p.bilevel())
    save_tensors(tmp_path / "ratio.safetensors", p.loss.state_dict())
    fresh = kdt.TrilateralKD(3, preset="paper", temperature=2.0).double()
    fresh.load_state_dict(load_tensors(tmp_path / "ratio.safetensors"))
    inputs = other.logits(), other.zt, other.y
    assert torch.equal(fresh(*inputs).alpha, p.loss(*inputs).alpha)  # T-bar counts as fitted


def test_other_dtypes_of_teacher_and_labels_are_taken(problem, device):
    p = problem(device=device, dtype=torch.float32)
    zt = p.zt.half()
    plain = p.loss(p.logits(), zt.float(), p.y)
    assert torch.equal(p.loss(p.logits(), zt.cpu(), p.y.to(torch.int32).cpu()).loss, plain.loss)


def test_the_teacher_gets_no_gradient(problem):
    p = problem()
    teacher = nn.Linear(5, 3).double()
    out = p.loss(p.logits(), teacher(p.x), p.y)
    out.loss.backward()
    assert teacher.weight.grad is None
    assert not out.context.teacher_logits.requires_grad


# ---------------------------------------------------------------- scaler, optimisers, unsound numbers


@pytest.mark.parametrize("engine", ["jvp", "joint"])
def test_grad_scaler(problem, engine):
    scaled, plain = problem(dtype=torch.float32), problem(dtype=torch.float32)
    bilevels = [q.bilevel(engine, outer_optimizer=outer_sgd(q), **PLAIN_OUTER) for q in (scaled, plain)]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = omega_of(scaled)

    def step(spoil=False):
        out = scaled.loss(scaled.logits(), scaled.zt, scaled.y)
        bilevels[0].optimizer.zero_grad()
        scaler.scale(out.loss).backward()
        if spoil:
            next(scaled.student.parameters()).grad.fill_(float("inf"))
        bilevels[0].step(scaled.x, out, scaler)

    student = copy.deepcopy(scaled.student.state_dict())
    step(spoil=True)
    assert scaler.get_scale() == 512.0
    assert bilevels[0].outer_steps == 0
    assert bilevels[0].steps == 1
    assert all(torch.equal(a, student[k]) for k, a in scaled.student.state_dict().items())
    assert not any(d.any() for d in moved(before, scaled))
    step()
    plain.step(bilevels[1])
    assert bilevels[0].outer_steps == 1
    for a, b in zip(moved(before, scaled), moved(before, plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-8)
    assert any(bool(d.any()) for d in moved(before, scaled))


def test_an_unknown_optimizer_is_taken_as_plain_descent(problem):
    c = {}
    for kind in (torch.optim.RMSprop, torch.optim.SGD):
        p = problem()
        bilevel = p.bilevel(
            "jvp", kind(p.student.parameters(), lr=0.01), precondition=kind is torch.optim.RMSprop
        )
        if kind is torch.optim.RMSprop:
            with pytest.warns(FusionWarning, match=r"no preconditioner is known for RMSprop.*lr times"):
                p.step(bilevel)
            moved_to = copy.deepcopy(p.student.state_dict())
        else:
            out = p.loss(p.logits(), p.zt, p.y)
            out.loss.backward()
            bilevel.before_optimizer_step(p.x, out)
            p.student.load_state_dict(moved_to)
            bilevel.after_optimizer_step(p.x, out)
        c[kind] = bilevel.last_c
    torch.testing.assert_close(c[torch.optim.RMSprop], 0.01 * c[torch.optim.SGD])


def test_unsound_outer_steps_are_skipped_counted_and_end_the_run(problem):
    p, factor = problem(), {"is": float("nan")}
    outer = lambda z, y: F.cross_entropy(z, y) * factor["is"]
    bilevel = p.bilevel(outer_loss=outer)
    before = omega_of(p)
    for k in range(1, 20):
        p.step(bilevel)
        assert bilevel.outer.skipped == k
    assert not any(d.any() for d in moved(before, p))
    factor["is"] = 1.0
    p.step(bilevel)
    assert bilevel.outer.skipped == 0
    assert any(d.any() for d in moved(before, p))
    factor["is"] = float("inf")
    for _ in range(19):
        p.step(bilevel)
    with pytest.raises(kdt.DivergedError, match=r"20 outer steps in a row.*non-finite.*lower"):
        p.step(bilevel)
    assert all(torch.isfinite(q).all() for q in p.loss.parameters())


def test_neumann_of_one_term_takes_v_at_the_old_parameters(problem):
    p = problem()
    bilevel = p.bilevel("neumann", neumann_terms=1)
    gradient = torch.autograd.grad(F.cross_entropy(p.student(p.xv), p.yv), list(p.student.parameters()))
    v = {n: 0.1 * g for (n, _), g in zip(p.student.named_parameters(), gradient, strict=True)}
    batch = p.x, p.zt, p.y
    expected = kdt.per_sample_directional(copy.deepcopy(p.student), None, v, batch, temperature=2.0)
    p.step(bilevel)
    torch.testing.assert_close(bilevel.last_c, expected)


@pytest.mark.parametrize("center", [False, True])
def test_normalize_and_center(problem, center):
    p = problem()
    before = omega_of(p)
    out = p.step(bilevel := p.bilevel(center=center, outer_optimizer=outer_sgd(p), **PLAIN_OUTER))
    c = bilevel.last_c - bilevel.last_c.mean() * center
    still = problem()
    alpha = still.loss(still.logits(), still.zt, still.y).alpha
    assert torch.equal(alpha, out.alpha)
    slope = torch.autograd.grad(-(c / c.abs().mean() * alpha).mean(), list(still.loss.parameters()))
    for d, g in zip(moved(before, p), slope, strict=True):
        torch.testing.assert_close(d, -0.5 * g, rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------- ratios and the network's options


def test_heuristics(problem):
    def alpha(**options):
        p = problem(**options)
        bilevel = p.bilevel(val_batches=None)
        assert bilevel.engine == "frozen"
        return p, p.step(bilevel).alpha

    p, found = alpha(ratio="const", alpha=0.3)
    assert torch.equal(found, torch.full_like(found, 0.3))
    p, found = alpha(ratio="ada")
    t_y = p.zt.softmax(-1)[torch.arange(6), p.y]
    torch.testing.assert_close(found, (t_y - (1 - t_y) / 2).clamp_min(0))
    p = problem(ratio="wls")
    student, teacher = (F.cross_entropy(z, p.y, reduction="none") for z in (p.logits(), p.zt))
    torch.testing.assert_close(alpha(ratio="wls")[1], 1 - torch.exp(-student / teacher))
    p, found = alpha(ratio=lambda context: context.vertices[1].amax(-1))
    assert torch.equal(found, p.zt.softmax(-1).amax(-1))


@pytest.mark.parametrize("prior", ["const", "ada", "wls"])
def test_priors(problem, prior):
    heuristic = problem(ratio=prior, alpha=0.8)
    expected = heuristic.loss(heuristic.logits(), heuristic.zt, heuristic.y).alpha
    p = problem(prior=prior, alpha=0.8, init_alpha=0.5)
    found = p.loss(p.logits(), p.zt, p.y).alpha
    limit = 1 / (1 + math.exp(-4))
    torch.testing.assert_close(found.detach(), expected.clamp(1 - limit, limit), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("init", "span"), [(0.5, (0.0, 1.0)), (0.3, (0.2, 0.6)), (0.9, (0.5, 1.0))])
def test_init_alpha_and_alpha_range(problem, init, span):
    p = problem(init_alpha=init, alpha_range=span)
    found = p.loss(p.logits(), p.zt, p.y).alpha
    torch.testing.assert_close(found.detach(), torch.full_like(found, init))
    with torch.no_grad():
        p.loss.network.net[-1].bias.fill_(1e6)
    assert p.loss(p.logits(), p.zt, p.y).alpha.max().item() == pytest.approx(span[1])


def test_input_norm_uses_all_rows_so_far(problem):
    p = problem(input_norm=True, geometry="compact")
    norm, seen = p.loss.network.norm, []
    for start, stop in ((0, 1), (1, 4), (4, 6)):
        rows = slice(start, stop)
        seen.append(p.loss(p.logits()[rows], p.zt[rows], p.y[rows]).context.phi)
    every = torch.cat(seen)
    torch.testing.assert_close(norm.mean, every.mean(0))
    torch.testing.assert_close(norm.m2, (every - every.mean(0)).square().sum(0))
    p.loss.eval()
    scaled = norm(every)
    torch.testing.assert_close(scaled.mean(0), torch.zeros(18, dtype=torch.float64), rtol=0, atol=1e-9)
    varying = every.std(0) > 1e-9
    torch.testing.assert_close(scaled.std(0, correction=0)[varying], torch.ones_like(every[0][varying]))
    assert float(norm.count) == 6


def test_dropout_of_the_ratio_network(problem):
    p = problem(dropout=0.5)
    alpha = lambda: p.loss(p.logits(), p.zt, p.y).alpha
    assert not torch.equal(alpha(), alpha())
    p.loss.eval()
    assert torch.equal(alpha(), alpha())


OFFICIAL = {
    "tgeo": ({"fc1": (32, 27), "fc2": (16, 32), "fc3": (1, 16)}, "", F.leaky_relu),
    "cifar": ({"reweighting.0": (128, 27), "reweighting.2": (1, 128)}, "module.", F.relu),
    "criteo": ({"linear1": (8, 27), "linear2": (1, 8)}, "", F.relu),
}


@pytest.mark.parametrize("kind", OFFICIAL)
def test_from_official(kind):
    layers, prefix, activation = OFFICIAL[kind]
    state, generator = {}, torch.Generator().manual_seed(0)
    for name, shape in layers.items():
        state[f"{prefix}{name}.weight"] = torch.randn(shape, generator=generator)
        if name != "linear2":
            state[f"{prefix}{name}.bias"] = torch.randn(shape[0], generator=generator)
    phi = torch.randn(4, 27, generator=generator)
    hidden = phi
    for i, name in enumerate(layers):
        hidden = activation(hidden) if i else hidden
        bias = state.get(f"{prefix}{name}.bias", 0.0)
        hidden = hidden @ state[f"{prefix}{name}.weight"].T + bias
    if kind == "cifar":  # it lives inside the student, whose own names must not be mistaken for it
        for i in (0, 2, 4):
            state[f"module.net.{i}.weight"], state[f"module.net.{i}.bias"] = torch.zeros(3, 3), torch.zeros(3)
        state["module.layer1.0.bn.num_batches_tracked"] = torch.tensor(3)
    net = kdt.RatioNet.from_official(state)
    torch.testing.assert_close(net(phi), torch.sigmoid(hidden.squeeze(-1)))
