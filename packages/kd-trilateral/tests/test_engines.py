"""The engines on students of every kind: batch norm, dropout, attention, tied weights, odd outputs."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kd_trilateral as kdt
from fusion_core.errors import FusionWarning
from kd_trilateral.losses import kd_terms, mix

ONE_STEP = ["jvp", "fd", "fd1", "unrolled"]
TOLERANCE = {"jvp": 1e-8, "unrolled": 1e-8, "head": 1e-8, "fd": 1e-5, "fd1": 2e-2}


def conv_norm():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)
    )  # fmt: skip


def dropping():
    return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Dropout(0.4), nn.Linear(16, 3))


def c_of(make, engine, optimizer=None, **options):
    p = make()
    bilevel = p.bilevel(engine, optimizer and optimizer(p.student.parameters()), **options)
    p.step(bilevel)
    return bilevel.last_c


# ---------------------------------------------------------------- batch norm and dropout


@pytest.mark.parametrize("engine", ONE_STEP)
def test_batch_norm_in_training_mode(problem, relative_error, device, engine):
    p = problem(conv_norm, shape=(2, 4, 4), device=device)
    bilevel = p.bilevel(engine)
    out = p.loss(p.logits(), p.zt, p.y)
    out.loss.backward()
    statistics = [b.clone() for b in p.student.buffers()]
    bilevel.step(p.x, out)
    assert bilevel.engine == engine
    assert all(torch.equal(a, b) for a, b in zip(p.student.buffers(), statistics, strict=True))
    assert int(statistics[-1]) == 1  # the training forward, and it alone
    exact = c_of(lambda: problem(conv_norm, shape=(2, 4, 4), device=device), "unrolled")
    assert relative_error(bilevel.last_c, exact) < TOLERANCE[engine]


@pytest.mark.parametrize("engine", ONE_STEP)
def test_dropout_is_replayed(problem, relative_error, engine):
    """C against one gradient per sample, in a forward that starts from the training forward's RNG state."""
    torch.manual_seed(3)
    p = problem(dropping)
    bilevel = p.bilevel(engine)
    old, rng = copy.deepcopy(p.student), torch.get_rng_state()
    p.step(bilevel)
    v = torch.autograd.grad(F.cross_entropy(p.student(p.xv), p.yv), list(p.student.parameters()))
    torch.set_rng_state(rng)
    kl, ce = kd_terms(old(p.x), p.zt, p.y, 2.0)
    expected = []
    for d in kl - ce:
        gradient = torch.autograd.grad(d, list(old.parameters()), retain_graph=True)
        expected.append(0.1 * sum((a * b).sum() for a, b in zip(gradient, v, strict=True)))
    assert relative_error(bilevel.last_c, torch.stack(expected)) < TOLERANCE[engine]


