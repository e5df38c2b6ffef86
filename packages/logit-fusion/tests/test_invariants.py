"""Laws that hold for any logits: section 8."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from logit_fusion import fuse_logits
from logit_fusion.arrays import as_tensor
from logit_fusion.family import divergences, normalized, tilted
from logit_fusion.grid import make_grid
from logit_fusion.kernels import make_family, prepared
from logit_fusion.objective import loss, make_target, slope
from logit_fusion.strategies import Search, aim_at

DOUBLE = torch.float64
examples = settings(max_examples=15, deadline=None)
STRATEGIES = ("single", "centroid", "pool")


@st.composite
def members(draw, experts=(1, 3), rows=(1, 4), vocab=(2, 40), shift=(0.05, 3.0)):
    """Logits of large, base and experts, float64 (rows, vocab), and a generator for more."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    size = (draw(st.integers(*rows)), draw(st.integers(*vocab)))
    wide, narrow = draw(st.floats(0.2, 4.0)), draw(st.floats(*shift))
    large = rng.normal(size=size) * wide
    base = 0.5 * large + rng.normal(size=size)
    more = [base + rng.normal(size=size) * narrow for _ in range(draw(st.integers(*experts)))]
    return [torch.from_numpy(x) for x in (large, base, *more)], rng


def fuse(logits, **options):
    return fuse_logits(logits[0], logits[1], logits[2:], compute_dtype=DOUBLE, **options)


def assert_close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def plain_divergences(large, base, expert, alpha):
    """F, R, f and r as the definitions say, by another road than the package's."""
    kl = lambda x, y: (x.exp() * (x - y)).sum(-1)
    log_p, log_q, log_e = (x.log_softmax(-1) for x in (large, base, expert))
    fused = (large + alpha * (expert - base)).log_softmax(-1)
    return kl(fused, log_p), kl(log_p, fused), kl(log_e, log_q), kl(log_q, log_e)


@examples
@given(members(), st.sampled_from(STRATEGIES), st.sampled_from(["exact", "grid", "newton"]))
def test_constants_do_not_matter(drawn, strategy, solver):
    logits, rng = drawn
    moved = [x + float(rng.uniform(-20, 20)) for x in logits]
    a, b = (fuse(x, strategy=strategy, solver=solver) for x in (logits, moved))
    if solver != "exact" and not torch.allclose(a.alpha, b.alpha, atol=1e-6):
        return  # two nodes tie, or Newton did not settle
    assert_close(a.alpha, b.alpha, 1e-6)
    assert_close(a.log_probs, b.log_probs, 1e-5)


@examples
@given(members(), st.sampled_from(STRATEGIES))
def test_permuting_the_vocabulary_permutes_the_output(drawn, strategy):
    logits, rng = drawn
    order = torch.from_numpy(rng.permutation(logits[0].shape[-1]))
    a, b = fuse(logits, strategy=strategy), fuse([x[:, order] for x in logits], strategy=strategy)
    assert_close(a.loss, b.loss)
    assert_close(a.log_probs[:, order], b.log_probs, 1e-6)


@examples
@given(members(experts=(1, 1)), st.sampled_from(["paper", "forward", "reverse", "jeffreys"]))
def test_large_equal_to_base_gives_the_expert(drawn, objective):
    (_, base, expert), _ = drawn
    step = fuse([base, base, expert], objective=objective)
    assert_close(step.alpha, torch.ones_like(step.alpha), 1e-7)
    assert_close(step.log_probs, expert.log_softmax(-1), 1e-6)
    assert_close(step.loss, torch.zeros_like(step.loss), 1e-14)


@examples
@given(members(experts=(1, 1)), st.sampled_from(["exact", "grid", "newton"]), st.floats(0.0, 1.5))
def test_expert_equal_to_base_leaves_the_large_model(drawn, solver, low):
    (large, base, _), _ = drawn
    step = fuse([large, base, base], solver=solver, alpha_range=(low, 2.0))
    assert (step.alpha == low).all()
    assert_close(step.log_probs, large.log_softmax(-1))
    assert (step.expert == (0 if low else -1)).all()


