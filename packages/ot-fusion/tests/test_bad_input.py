"""Every bad input: the type of the error and the words that name the argument."""

import pytest
import torch
from torch import nn

from fusion_core.errors import FusionWarning
from ot_fusion import (
    FusionConfig,
    Moments,
    Plan,
    SolverError,
    SpecError,
    align,
    fuse,
    ground_cost,
    merge_maps,
    solve,
)
from ot_fusion.errors import DataError, InputError, ShapeError

EMD = FusionConfig(solver="emd")


torch.manual_seed(0)
NET = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
OTHER = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
X = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: fuse([NET]), InputError, "at least 2"),
        (lambda: fuse([NET, 3]), InputError, r"models\['1'\] is int"),
        (lambda: fuse([NET, OTHER]), InputError, "needs data"),
        (lambda: fuse([NET, OTHER], anchor="c", data=X), InputError, "anchor is 'c'"),
        (lambda: fuse([NET, OTHER], anchor=5, data=X), InputError, "index below 2"),
        (lambda: fuse([NET, OTHER], weights=[0.5, 0.6], data=X), InputError, "sum to 1"),
        (lambda: fuse([NET, OTHER], weights=[1.5, -0.5], data=X), InputError, "not negative"),
        (lambda: fuse([NET, OTHER], weights={"a": 1}, data=X), InputError, "one for each of 0, 1"),
        (lambda: fuse([NET, OTHER], data=[]), DataError, "no samples"),
        (lambda: fuse([NET, OTHER], data=3), DataError, "data is int"),
        (lambda: fuse([NET, OTHER], data=["text"]), DataError, "a batch is str"),
        (lambda: fuse([NET, OTHER], data=X[:1]), DataError, "standardising takes at least 2"),
        (
            lambda: fuse([NET, OTHER], data=X.log()),
            DataError,
            "activations of 0 in the source are NaN or infinite in batch 0",
        ),
        (
            lambda: fuse([NET.state_dict(), OTHER.state_dict()], config=FusionConfig(features="wts")),
            InputError,
            "give its spec",
        ),
        (
            lambda: fuse([NET, nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))], data=X),
            ShapeError,
            "fixed axes .* 2.weight",
        ),
        (lambda: FusionConfig(alpha=1.5), InputError, r"alpha is 1\.5"),
        (lambda: FusionConfig(clip=(5.0, 0.0)), InputError, "lower end"),
        (lambda: FusionConfig(reg=0.0), InputError, "reg is 0.0"),
        (lambda: FusionConfig(samples=0), InputError, "samples is 0"),
        (lambda: FusionConfig(tokens="window"), InputError, "window:6"),
        (lambda: solve(torch.full((2, 2), float("nan"))), SolverError, "NaN"),
        (
            lambda: solve(torch.ones(2, 2), torch.tensor([0.5, 0.0])),
            SolverError,
            "mu has masses that are not positive",
        ),
        (lambda: solve(torch.ones(2, 2), torch.ones(2), torch.ones(2) / 2), SolverError, "mu sums to 2"),
        (lambda: solve(torch.ones(2, 2), torch.ones(3)), ShapeError, "mu has shape"),
        (lambda: solve(torch.ones(2, 2), solver="sinkhorn", reg=0.0), SolverError, "reg is 0.0"),
        (lambda: solve(torch.ones(2, 2), solver="simplex"), InputError, "solver is 'simplex'"),
        (lambda: solve(torch.rand(3, 2), solver="lsa"), SolverError, "use emd"),
        (lambda: solve(torch.rand(4)), ShapeError, "cost has shape"),
        (
            lambda: solve(torch.rand(8, 8, dtype=torch.float64), solver="sinkhorn", reg=0.001, max_iter=2),
            SolverError,
            "did not converge",
        ),
        (lambda: ground_cost(torch.rand(2, 3), torch.rand(2, 4)), ShapeError, "same samples"),
        (
            lambda: ground_cost(torch.rand(2, 3), torch.rand(2, 3), "manhattan"),
            InputError,
            "metric is 'manhattan'",
        ),
        (
            lambda: ground_cost(torch.rand(2, 3), torch.rand(2, 3), normalize="l2"),
            InputError,
            "normalize is 'l2'",
        ),
        (lambda: ground_cost(torch.rand(2, 3), torch.rand(2, 3), clip=(2, 1)), InputError, "clip"),
        (
            lambda: ground_cost(torch.rand(2, 3).log() * float("nan"), torch.rand(2, 3)),
            SolverError,
            "not finite",
        ),
        (lambda: merge_maps("sum", torch.eye(2), torch.eye(2)), InputError, "residual is 'sum'"),
        (
            lambda: merge_maps("weighted_matrix", torch.eye(2), torch.eye(2)),
            InputError,
            "weighs by activations",
        ),
        (lambda: merge_maps("mean", torch.eye(2), torch.eye(3)), ShapeError, "maps of a sum"),
        (lambda: Plan(torch.ones(2)), ShapeError, "a plan has shape"),
        (lambda: Plan(torch.ones(2, 2), "other").out_map(), InputError, "normalization is 'other'"),
        (lambda: Moments().squared_cost(), DataError, "no activations"),
        (lambda: Moments().update(torch.ones(2, 2), torch.ones(3, 2)), ShapeError, "same inputs"),
        (lambda: align(NET, to=3), InputError, "to is int"),
    ],
)
def test_bad_input(call, kind, words):
    with pytest.raises(kind, match=words):
        call()


def test_the_same_object_twice_is_allowed_with_a_warning():
    with pytest.warns(FusionWarning, match="given twice"):
        fuse([NET, NET], data=X, config=FusionConfig(solver="emd"))


def test_a_sinkhorn_that_is_nearly_there_warns():
    cost = torch.rand(30, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with pytest.warns(FusionWarning, match="error of"):
        solve(cost, solver="sinkhorn", reg=0.02, max_iter=31)


def test_quantised_and_foreign_tensors_are_refused(models):
    net = models.make("mlp")
    state = {
        key: value.to(torch.int8) if key == "0.weight" else value for key, value in net.state_dict().items()
    }
    from ot_fusion.spec import spec_for

    spec = spec_for(net)
    with pytest.raises(DataError, match=r"0.weight of .* has dtype torch.int8; dequantise"):
        fuse([state, net.state_dict()], spec=spec, config=FusionConfig(features="wts"))
    with pytest.raises(DataError, match="meta device"):
        fuse([net, models.make("mlp").to("meta")], config=FusionConfig(features="wts"))
    extra = net.state_dict() | {"adapter.lora_A": torch.zeros(2, 2)}
    with pytest.raises(SpecError, match=r"does not cover adapter\.lora_A"):
        fuse([extra, net.state_dict()], spec=spec, config=FusionConfig(features="wts"))
    with pytest.raises(SpecError, match="different operations"):
        fuse([models.make("convnet"), models.make("mlp")], config=FusionConfig(features="wts"))
