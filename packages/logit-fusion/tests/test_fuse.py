"""``fuse_logits``: its options, masks and dtypes, gradients, compilation."""

from __future__ import annotations

import pytest
import torch

from logit_fusion import fuse_logits

DOUBLE = torch.float64


def drawn(*shape, experts=1, seed=0, dtype=DOUBLE, device="cpu", shift=1.0):
    made = torch.Generator().manual_seed(seed)
    normal = lambda: torch.randn(*shape, generator=made, dtype=DOUBLE)
    large = 3 * normal()
    base = 0.5 * large + normal()
    found = [large, base, *(base + shift * normal() for _ in range(experts))]
    return [x.to(device, dtype) for x in found]


def fuse(logits, **options):
    return fuse_logits(logits[0], logits[1], logits[2:], **{"compute_dtype": DOUBLE, **options})


def assert_close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def kl(x, y):
    gone = x == -torch.inf
    return (x.exp() * (x - y).masked_fill(gone, 0.0)).sum(-1)


def brute(logits, options, alphas):
    """The objective of one expert on many alphas, from its definition."""
    large, base, expert = logits
    log_p, log_q, log_e = (x.log_softmax(-1) for x in logits)
    f, r = kl(log_e, log_q), kl(log_q, log_e)
    if options.get("pairing") == "swapped":
        f, r = r, f
    found = []
    for alpha in alphas:
        fused = (large + alpha * (expert - base)).log_softmax(-1)
        forward, reverse = kl(fused, log_p), kl(log_p, fused)
        part = {
            "paper": (forward - f) ** 2 + (reverse - r) ** 2,
            "forward": (forward - f) ** 2,
            "reverse": (reverse - r) ** 2,
            "jeffreys": (forward + reverse - f - r) ** 2,
        }
        found.append(part[options.get("objective", "paper")])
    return torch.stack(found, -1)


@pytest.mark.parametrize("pairing", ["main", "swapped"])
@pytest.mark.parametrize("objective", ["paper", "forward", "reverse", "jeffreys"])
@pytest.mark.parametrize("solver", ["grid", "exact"])
def test_objectives_against_brute_force(objective, pairing, solver, device):
    logits = drawn(6, 30, device=device)
    options = {"objective": objective, "pairing": pairing}
    step = fuse(logits, solver=solver, **options)
    count = 21 if solver == "grid" else 401
    alphas = torch.linspace(0, 2, count, dtype=DOUBLE)
    table = brute(logits, options, alphas)
    best = alphas[table.argmin(-1).cpu()]
    assert_close(step.alpha.squeeze(-1).cpu(), best, 1e-9 if solver == "grid" else 5e-3)
    assert (step.loss <= table.amin(-1) + 1e-12).all()


def test_results_have_the_batch_shape(device):
    logits = drawn(2, 3, 20, experts=2, device=device)
    step = fuse(logits)
    assert step.log_probs.shape == (2, 3, 20)
    assert step.alpha.shape == step.f.shape == step.r.shape == (2, 3, 2)
    assert step.non_finite.shape == (2, 3, 4)
    scalars = (step.kl_forward, step.kl_reverse, step.loss, step.expert, step.certified, step.empty)
    assert all(x.shape == (2, 3) for x in scalars)
    row = fuse([x[1, 2] for x in logits])
    assert row.alpha.shape == (2,)
    assert row.loss.shape == ()
    assert_close(row.log_probs, step.log_probs[1, 2], 1e-8)
    stacked = fuse_logits(logits[0], logits[1], torch.stack(logits[2:]), compute_dtype=DOUBLE)
    assert_close(stacked.alpha, step.alpha)
    nothing = fuse([x[:0] for x in logits])
    assert nothing.log_probs.shape == (0, 3, 20)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, DOUBLE])
def test_every_dtype_is_computed_widely(dtype, device):
    logits = drawn(4, 50, dtype=dtype, device=device)
    step = fuse_logits(logits[0], logits[1], logits[2:])
    assert step.log_probs.dtype == (DOUBLE if dtype == DOUBLE else torch.float32)
    wide = fuse([x.double() for x in logits])
    assert_close(step.alpha.double(), wide.alpha, 2e-5)
    assert_close(step.log_probs.double(), wide.log_probs, 1e-4)
    half = fuse_logits(logits[0], logits[1], logits[2:], out_dtype=torch.bfloat16)
    assert half.log_probs.dtype == half.alpha.dtype == torch.bfloat16


