"""Laws of costs, plans, maps and fusion (section 8 of the specification), on drawn inputs."""

import itertools
import math
import warnings

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fusion_core.errors import FusionWarning
from ot_fusion import (
    FusionConfig,
    Moments,
    Plan,
    align_conv,
    align_linear,
    fuse,
    fuse_linear,
    ground_cost,
    merge_maps,
    solve,
)
from ot_fusion.apply import map_axis
from ot_fusion.solvers import solve_batch
from ot_fusion.tokens import as_samples, token_mask

law = settings(max_examples=15, deadline=None)
sizes = st.integers(2, 9)
seeds = st.integers(0, 10_000)


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cost_of(seed, n0, n1):
    cost = draw(seed, n0, n1).abs()
    return cost / cost.max()


@law
@given(seeds, sizes, sizes, st.sampled_from(["emd", "sinkhorn", "sinkhorn_log", "sinkhorn_stabilized"]))
def test_marginals(seed, n0, n1, solver):
    masses = [draw(seed + k, n).abs() + 0.1 for k, n in ((1, n0), (2, n1))]
    mu, nu = (m / m.sum() for m in masses)
    plan = solve(cost_of(seed, n0, n1), mu, nu, solver, reg=0.2, max_iter=100_000)
    limit = 1e-12 if solver == "emd" else 1e-8
    assert float((plan.matrix.sum(1) - mu).abs().max()) <= limit
    assert float((plan.matrix.sum(0) - nu).abs().max()) <= limit
    assert float(plan.matrix.min()) >= 0


@law
@given(seeds, sizes, sizes)
def test_the_exact_plan_is_cheapest_and_the_price_of_entropy_rises(seed, n0, n1):
    cost = cost_of(seed, n0, n1)
    exact = solve(cost).info["cost"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FusionWarning)  # it says what the next line asks
        soft = [
            solve(cost, solver="sinkhorn_log", reg=reg, max_iter=20_000, tol=1e-9).info
            for reg in (0.05, 0.2, 1.0, 100.0)
        ]
    # Where two plans cost nearly the same, the steps take very long: such a draw says nothing of the law.
    assume(all(info["marginal_error"] <= 1e-5 for info in soft))
    prices = [info["cost"] for info in soft]
    assert exact <= prices[0] + 1e-9
    assert all(a <= b + 1e-8 for a, b in itertools.pairwise(prices))
    product = float(cost.mean())
    assert abs(prices[-1] - product) < 1e-2
    sharp = solve(cost, solver="sinkhorn_log", reg=0.01, max_iter=20_000, tol=1e-5).info["cost"]
    assert abs(sharp - exact) < 0.01 * math.log(n0 * n1) + 1e-4


@law
@given(seeds, sizes)
def test_emd_equals_the_assignment_and_swapping_roles_transposes(seed, n):
    cost = cost_of(seed, n, n)
    even = torch.full((n,), 1 / n, dtype=torch.float64)
    by_pot, by_lsa = solve(cost, even, even, "emd"), solve(cost, solver="lsa")
    torch.testing.assert_close(by_pot.matrix, by_lsa.matrix, atol=1e-12, rtol=0)
    torch.testing.assert_close(solve(cost.T).matrix, by_lsa.matrix.T, atol=1e-12, rtol=0)
    torch.testing.assert_close(by_lsa.transpose().matrix, by_lsa.matrix.T)


@law
@given(seeds, st.integers(1, 4), st.integers(1, 4))
def test_whole_ratios_are_solved_by_one_assignment(seed, n, times):
    cost = cost_of(seed, n * times, n)
    mu, nu = (torch.full((k,), 1 / k, dtype=torch.float64) for k in cost.shape)
    assert abs(solve(cost).info["cost"] - solve(cost, mu, nu).info["cost"]) < 1e-12
    assert abs(solve(cost.T).info["cost"] - solve(cost).info["cost"]) < 1e-12


