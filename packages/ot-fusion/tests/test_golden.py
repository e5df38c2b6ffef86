"""The recorded numbers of tests/golden (or of ``--golden DIR``): every file, in float64 and float32."""

import numpy as np
import pytest
import torch

from fusion_core.testing import array, parameter
from ot_fusion import (
    FusionConfig,
    align_vector,
    fuse_encoder_block,
    fuse_linear,
    ground_cost,
    merge_maps,
    solve,
)

DTYPES = [torch.float64, torch.float32]
both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float64", "float32"])


def made(entry, dtype=torch.float64):
    values = array(entry["name"], tuple(entry["shape"]), entry.get("scale", 1.0), entry.get("shift", 0.0))
    return torch.as_tensor(values, dtype=dtype)


def close(golden, actual, expected, tolerance, dtype, what):
    loose = golden.settings["tolerance_float32"]["arrays"]
    golden.assert_close(
        actual, expected, atol=tolerance if dtype == torch.float64 else loose, rtol=0, what=what
    )


def config_of(case, **more):
    names = {"policy": "residual"}
    fields = {
        "features",
        "metric",
        "squared",
        "normalize",
        "solver",
        "reg",
        "transform",
        "tokens",
        "policy",
        "qk",
    }
    fields |= {"alpha", "row_norm"}
    found = {names.get(key, key): value for key, value in case.items() if key in fields}
    return FusionConfig.official(**({"reg": 0.08} | found | more))


@both_dtypes
def test_metric(golden, dtype):
    record, settings = golden.load("metric.npz"), golden.settings["metric"]
    x, y = made(settings["x"], dtype), made(settings["y"], dtype)
    assert set(settings["arrays"]) == set(record)
    for key, case in settings["arrays"].items():
        rows = [r / (r.norm(dim=1, keepdim=True) + 1e-9) if case.get("row_norm") else r for r in (x, y)]
        cost = ground_cost(*rows, case["metric"], case.get("squared", False), case["normalize"])
        close(golden, cost, record[key], case["tolerance"], dtype, key)


def test_solver(golden):
    record, settings = golden.load("solver.npz"), golden.settings["solver"]
    assert set(settings["arrays"]) == set(record)
    for key, case in settings["arrays"].items():
        problem = settings["problems"][case["problem"]]
        cost = made(problem["cost"]).abs()
        masses = [None, None]
        if case.get("weighted"):
            masses = [made(problem[name]).abs() + 0.1 for name in ("mu", "nu")]
            masses = [m / m.sum() for m in masses]
        options = {"tol": case.get("stop", 1e-9), "max_iter": case.get("max_iter", 1000)}
        plan = solve(
            cost / cost.max(),
            *masses,
            solver=case["solver"],
            reg=case.get("reg", 0.08),
            reg_m=case.get("reg_m", 1.0),
            **options,
        )
        found = plan.info["cost"] if case.get("value") == "cost" else plan.matrix
        golden.assert_close(found, record[key], atol=case["tolerance"], rtol=0, what=key)


@pytest.mark.parametrize("solver", ["sinkhorn_log", "sinkhorn_stabilized"])
def test_the_other_sinkhorns_reach_the_same_plans(golden, solver):
    record, settings = golden.load("solver.npz"), golden.settings["solver"]
    cases = [
        (k, c)
        for k, c in settings["arrays"].items()
        if c["solver"].startswith("sinkhorn") and not c.get("weighted")
    ]
    for key, case in cases:
        cost = made(settings["problems"][case["problem"]]["cost"]).abs()
        found = solve(cost / cost.max(), solver=solver, reg=case["reg"], tol=1e-12, max_iter=100_000)
        golden.assert_close(found.matrix, record[key], atol=case["tolerance"], rtol=0, what=key)