@pytest.mark.parametrize("solver", ["grid", "exact", "newton"])
@pytest.mark.parametrize("strategy", ["single", "centroid", "pool", "joint"])
def test_plain_and_tiled_code_agree(strategy, solver, device):
    """Gradients go through another implementation of the same statistics."""
    logits = drawn(3, 24, experts=2, device=device)
    a, b = (fuse(logits, strategy=strategy, solver=solver, differentiable=d) for d in (False, True))
    assert_close(a.alpha, b.alpha, 1e-7)
    assert_close(a.log_probs, b.log_probs, 1e-7)
    assert_close(a.loss, b.loss, 1e-9)


# Static strengths and presets


def test_static_alpha(device):
    logits = drawn(3, 20, experts=2, device=device)
    large, base, one, two = logits
    for alpha, pair in ((1.0, (1.0, 1.0)), ([0.5, -0.25], (0.5, -0.25)), ([1.5], (1.5, 1.5))):
        step = fuse(logits, alpha=alpha)
        wanted = (large + pair[0] * (one - base) + pair[1] * (two - base)).log_softmax(-1)
        assert_close(step.log_probs, wanted)
        assert_close(step.kl_forward, kl(wanted, large.log_softmax(-1)))
        assert_close(step.kl_reverse, kl(large.log_softmax(-1), wanted))
        assert (step.loss == 0).all()
    rows = torch.rand(3, 2, dtype=DOUBLE, device=device)
    assert_close(fuse(logits, alpha=rows).alpha, rows)
    assert (fuse(logits, alpha=0.0).expert == -1).all()
    assert (fuse(logits, alpha=[0.5, 1.0]).expert == 1).all()


# Strategies and weights


def test_single_picks_the_best_pair_of_the_grid(device):
    logits = drawn(5, 16, experts=3, device=device)
    step = fuse(logits, strategy="single", solver="grid")
    large, base, *experts = logits
    log_p, log_q = large.log_softmax(-1), base.log_softmax(-1)
    targets = [(kl(e.log_softmax(-1), log_q), kl(log_q, e.log_softmax(-1))) for e in experts]
    best = torch.full((5,), torch.inf, dtype=DOUBLE)
    alpha = torch.zeros(5, 3, dtype=DOUBLE)
    for t, expert in enumerate(experts):
        for j in range(21):
            fused = (large + 0.1 * j * (expert - base)).log_softmax(-1)
            forward, reverse = kl(fused, log_p), kl(log_p, fused)
            value = sum((forward - f) ** 2 + (reverse - r) ** 2 for f, r in targets).cpu()
            better = value < best
            best = torch.where(better, value, best)
            row = torch.zeros(3, dtype=DOUBLE)
            row[t] = 0.1 * j
            alpha = torch.where(better.unsqueeze(-1), row, alpha)
    assert_close(step.alpha.cpu(), alpha, 1e-12)
    assert_close(step.loss.cpu(), best)
    assert (step.expert.cpu() == alpha.argmax(-1)).all()


def test_ties_go_to_the_first_expert(device):
    logits = drawn(4, 16, device=device)
    step = fuse([*logits, logits[2]], strategy="single", solver="grid")
    assert (step.alpha[:, 1] == 0).all()


def test_ranges_of_single(device):
    logits = drawn(4, 30, experts=2, device=device, shift=2.0)
    ranges = [(0.2, 0.4), (0.0, 0.3)]
    step = fuse(logits, strategy="single", per_expert_range=ranges)
    for t, (low, high) in enumerate(ranges):
        chosen = step.expert == t
        assert ((step.alpha[chosen, t] >= low) & (step.alpha[chosen, t] <= high)).all()
    alone = [fuse([*logits[:2], logits[2 + t]], alpha_range=ranges[t]) for t in range(2)]
    # One expert has other targets than two, so only the range is compared.
    assert all((x.alpha <= high).all() for x, (_, high) in zip(alone, ranges, strict=True))