def test_a_constant_cost_gives_the_identity():
    for n0, n1 in ((3, 3), (4, 2), (2, 6), (2, 3)):
        plan = solve(torch.zeros(n0, n1, dtype=torch.float64))
        torch.testing.assert_close(plan.matrix, Plan.identity(n0, n1).matrix)
        torch.testing.assert_close(plan.matrix.sum(1), torch.full((n0,), 1 / n0, dtype=torch.float64))
        soft = solve(torch.full((n0, n1), 0.7, dtype=torch.float64), solver="sinkhorn")
        torch.testing.assert_close(soft.matrix, torch.full((n0, n1), 1 / (n0 * n1), dtype=torch.float64))


@law
@given(
    seeds,
    st.lists(st.integers(1, 12), min_size=1, max_size=5),
    st.sampled_from(["std", "center", "norm", "none"]),
)
def test_streamed_moments_equal_the_dense_cost(seed, splits, transform):
    total = sum(splits) + 2
    z0, z1 = draw(seed, total, 5) * 3 + 1, draw(seed + 1, total, 4) - 2
    moments, other = Moments(), Moments()
    parts = list(zip(z0.split([*splits, 2]), z1.split([*splits, 2]), strict=True))
    for pair in parts[::2]:
        moments.update(*pair)
    for pair in parts[1::2]:
        other.update(*pair)
    moments.merge(other)

    def changed(z):
        if transform in ("std", "center"):
            z = z - z.mean(0)
        if transform == "std":
            z = z / (z.std(0) + 1e-9)
        return z / z.norm(dim=0) if transform == "norm" else z

    a, b = changed(z0).T, changed(z1).T
    dense = (a[:, None] - b[None]).square().sum(-1)
    assert float((moments.squared_cost(transform) - dense).abs().max()) <= 1e-12 * max(
        float(dense.max()), 1.0
    )
    for metric in ("euclidean", "cosine", "angular"):
        wanted = ground_cost(a, b, metric, normalize="none")
        torch.testing.assert_close(
            moments.cost(transform, metric, normalize="none"), wanted, atol=2e-7, rtol=1e-7
        )


@law
@given(seeds, sizes, sizes)
def test_the_cost_ignores_turns_and_order_of_samples(seed, n0, n1):
    x, y = draw(seed, n0, 6), draw(seed + 1, n1, 6)
    turn = torch.linalg.qr(draw(seed + 2, 6, 6)).Q
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    base = ground_cost(x, y)
    torch.testing.assert_close(ground_cost(x @ turn, y @ turn), base, atol=1e-9, rtol=0)
    torch.testing.assert_close(ground_cost(x[:, order], y[:, order]), base, atol=1e-12, rtol=0)


def test_large_costs_by_matrix_product_equal_small_ones():
    x, y = draw(0, 200, 300), draw(1, 150, 300)
    product = ground_cost(x, y, normalize="none")
    rows = torch.cat([ground_cost(part, y, normalize="none") for part in x.split(10)])
    torch.testing.assert_close(product, rows, atol=1e-9, rtol=0)


@law
@given(seeds, sizes)
def test_relabelling_the_anchor_permutes_the_result(seed, n):
    w0, w1, acts = draw(seed, n, 4), draw(seed + 1, n, 4), (draw(seed + 2, 20, n), draw(seed + 3, 20, n))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    config = FusionConfig(solver="emd")
    fused, _, t = fuse_linear(w0, None, w1, None, None, acts, config)
    again, _, moved = fuse_linear(w0, None, w1[order], None, None, (acts[0], acts[1][:, order]), config)
    torch.testing.assert_close(again, fused[order], atol=1e-12, rtol=0)
    torch.testing.assert_close(moved, t[:, order], atol=1e-12, rtol=0)


@pytest.mark.parametrize("strategy", ["flow", "consistent"])
def test_fusion_is_affine_in_alpha(models, strategy):
    pair, data = [models.make("vit"), models.make("vit", seed=1)], models.inputs("vit", 20)
    states = {}
    for alpha in (0.0, 0.25, 1.0):
        config = FusionConfig(strategy=strategy, solver="emd", alpha=alpha)
        states[alpha] = fuse(pair, data=data, config=config).state
    for key, anchor in pair[1].state_dict().items():
        torch.testing.assert_close(states[1.0][key], anchor, atol=1e-12, rtol=0)
        torch.testing.assert_close(
            states[0.25][key], 0.75 * states[0.0][key] + 0.25 * anchor, atol=1e-12, rtol=0
        )