@examples
@given(members(experts=(1, 1)))
def test_divergences_grow_and_the_reverse_one_is_convex(drawn):
    (large, base, expert), _ = drawn
    ready, _ = prepared([large, base, expert], None, DOUBLE, differentiable=False)
    alphas = torch.linspace(0, 2, 41, dtype=DOUBLE)
    found = [divergences(tilted(ready.log_p, ready.shifts[0], a), a, 0.0) for a in alphas]
    forward, reverse = (torch.stack(x, -1) for x in zip(*found, strict=True))
    for value in (forward, reverse, forward + reverse):
        assert (value.diff(dim=-1) >= -1e-12).all()
    assert (reverse.diff(n=2, dim=-1) >= -1e-12).all()


@examples
@given(members(experts=(1, 3)), st.sampled_from([0.05, 0.1, 0.25, 0.3, 2.0]), st.sampled_from(STRATEGIES))
def test_exact_is_no_worse_than_any_node(drawn, spacing, strategy):
    logits, _ = drawn
    exact = fuse(logits, strategy=strategy, step=spacing, certify=True)
    grid = fuse(logits, strategy=strategy, solver="grid", step=spacing)
    assert (exact.loss <= grid.loss * (1 + 1e-9) + 1e-15).all()
    fine = fuse(logits, strategy=strategy, solver="grid", step=0.0037)
    worse = exact.loss > fine.loss * (1 + 1e-6) + 1e-13
    assert not (worse & exact.certified).any()


@examples
@given(members(experts=(1, 3)))
def test_most_rows_are_certified(drawn):
    logits, _ = drawn
    newton = fuse(logits, strategy="pool", solver="newton", certify=True)
    assert not newton.certified.any()
    wide = fuse(logits, strategy="pool", objective="reverse", certify=True)
    assert wide.certified.all()  # one root at most


@examples
@given(members(experts=(1, 1)))
def test_the_minimum_lies_between_the_two_roots(drawn):
    logits, _ = drawn
    ends = torch.stack([fuse(logits, objective=o).alpha for o in ("forward", "reverse")])
    alpha = fuse(logits).alpha
    assert (alpha >= ends.amin(0) - 1e-7).all()
    assert (alpha <= ends.amax(0) + 1e-7).all()


@examples
@given(members(experts=(1, 1)))
def test_roots_meet_their_equations(drawn):
    logits, _ = drawn
    for objective in ("forward", "reverse", "jeffreys"):
        step = fuse(logits, objective=objective)
        forward, reverse, f, r = plain_divergences(*logits, step.alpha)
        gap = {"forward": forward - f, "reverse": reverse - r, "jeffreys": forward + reverse - f - r}[
            objective
        ]
        at_end = step.alpha.squeeze(-1) == 2.0
        assert (gap[at_end] <= 1e-9).all()
        assert_close(gap[~at_end] / (1 + f + r)[~at_end], torch.zeros_like(gap[~at_end]), 1e-8)


@examples
@given(members(experts=(1, 1)), st.integers(2, 4))
def test_copies_of_one_expert_are_one_expert(drawn, copies):
    logits, _ = drawn
    one = fuse(logits)
    inside = (one.alpha < 2.0 - 1e-9).squeeze(-1)
    for strategy in STRATEGIES:
        many = fuse([*logits[:2], *[logits[2]] * copies], strategy=strategy)
        assert_close(many.log_probs[inside], one.log_probs[inside], 1e-6)
        if strategy != "single":
            assert_close(many.alpha.sum(-1)[inside], one.alpha.squeeze(-1)[inside], 1e-6)
            assert (many.alpha.sum(-1)[~inside] <= 2.0 * copies + 1e-9).all()


@examples
@given(
    members(experts=(2, 4)), st.sampled_from(["pool", "centroid"]), st.sampled_from(["uniform", "jeffreys"])
)
def test_permuting_experts_permutes_alpha(drawn, strategy, weights):
    logits, rng = drawn
    order = rng.permutation(len(logits) - 2).tolist()
    a = fuse(logits, strategy=strategy, weights=weights)
    b = fuse([*logits[:2], *[logits[2 + t] for t in order]], strategy=strategy, weights=weights)
    assert_close(a.alpha[:, order], b.alpha, 1e-7)
    assert_close(a.log_probs, b.log_probs, 1e-6)