def test_weights(device):
    logits = drawn(4, 30, experts=2, device=device)
    first = fuse([*logits[:2], logits[2]])
    for strategy in ("pool", "centroid"):
        assert_close(
            fuse(logits, strategy=strategy, weights=(1.0, 0.0)).alpha[:, 0],
            fuse(logits, strategy=strategy, weights=torch.tensor([1.0, 0.0])).alpha[:, 0],
        )
    assert_close(fuse(logits, weights=(3.0, 0.0)).log_probs, first.log_probs, 1e-6)
    assert_close(fuse(logits, weights=(2.0, 6.0)).alpha, fuse(logits, weights=(0.25, 0.75)).alpha)
    rows = torch.tensor([[0.5, 0.5]] * 4, dtype=DOUBLE, device=device)
    assert_close(fuse(logits, weights=rows).alpha, fuse(logits).alpha)
    by_size = fuse(logits, weights=lambda f, r: (f + r) / (f + r).sum(-1, keepdim=True))
    assert_close(by_size.alpha, fuse(logits, weights="jeffreys").alpha)


def test_weights_of_nobody_leave_the_large_model(device):
    """Evidence may say that no expert fits."""
    logits = drawn(3, 30, experts=2, device=device)
    for strategy in ("pool", "centroid"):
        step = fuse(logits, strategy=strategy, weights=torch.zeros(3, 2))
        assert (step.alpha == 0).all()
        assert_close(step.log_probs, logits[0].log_softmax(-1))
    little = fuse(logits, weights=torch.full((3, 2), 1e-3))
    assert (little.kl_forward < 1e-3).all()
    one = fuse(logits[:3], weights=torch.full((3, 1), 0.5))
    assert (one.alpha < fuse(logits[:3]).alpha).all()


def test_jeffreys_weights_of_equal_models(device):
    large, base, _ = drawn(3, 30, device=device)
    step = fuse([large, base, base, base], weights="jeffreys")
    assert_close(step.log_probs, large.log_softmax(-1))


# Masks, rows that are done, temperatures


@pytest.mark.parametrize("strategy", ["single", "pool", "centroid", "joint"])
def test_masked_tokens_are_as_if_absent(strategy, device):
    logits = drawn(4, 20, experts=2, device=device)
    mask = torch.ones(20, dtype=torch.bool, device=device)
    mask[[3, 7, 11]] = False
    step = fuse(logits, strategy=strategy, mask=mask)
    small = fuse([x[:, mask] for x in logits], strategy=strategy)
    assert_close(step.alpha, small.alpha, 1e-7)
    assert_close(step.log_probs[:, mask], small.log_probs, 1e-7)
    assert (step.log_probs[:, ~mask] == -torch.inf).all()
    rows = mask.expand(4, 20).clone()
    rows[0] = True
    mixed = fuse(logits, strategy=strategy, mask=rows)
    assert_close(mixed.log_probs[1:], step.log_probs[1:], 1e-7)
    assert_close(mixed.log_probs[0], fuse(logits, strategy=strategy).log_probs[0], 1e-7)


def test_outside_keeps_the_large_model(device):
    large, base, expert = drawn(3, 12, device=device)
    base[0, 2] = expert[1, 4] = large[2, 6] = -torch.inf
    mask = torch.ones(12, dtype=torch.bool, device=device)
    mask[9] = False
    kept = fuse([large, base, expert], mask=mask, outside="large")
    strict = fuse([large, base, expert], mask=mask)
    assert_close(kept.alpha, strict.alpha)
    assert_close(kept.log_probs.exp().sum(-1), torch.ones_like(kept.loss))
    own = large.masked_fill(~mask, -torch.inf).log_softmax(-1)
    for row, token in ((0, 2), (1, 4)):
        assert_close(kept.log_probs[row, token], own[row, token])
        assert strict.log_probs[row, token] == -torch.inf
    assert (kept.log_probs[:, 9] == -torch.inf).all()
    assert kept.log_probs[2, 6] == -torch.inf
    inside = torch.isfinite(strict.log_probs)
    gap = (kept.log_probs - strict.log_probs)[0][inside[0]]
    assert_close(gap, gap[0].expand_as(gap))  # scaled, nothing else


def test_rows_that_are_done(device):
    logits = drawn(3, 15, experts=2, device=device)
    active = torch.tensor([True, False, True], device=device)
    step, whole = fuse(logits, active=active), fuse(logits)
    assert (step.alpha[1] == 0).all()
    assert step.loss[1] == step.kl_forward[1] == 0
    assert step.expert[1] == -1
    assert_close(step.log_probs[1], logits[0][1].log_softmax(-1))
    assert_close(step.log_probs[active], whole.log_probs[active])