POLICIES = ["mean", "weighted_scalar", "weighted_matrix", "no_resid", "only_resid"]


@law
@given(seeds, sizes)
def test_policies(seed, n):
    t1, t2 = (
        solve(cost_of(seed + k, n, n), solver="sinkhorn", reg=0.5, max_iter=10_000).out_map() for k in (1, 2)
    )
    acts = draw(seed, 10, n), draw(seed + 5, 10, n)
    torch.testing.assert_close(merge_maps("mean", t1, t2), merge_maps("mean", t2, t1))
    for policy in POLICIES:
        torch.testing.assert_close(merge_maps(policy, t1, t1, *acts), t1, atol=1e-12, rtol=0)
        merged = merge_maps(policy, t1, t2, *acts)
        if policy != "weighted_matrix":
            torch.testing.assert_close(merged.sum(1), torch.ones(n, dtype=torch.float64), atol=1e-6, rtol=0)
    zero = torch.zeros(4, n, dtype=torch.float64)
    for policy in ("weighted_scalar", "weighted_matrix"):
        torch.testing.assert_close(merge_maps(policy, t1, t2, zero, zero), merge_maps("mean", t1, t2))
    assert merge_maps("mean", None, None) is None
    torch.testing.assert_close(merge_maps("resid_as_identity", t1, t2), torch.eye(n, dtype=torch.float64))


@law
@given(seeds, st.integers(2, 4))
def test_duplicates_are_fused_back_exactly(seed, times):
    draws = torch.Generator().manual_seed(seed)
    small = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.ReLU(), torch.nn.Linear(4, 3)).double()
    for number, p in enumerate(small.parameters()):
        p.data = draw(seed + number, *p.shape)
    order = torch.arange(4).repeat_interleave(times)[torch.randperm(4 * times, generator=draws)]
    wide = torch.nn.Sequential(
        torch.nn.Linear(5, 4 * times), torch.nn.ReLU(), torch.nn.Linear(4 * times, 3)
    ).double()
    s = small.state_dict()
    wide.load_state_dict(
        {
            "0.weight": s["0.weight"][order],
            "0.bias": s["0.bias"][order],
            "2.weight": s["2.weight"][:, order] / times,
            "2.bias": s["2.bias"],
        }
    )
    config = FusionConfig(features="wts", solver="emd", normalization="exact", alpha=0.0)
    fused = fuse([wide, small], config=config)
    for key, value in s.items():
        torch.testing.assert_close(fused.state[key], value, atol=1e-12, rtol=0)