@examples
@given(members(experts=(2, 4)))
def test_permuting_experts_permutes_the_single_one(drawn):
    logits, rng = drawn
    order = rng.permutation(len(logits) - 2).tolist()
    a, b = (
        fuse(logits, strategy="single"),
        fuse([*logits[:2], *[logits[2 + t] for t in order]], strategy="single"),
    )
    assert_close(a.loss, b.loss, 1e-9)
    assert ((a.alpha != 0).sum(-1) <= 1).all()


@examples
@given(members(experts=(1, 1), rows=(1, 1)), st.floats(0.1, 1.9))
def test_derivatives_match_finite_differences(drawn, alpha):
    logits, _ = drawn
    ready, _ = prepared(logits, None, DOUBLE, differentiable=False)
    target = make_target(ready.f, ready.r, "paper", "main", DOUBLE)

    def at(a):
        place = torch.tensor([a], dtype=DOUBLE)
        stats = tilted(ready.log_p, ready.shifts[0], place)
        return place, stats, *divergences(stats, place, 0.0)

    h = 1e-5
    (_, _, f0, r0), (_, _, f1, r1) = at(alpha - h), at(alpha + h)
    place, stats, _, _ = at(alpha)
    assert_close((f1 - f0) / (2 * h), alpha * stats.var, 1e-5 * (1 + float(stats.var)))
    assert_close((r1 - r0) / (2 * h), stats.mean, 1e-5 * (1 + float(stats.var)))
    g, _ = slope(target, place, stats)
    scale = 1 + float(stats.var) * (1 + float(ready.f + ready.r)) ** 2 * 10
    assert_close((loss(target, f1, r1) - loss(target, f0, r0)) / (2 * h), 2 * g, 1e-4 * scale)


@examples
@given(members(rows=(2, 5)), st.sampled_from(STRATEGIES), st.sampled_from([7, 64, 10**6]))
def test_rows_do_not_see_each_other(drawn, strategy, tile):
    from logit_fusion import tiles

    logits, _ = drawn
    whole = fuse(logits, strategy=strategy)
    sizes = tiles.NODE_TILE, tiles.TILE
    tiles.NODE_TILE = tiles.TILE = tile
    try:
        tiled = fuse(logits, strategy=strategy)
        alone = [fuse([x[i] for x in logits], strategy=strategy) for i in range(len(logits[0]))]
    finally:
        tiles.NODE_TILE, tiles.TILE = sizes
    for other in (tiled.alpha, torch.stack([x.alpha for x in alone])):
        assert_close(whole.alpha, other, 1e-6)
    for other in (tiled.log_probs, torch.stack([x.log_probs for x in alone])):
        assert_close(whole.log_probs, other, 1e-6)


@examples
@given(members(), st.sampled_from([*STRATEGIES, "joint"]), st.sampled_from(["exact", "newton"]))
def test_fused_probabilities_sum_to_one(drawn, strategy, solver):
    logits, _ = drawn
    step = fuse(logits, strategy=strategy, solver=solver)
    assert_close(step.log_probs.exp().sum(-1), torch.ones_like(step.loss), 1e-9)
    shift = (step.alpha.mT.unsqueeze(-1) * torch.stack([x - logits[1] for x in logits[2:]])).sum(0)
    assert_close(step.log_probs, (logits[0] + shift).log_softmax(-1), 1e-8)


@examples
@given(members(), st.floats(0.0, 0.5), st.sampled_from([*STRATEGIES, "joint"]), st.floats(0.1, 2.0))
def test_the_bound_on_the_divergence_holds(drawn, bound, strategy, scale):
    logits, _ = drawn
    logits = [x * scale for x in logits]
    free, step = fuse(logits, strategy=strategy), fuse(logits, strategy=strategy, max_kl=bound)
    kl = (step.log_probs.exp() * (step.log_probs - logits[0].log_softmax(-1))).sum(-1)
    assert (kl <= bound + 1e-6).all()
    assert (step.kl_forward <= bound + 1e-6).all()
    untouched = free.kl_forward <= bound
    assert_close(step.alpha[untouched], free.alpha[untouched], 1e-6)
    # Not more cautious than asked for.
    assert_close(kl[~untouched], torch.full_like(kl[~untouched], bound), 1e-5)