def test_temperature_is_for_the_search_only(device):
    logits = drawn(4, 25, experts=2, device=device)
    for strategy in ("single", "pool"):
        step = fuse(logits, strategy=strategy, kl_temperature=2.5)
        warm = fuse([x / 2.5 for x in logits], strategy=strategy)
        assert_close(step.alpha, warm.alpha)
        assert_close(step.f, warm.f)
        assert_close(step.kl_forward, warm.kl_forward)
        shift = (step.alpha.mT.unsqueeze(-1) * torch.stack([x - logits[1] for x in logits[2:]])).sum(0)
        assert_close(step.log_probs, (logits[0] + shift).log_softmax(-1))


def test_bound_and_temperature_together(device):
    logits = drawn(4, 25, experts=2, device=device)
    step = fuse(logits, kl_temperature=2.0, max_kl=0.05)
    assert (kl(step.log_probs, logits[0].log_softmax(-1)) <= 0.05 + 1e-6).all()
    assert (fuse(logits, max_kl=0.0).kl_forward <= 1e-6).all()
    static = fuse(logits, alpha=1.0, max_kl=0.05)
    assert (static.kl_forward <= 0.05 + 1e-6).all()


def test_one_token_left_and_one_hot_models(device):
    logits = drawn(2, 5, device=device)
    mask = torch.zeros(5, dtype=torch.bool, device=device)
    mask[3] = True
    step = fuse(logits, mask=mask)
    assert (step.alpha == 0).all()
    assert (step.log_probs[:, 3] == 0).all()
    sure = logits[0].clone()
    sure[:, 1:] = -torch.inf
    assert (fuse([sure, *logits[1:]]).alpha == 0).all()


# Gradients


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 0.7},
        {"strategy": "single"},
        {"strategy": "single", "objective": "forward"},
        {"strategy": "pool", "weights": "jeffreys"},
        {"strategy": "centroid"},
        {"strategy": "pool", "max_kl": 0.02},
        {"strategy": "single", "kl_temperature": 1.5},
    ],
    ids=str,
)
def test_gradients(options):
    logits = [x.requires_grad_() for x in drawn(2, 5, experts=2, seed=3)]

    def law(*x):
        step = fuse(x, differentiable=True, **options)
        found = (step.log_probs, step.kl_forward, step.f)
        return found if "alpha" in options else (*found, step.alpha)  # a given alpha depends on nothing

    assert torch.autograd.gradcheck(law, logits, eps=1e-6, atol=1e-5, rtol=1e-4, fast_mode=True)


def test_gradients_with_a_mask_are_finite():
    logits = [x.requires_grad_() for x in drawn(2, 6)]
    mask = torch.tensor([True, False, True, True, True, False])
    step = fuse(logits, mask=mask, differentiable=True)
    step.log_probs[:, 0].sum().backward()
    for x in logits:
        assert torch.isfinite(x.grad).all()
        assert (x.grad[:, ~mask] == 0).all()


def test_no_gradient_unless_asked_for():
    logits = [x.requires_grad_() for x in drawn(2, 6)]
    assert not fuse(logits).log_probs.requires_grad
    assert fuse(logits, differentiable=True).log_probs.requires_grad
    grid = fuse(logits, differentiable=True, solver="grid")
    assert grid.log_probs.requires_grad
    assert not grid.alpha.requires_grad  # constant between its jumps


# Compilation


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"strategy": "pool", "step": 0.5, "mask": True},
        {"strategy": "single", "solver": "grid", "kl_temperature": 1.5},
        {"strategy": "centroid", "solver": "newton", "weights": "jeffreys"},
    ],
    ids=str,
)
def test_compiles_without_a_graph_break(options):
    logits = drawn(2, 50, experts=2, dtype=torch.float32)
    options = dict(options)
    mask = torch.ones(50, dtype=torch.bool) if options.pop("mask", False) else None
    torch.compiler.reset()

    def law(large, base, one, two):
        step = fuse_logits(large, base, [one, two], mask=mask, **options)
        return step.log_probs, step.alpha

    compiled = torch.compile(law, fullgraph=True, backend="eager")
    for a, b in zip(compiled(*logits), law(*logits), strict=True):
        assert_close(a, b, 1e-5)