def test_unequal_copies_need_unequal_masses():
    copies = torch.tensor([1, 3])
    order = torch.arange(2).repeat_interleave(copies)
    w = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    cost = ground_cost(w[order], w)
    plan = solve(cost, nu=copies / 4.0)
    exact = Plan(plan.matrix, "exact")
    torch.testing.assert_close(exact.out_map().T @ w[order], w)
    split = torch.tensor([[3.0, 1.0, 1.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(split @ exact.in_map(), torch.tensor([[3.0, 3.0]], dtype=torch.float64))


@law
@given(seeds)
def test_equal_models_stay_whatever_the_weights(seed):
    net = torch.nn.Sequential(torch.nn.Linear(3, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2))
    import copy

    twins = {name: copy.deepcopy(net) for name in "abc"}
    raw = draw(seed, 3).abs() + 0.05
    weights = dict(zip("abc", (raw / raw.sum()).tolist(), strict=True))
    fused = fuse(twins, weights=weights, config=FusionConfig(features="wts", solver="emd"))
    assert all(torch.equal(fused.state[key], value) for key, value in net.state_dict().items())
    assert set(fused.maps) == {"a/0", "b/0"}


def test_tied_tables_stay_one_tensor(models):
    pair = [models.make("llama"), models.make("llama", seed=1)]
    fused = fuse(pair, data=models.inputs("llama", 10), config=FusionConfig(solver="emd"))
    assert fused.model.lm_head.weight.data_ptr() == fused.model.model.embed_tokens.weight.data_ptr()
    assert torch.equal(fused.state["lm_head.weight"], fused.state["model.embed_tokens.weight"])


@pytest.mark.parametrize("strategy", ["flow", "consistent"])
def test_the_same_seed_gives_the_same_bits(models, strategy):
    pair, data = [models.make("qwen3"), models.make("qwen3", seed=1)], models.inputs("qwen3", 12)
    runs = [fuse(pair, data=data, config=FusionConfig(strategy=strategy)) for _ in range(2)]
    assert all(torch.equal(runs[0].maps[name].matrix, runs[1].maps[name].matrix) for name in runs[0].maps)


@law
@given(seeds, sizes, sizes)
def test_maps_of_axes(seed, n0, n1):
    t_in, t_out = draw(seed, n0, n1), draw(seed + 1, n1, n0)
    weight = draw(seed + 2, n1, n0)
    moved, _ = align_linear(weight, None, t_in, t_out)
    torch.testing.assert_close(moved, t_out.T @ weight @ t_in, atol=1e-12, rtol=0)
    kernel = draw(seed + 3, n1, n0, 3, 2)
    conv, _ = align_conv(kernel, None, t_in, t_out)
    torch.testing.assert_close(
        conv, torch.einsum("oikl,ij,op->pjkl", kernel, t_in, t_out), atol=1e-10, rtol=0
    )
    flat = draw(seed + 4, 2, n0 * 3)
    wide = torch.kron(t_in, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(map_axis(flat, t_in, 1, inner=3), flat @ wide, atol=1e-10, rtol=0)


def test_gradients():
    x, y = draw(0, 3, 4).requires_grad_(), draw(1, 2, 4).requires_grad_()
    for metric in ("euclidean", "cosine", "angular"):
        assert torch.autograd.gradcheck(
            lambda a, b, metric=metric: ground_cost(a, b, metric, normalize="mean"), (x, y)
        )
    w, t = draw(2, 3, 4).requires_grad_(), draw(3, 4, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda w, t: align_linear(w, None, t)[0], (w, t))
    t1, t2 = draw(4, 3, 3).requires_grad_(), draw(5, 3, 3).requires_grad_()
    acts = draw(6, 5, 3), draw(7, 5, 3)
    for policy in POLICIES:
        assert torch.autograd.gradcheck(lambda a, b, policy=policy: merge_maps(policy, a, b, *acts), (t1, t2))


def test_batches_of_one_size_are_solved_as_alone(device):
    costs = [cost_of(k, 6, 6).to(device) for k in range(4)] + [cost_of(9, 5, 3).to(device)]
    for together, cost in zip(solve_batch(costs, "sinkhorn", 0.1), costs, strict=True):
        torch.testing.assert_close(
            together.matrix, solve(cost, solver="sinkhorn", reg=0.1).matrix, atol=1e-12, rtol=0
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_models_come_back_in_their_dtype(models, dtype):
    pair = [models.make("mlp").to(dtype), models.make("mlp", seed=1).to(dtype)]
    fused = fuse(pair, data=models.inputs("mlp", 30).to(dtype))
    assert {value.dtype for value in fused.state.values()} == {dtype}
    wide = [models.make("mlp"), models.make("mlp", seed=1)]
    exact = fuse(wide, data=models.inputs("mlp", 30))
    for key, value in exact.state.items():
        torch.testing.assert_close(
            fused.state[key].double(), value, atol=0.2 if dtype == torch.bfloat16 else 1e-4, rtol=0
        )


def test_token_filters():
    assert token_mask("all", 17).all()
    assert token_mask("cls", 17).nonzero().flatten().tolist() == [0]
    assert token_mask("window:2", 17).nonzero().flatten().tolist() == [0, 6, 7, 10, 11]
    assert token_mask("window:4", 17).all()
    kept = as_samples(torch.arange(12.0).view(2, 3, 2), 2, keep=torch.tensor([True, False, True]))
    assert kept.tolist() == [[0, 1], [4, 5], [6, 7], [10, 11]]