@both_dtypes
def test_layer(golden, dtype):
    record, settings = golden.load("layer.npz"), golden.settings["layer"]
    for prefix, case in settings["cases"].items():
        tensors = {name: made(entry, dtype) for name, entry in settings["layers"][case["layer"]].items()}
        t_in = None if case["t_in"] is None else torch.as_tensor(record[case["t_in"]], dtype=dtype)
        parts = [tensors[name] for name in ("w0", "b0", "w1", "b1")]
        acts = (tensors["a0"], tensors["a1"])
        found = fuse_linear(*parts, t_in, acts, config_of(case), case.get("last_layer", False))
        for name, value in zip(("weight", "bias", "t_out"), found, strict=True):
            if f"{prefix}.{name}" in record:
                close(golden, value, record[f"{prefix}.{name}"], case["tolerance"], dtype, f"{prefix}.{name}")
            else:
                assert value is None
    norm = settings["norm"]
    t = torch.as_tensor(record[norm["t_in"]], dtype=dtype)
    for kind in ("weight", "bias"):
        v0, v1 = (made(norm[f"{kind[0]}{side}"], dtype) for side in (0, 1))
        mixed = (1 - norm["alpha"]) * align_vector(v0, t) + norm["alpha"] * v1
        close(golden, mixed, record[f"ln.{kind}"], norm["tolerance"], dtype, kind)
    resid = settings["residual"]
    maps = [made(resid[name], dtype).abs() for name in ("t_resid", "t_branch")]
    acts = [made(resid[name], dtype) for name in ("resid_acts", "branch_acts")]
    for policy in resid["policies"]:
        merged = merge_maps(policy, *maps, *acts)
        close(golden, merged, record[f"resid.{policy}"], resid["tolerance"], dtype, policy)


NORMS = ("layernorm_before", "layernorm_after")
SQUARE = (
    "attention.attention.query",
    "attention.attention.key",
    "attention.attention.value",
    "attention.output.dense",
)


def block(prefix, hidden, inner, dtype):
    shapes = {name: (hidden, hidden) for name in SQUARE}
    shapes |= {"intermediate.dense": (inner, hidden), "output.dense": (hidden, inner)}
    found = {}
    for name in NORMS:
        shapes[name] = (hidden,)
    for name, shape in shapes.items():
        found[f"{name}.weight"] = parameter(f"{prefix}{name}.weight", shape)
        found[f"{name}.bias"] = parameter(f"{prefix}{name}.bias", shape[:1])
    return {key: torch.as_tensor(value, dtype=dtype) for key, value in found.items()}


@both_dtypes
def test_encoder(golden, dtype):
    record, settings = golden.load("encoder.npz"), golden.settings["encoder"]
    hidden, inner, samples = settings["hidden"], settings["intermediate"], settings["samples"]
    params, acts = [], []
    for side in ("source", "anchor"):
        prefix = settings[side]
        params.append(block(prefix, hidden, inner, dtype))
        widths = {name: hidden for name in (*SQUARE, "output.dense")} | {"intermediate.dense": inner}
        found = {name: {"name": f"{prefix}acts.{name}", "shape": [samples, n]} for name, n in widths.items()}
        scale = settings["attention_scale"]
        found["attention"] = {"name": f"{prefix}acts.attention", "shape": [samples, hidden], "scale": scale}
        acts.append({name: made(entry, dtype) for name, entry in found.items()})
    t_in = torch.as_tensor(record["t_in"], dtype=dtype)
    previous = made(settings["previous"], dtype)
    for prefix, case in settings["cases"].items():
        flags = {name: case.get(name, False) for name in ("last_block", "post_norm")}
        out, t_out, _ = fuse_encoder_block(*params, *acts, t_in, config_of(case), previous, **flags)
        for key, value in out.items():
            close(golden, value, record[f"{prefix}.{key}"], case["tolerance"], dtype, f"{prefix}.{key}")
        if f"{prefix}.t_out" in record:
            close(golden, t_out, record[f"{prefix}.t_out"], case["tolerance"], dtype, f"{prefix}.t_out")
        else:
            assert t_out is None
    assert {key for key in record if np.ndim(record[key]) and "." in key} == {
        key for key in record if key.startswith(tuple(f"{p}." for p in settings["cases"]))
    }