@pytest.mark.parametrize("engine", ["jvp", "fd", "fd1"])
def test_dropout_can_be_off(problem, relative_error, engine):
    make = lambda: problem(dropping)
    still = lambda parameters: torch.optim.SGD(parameters, lr=0.0)
    off = c_of(make, engine, still, precondition=False, stochastic="off")
    p = make()
    p.student.eval()
    bilevel = p.bilevel("jvp", p.sgd(0.0), precondition=False)
    p.step(bilevel)
    assert relative_error(off, bilevel.last_c) < TOLERANCE[engine]
    torch.manual_seed(0)
    replayed = c_of(make, engine, still, precondition=False)
    assert relative_error(replayed, bilevel.last_c) > 0.05


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("kept", [True, False])
def test_outer_first_takes_the_step_with_the_new_ratios(problem, kept, optimizer):
    """From the old parameters, through the same dropout masks, whether or not the graph was kept."""
    kind = {
        "sgd": lambda ps: torch.optim.SGD(ps, lr=0.1),
        "momentum": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9),
        "adam": lambda ps: torch.optim.Adam(ps, lr=0.1),
    }[optimizer]
    p = problem(dropping)
    plain = copy.deepcopy(p.student)
    plain_optimizer = kind(plain.parameters())
    bilevel = p.bilevel("jvp", kind(p.student.parameters()), order="outer_first", outer_lr=0.02)
    torch.manual_seed(4)
    for _ in range(3):
        rng = torch.get_rng_state()
        out = p.loss(p.logits(), p.zt, p.y)
        bilevel.optimizer.zero_grad()
        bilevel.backward(out) if kept else out.loss.backward()
        bilevel.step(p.x, out)
        torch.set_rng_state(rng)
        alpha = p.loss.alpha_of(out.context).detach()
        assert (alpha - out.alpha).abs().max() > 1e-4
        loss = mix(alpha, *kd_terms(plain(p.x), p.zt, p.y, 2.0)).mean()
        plain_optimizer.zero_grad()
        loss.backward()
        plain_optimizer.step()
        for ours, theirs in zip(p.student.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------- kinds of students


class Square(torch.autograd.Function):
    """Differentiable in reverse mode only."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        return 2.0 * ctx.saved_tensors[0] * gradient


class Squared(nn.Linear):
    def forward(self, x):
        return Square.apply(super().forward(x))


def test_without_forward_mode_it_falls_back_to_differences(problem, relative_error):
    p = problem(lambda: Squared(5, 3))
    bilevel = p.bilevel("jvp")
    with pytest.warns(FusionWarning, match=r"no forward-mode derivative.*falls back to central"):
        p.step(bilevel)
    first = bilevel.last_c
    p.step(bilevel)  # a second warning would be an error
    assert bilevel.engine == "fd"
    assert relative_error(first, c_of(lambda: problem(lambda: Squared(5, 3)), "unrolled")) < 1e-6


def test_other_errors_of_a_student_are_not_swallowed(problem):
    class Breaks(nn.Linear):
        calls = 0

        def forward(self, x):
            Breaks.calls += 1
            if Breaks.calls > 2:  # training, held-out, then the dual pass
                raise RuntimeError("out of paper")
            return super().forward(x)

    p = problem(lambda: Breaks(5, 3))
    with pytest.raises(RuntimeError, match="out of paper"):
        p.step(p.bilevel("jvp"))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 3)

    def forward(self, x):
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, dim=-1)
        return self.out(F.scaled_dot_product_attention(q, k, v).squeeze(1).mean(1))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.down.weight = self.up.weight

    def forward(self, x):
        return self.head(torch.tanh(self.down(torch.tanh(self.up(x)))))


def half_frozen():
    student = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    student[0].requires_grad_(False)
    return student


STUDENTS = {"attention": (Attention, (6, 4)), "tied": (Tied, (5,)), "half frozen": (half_frozen, (5,))}


@pytest.mark.parametrize("engine", [*ONE_STEP, "neumann", "implicit"])
@pytest.mark.parametrize("kind", STUDENTS)
def test_kinds_of_students(problem, relative_error, device, kind, engine):
    student, shape = STUDENTS[kind]
    p = problem(student, shape=shape, device=device)
    bilevel = p.bilevel(engine, neumann_terms=1)
    old = copy.deepcopy(p.student)
    p.step(bilevel)
    at = old if engine in ("neumann", "implicit") else p.student
    if engine == "implicit":  # it has no simpler form; the step must work and say something
        assert bilevel.last_c.abs().max() > 0
        return
    names, moving = zip(*[(n, q) for n, q in at.named_parameters() if q.requires_grad], strict=True)
    v = torch.autograd.grad(F.cross_entropy(at(p.xv), p.yv), moving)
    kl, ce = kd_terms(old(p.x), p.zt, p.y, 2.0)
    theta = [q for q in old.parameters() if q.requires_grad]
    rows = [torch.autograd.grad(d, theta, retain_graph=True) for d in kl - ce]
    expected = torch.stack([0.1 * sum((a * b).sum() for a, b in zip(r, v, strict=True)) for r in rows])
    assert relative_error(bilevel.last_c, expected) < TOLERANCE.get(engine, 1e-8)
    assert len(names) == len(theta)


class Wrapped(nn.Module):
    """A Linear student whose output is wrapped, and that may take its input by keyword."""

    def __init__(self, wrap):
        super().__init__()
        self.linear, self.wrap = nn.Linear(5, 3), wrap

    def forward(self, features):
        return self.wrap(self.linear(features))


WRAPS = {
    "dict": lambda z: {"loss": None, "logits": z},
    "tuple": lambda z: (z, "hidden"),
    "attribute": lambda z: SimpleNamespace(logits=z),
}


@pytest.mark.parametrize("engine", [*ONE_STEP, "head", "neumann", "joint", "val_mix"])
@pytest.mark.parametrize("kind", WRAPS)
@pytest.mark.parametrize("keyword", [False, True])
def test_outputs_and_inputs_of_every_kind(problem, engine, kind, keyword):
    plain, p = problem(lambda: Wrapped(lambda z: z)), problem(lambda: Wrapped(WRAPS[kind]))
    if keyword:
        p.x = {"features": p.x}
        held_out = [{"features": p.xv, "labels": p.yv, "teacher_logits": p.ztv, "sample_id": p.yv}]
    else:
        held_out = [[p.xv, p.yv, p.ztv]]
    first, second = plain.bilevel(engine), p.bilevel(engine, val_batches=held_out)
    for _ in range(2):
        plain.step(first), p.step(second)
    for a, b in zip(plain.loss.parameters(), p.loss.parameters(), strict=True):
        assert torch.equal(a, b)
    if engine not in ("joint", "val_mix"):
        assert torch.equal(first.last_c, second.last_c)


def test_logits_from_finds_other_outputs(problem):
    p = problem(lambda: Wrapped(lambda z: {"scores": z}))
    bilevel = p.bilevel("jvp", logits_from=lambda output: output["scores"])
    out = p.loss(p.student(p.x)["scores"], p.zt, p.y)
    out.loss.backward()
    bilevel.step(p.x, out)
    assert torch.equal(bilevel.last_c, c_of(lambda: problem(lambda: Wrapped(lambda z: z)), "jvp"))


class Single(nn.Module):
    """One logit u, as (B,), (B, 1) or the pair (0, u)."""

    def __init__(self, form):
        super().__init__()
        self.linear, self.form = nn.Linear(5, 1), form

    def forward(self, x):
        u = self.linear(x)
        return {"flat": u[:, 0], "column": u, "pair": torch.cat([torch.zeros_like(u), u], 1)}[self.form]


@pytest.mark.parametrize("engine", [*ONE_STEP, "head", "neumann", "implicit", "val_mix", "joint"])
@pytest.mark.parametrize("form", ["flat", "column"])
def test_a_binary_logit_with_every_engine(problem, relative_error, form, engine):
    moved, c = {}, {}
    for kind in (form, "pair"):
        make = lambda kind=kind: Single(kind)
        p = problem(make, classes=2, task="binary", wide_head=False)
        if form == "flat":
            p.zt, p.ztv = p.zt[:, 0], p.ztv[:, 0]
        # The Linear layer is the whole student, so that its share is all of c.
        bilevel = p.bilevel("jvp" if engine == "head" and kind == "pair" else engine)
        p.step(bilevel)
        moved[kind] = torch.cat([q.detach().flatten() for q in p.loss.parameters()])
        c[kind] = bilevel.last_c
    assert relative_error(moved[form], moved["pair"]) < 1e-9
    if engine not in ("joint", "val_mix"):
        assert relative_error(c[form], c["pair"]) < 1e-8


# ---------------------------------------------------------------- part of a batch, cadence


def plain_mlp():
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def norm_mlp():
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 3))


@pytest.mark.parametrize("subsample", [0.5, 3])
@pytest.mark.parametrize("engine", ONE_STEP)
@pytest.mark.parametrize("student", [plain_mlp, norm_mlp])
def test_part_of_a_batch(problem, relative_error, student, engine, subsample):
    p = problem(student)
    bilevel = p.bilevel(engine, subsample=subsample)
    for start in (0, 3, 0):
        old = copy.deepcopy(p.student)
        out = p.step(bilevel)
        assert out.alpha.shape == (6,)
        now = copy.deepcopy(p.student)
        gradient = torch.autograd.grad(F.cross_entropy(now(p.xv), p.yv), list(now.parameters()))
        v = {n: 0.1 * g for (n, _), g in zip(now.named_parameters(), gradient, strict=True)}
        window = slice(start, start + 3)
        expected = kdt.per_sample_directional(
            old, None, v, (p.x[window], p.zt[window], p.y[window]), "jvp", temperature=2.0
        )
        assert bilevel.last_c.shape == (3,)
        assert relative_error(bilevel.last_c, expected) < TOLERANCE[engine]


@pytest.mark.parametrize(
    ("every", "warmup", "expected"), [(3, 2, [2, 5, 8]), (1, 0, [*range(9)]), (4, 0, [0, 4, 8])]
)
def test_cadence(problem, every, warmup, expected):
    p = problem()
    bilevel = p.bilevel("jvp", every=every, warmup_steps=warmup)
    moved = []
    for step in range(9):
        before = [q.detach().clone() for q in p.loss.parameters()]
        due = bilevel.due
        p.step(bilevel)
        changed = any(not torch.equal(a, b) for a, b in zip(before, p.loss.parameters(), strict=True))
        assert changed == due
        moved += [step] if changed else []
    assert moved == expected
    assert bilevel.outer_steps == len(expected)


def test_held_out_batches_by_number_or_in_turn(problem):
    p, seen = problem(), []

    def by_number(outer_step):
        seen.append(outer_step)
        return p.xv, p.yv

    bilevel = p.bilevel("jvp", val_batches=by_number, every=2)
    for _ in range(5):
        p.step(bilevel)
    assert seen == [0, 1, 2]
    one, two = problem(), problem()
    halves = [(one.xv[:3], one.yv[:3]), (one.xv[3:], one.yv[3:])]
    in_turn = one.bilevel("jvp", val_batches=halves)
    numbered = two.bilevel("jvp", val_batches=lambda k: halves[k % 2])
    for _ in range(3):
        one.step(in_turn), two.step(numbered)
        assert torch.equal(in_turn.last_c, numbered.last_c)


def test_close_takes_the_hooks_off(problem):
    p = problem()
    bilevel = p.bilevel("head")
    hooks = lambda: sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in p.student.modules())
    assert hooks() == 2
    bilevel.close()
    assert hooks() == 0