@examples
@given(members(experts=(1, 1), vocab=(2, 60), shift=(0.2, 8.0)))
def test_float32_agrees_with_float64(drawn):
    logits, _ = drawn
    single = [x.float() for x in logits]
    wide = fuse([x.double() for x in single])
    narrow = fuse_logits(single[0], single[1], single[2:])
    assert narrow.alpha.dtype == narrow.log_probs.dtype == torch.float32
    sure = (wide.f + wide.r).squeeze(-1) > 1e-4
    value = plain_divergences(*[x.double() for x in single], narrow.alpha.double())
    target = make_target(value[2].unsqueeze(-1), value[3].unsqueeze(-1), "paper", "main", DOUBLE)
    # The loss is what matters: near a flat minimum alpha itself may differ.
    excess = loss(target, value[0], value[1]) - wide.loss
    assert (excess[sure] <= 1e-5 * (wide.loss + (wide.f + wide.r).squeeze(-1) ** 2)[sure]).all()


@examples
@given(members(experts=(1, 1), shift=(0.2, 2.0)), st.sampled_from([0.1, 0.2, 0.4]))
def test_four_steps_reach_the_minimum(drawn, spacing):
    """The same bracket searched by brute force holds nothing better."""
    logits, _ = drawn
    ready, _ = prepared(logits, None, DOUBLE, differentiable=False)
    family = make_family(ready.log_p, ready.p, ready.shifts[0])
    target = aim_at(ready.f, ready.r, ready, Search())
    step = fuse(logits, step=spacing)
    for offset in (-1e-4, 1e-4):
        place = (step.alpha.squeeze(-1) + offset).clamp(0.0, 2.0)
        forward, reverse = divergences(family.moments(place.numpy()), place.numpy(), 0.0)
        assert (as_tensor(loss(target, forward, reverse)) >= step.loss - 1e-12).all()


def test_grid_nodes():
    places = make_grid(0.0, 2.0, 0.1).places
    assert len(places) == 21
    assert places[3] == 0.0 + 3 * 0.1
    assert make_grid(0.0, 0.5, 0.1).places[-1] == 0.5
    assert make_grid(0.5, 2.0, 0.4).places == (0.5, 0.9, 1.3, 0.5 + 3 * 0.4, 2.0)
    assert make_grid(0.0, 1.0, 1.0) == ((0.0, 1.0), 1.0, True)


def test_normalized_sums_to_one_in_float32():
    logits = torch.randn(4, 128_256, generator=torch.Generator().manual_seed(0)) * 3
    total = normalized(logits).double().exp().sum(-1)
    assert_close(total, torch.ones(4, dtype=DOUBLE), 2e-7)


@pytest.mark.parametrize("high", [0.3, 5.0, 50.0])
def test_huge_shifts_stay_finite(high, device):
    """Where powers would overflow, the slow road gives what float64 gives."""
    made = torch.Generator().manual_seed(1)
    large = torch.randn(3, 50, generator=made) * 5
    base = large + torch.randn(3, 50, generator=made)
    expert = base.clone()
    expert[0, :2] += torch.tensor([90.0, -1e4])
    expert[1] *= 30.0
    logits = [x.to(device) for x in (large, base, expert)]
    options = {"alpha_range": (0.0, high), "step": high / 20, "solver": "grid"}
    a = fuse_logits(logits[0], logits[1], logits[2:], **options)
    b = fuse_logits(logits[0], logits[1], logits[2:], compute_dtype=torch.float64, **options)
    assert torch.isfinite(a.log_probs).all()
    assert_close(a.alpha.double(), b.alpha, 1e-5 * high)
    assert_close(a.log_probs.double(), b.log_probs, 2e-2 * high)
