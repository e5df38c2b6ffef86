"""The recorded numbers of tests/golden (or of ``--golden DIR``): every file, in float64 and float32."""

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance

from fusion_core.testing import array, parameter
from ot_fusion import (
    FusionConfig,
    align_vector,
    fuse,
    fuse_encoder_block,
    fuse_linear,
    ground_cost,
    merge_maps,
    solve,
)
from ot_fusion.groups import Full
from ot_fusion.spec.builder import SpecBuilder
from ot_fusion.spec.vit import vit_names

DTYPES = [torch.float64, torch.float32]
both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float64", "float32"])


def made(entry, dtype=torch.float64):
    values = array(entry["name"], tuple(entry["shape"]), entry.get("scale", 1.0), entry.get("shift", 0.0))
    return torch.as_tensor(values, dtype=dtype)


def assert_close(golden, actual, expected, tolerance, dtype, what):
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
        assert_close(golden, cost, record[key], case["tolerance"], dtype, key)


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
                assert_close(
                    golden, value, record[f"{prefix}.{name}"], case["tolerance"], dtype, f"{prefix}.{name}"
                )
            else:
                assert value is None
    norm = settings["norm"]
    t = torch.as_tensor(record[norm["t_in"]], dtype=dtype)
    for kind in ("weight", "bias"):
        v0, v1 = (made(norm[f"{kind[0]}{side}"], dtype) for side in (0, 1))
        mixed = (1 - norm["alpha"]) * align_vector(v0, t) + norm["alpha"] * v1
        assert_close(golden, mixed, record[f"ln.{kind}"], norm["tolerance"], dtype, kind)
    resid = settings["residual"]
    maps = [made(resid[name], dtype).abs() for name in ("t_resid", "t_branch")]
    acts = [made(resid[name], dtype) for name in ("resid_acts", "branch_acts")]
    for policy in resid["policies"]:
        merged = merge_maps(policy, *maps, *acts)
        assert_close(golden, merged, record[f"resid.{policy}"], resid["tolerance"], dtype, policy)


NORMS = ("layernorm_before", "layernorm_after")
SQUARE = (
    "attention.attention.query",
    "attention.attention.key",
    "attention.attention.value",
    "attention.output.dense",
)


def block(prefix, hidden, inner, dtype):
    shapes = dict.fromkeys(SQUARE, (hidden, hidden))
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
        widths = dict.fromkeys((*SQUARE, "output.dense"), hidden) | {"intermediate.dense": inner}
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
            assert_close(
                golden, value, record[f"{prefix}.{key}"], case["tolerance"], dtype, f"{prefix}.{key}"
            )
        if f"{prefix}.t_out" in record:
            assert_close(
                golden, t_out, record[f"{prefix}.t_out"], case["tolerance"], dtype, f"{prefix}.t_out"
            )
        else:
            assert t_out is None
    assert {key for key in record if np.ndim(record[key]) and "." in key} == {
        key for key in record if key.startswith(tuple(f"{p}." for p in settings["cases"]))
    }


def vit_of(entry, dtype):
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=entry["hidden"],
        num_hidden_layers=entry["blocks"],
        num_attention_heads=entry["heads"],
        intermediate_size=entry["intermediate"],
        image_size=entry["image"][1],
        num_channels=entry["image"][0],
        patch_size=entry["patch"],
        num_labels=entry["classes"],
        layer_norm_eps=1e-12,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        hidden_act="gelu",
    )
    model = ViTForImageClassification(config).to(dtype).eval()
    state = model.state_dict()
    names = {vit_key(key): key for key in old_names(entry)}  # by the names of transformers 5.23
    names = {key: names[vit_key(key)] for key in state}
    assert set(names) == set(state)
    filled = {
        k: torch.as_tensor(parameter(entry["prefix"] + names[k], tuple(v.shape)), dtype=dtype)
        for k, v in state.items()
    }
    model.load_state_dict(filled)
    return model


def old_names(entry):
    found = [f"vit.embeddings.{n}" for n in ("cls_token", "position_embeddings")]
    parts = ["vit.embeddings.patch_embeddings.projection", "vit.layernorm", "classifier"]
    for number in range(entry["blocks"]):
        parts += [
            f"vit.encoder.layer.{number}.{name}"
            for name in (*NORMS, *SQUARE, "intermediate.dense", "output.dense")
        ]
    return found + [f"{part}.{kind}" for part in parts for kind in ("weight", "bias")]


def vit_key(old):
    return next(iter(vit_names({old: None})))


ORDER = ["q", "k", "v", "o", "fc1", "fc2"]


@both_dtypes
@pytest.mark.golden_files("vit*.npz")
def test_vit(golden, golden_file, dtype):
    record, settings = golden.load(golden_file), golden.settings[golden_file.removesuffix(".npz")]
    models = {name: vit_of(entry, dtype) for name, entry in settings["models"].items()}
    images = made(settings["images"], dtype)
    exact = dtype == torch.float64
    logits_tolerance = (
        settings["logits_tolerance"] if exact else golden.settings["tolerance_float32"]["logits"]
    )
    for key, names in settings["logits"].items():
        states = [models[name].state_dict() for name in names]
        model = vit_of(settings["models"][names[0]], dtype)
        model.load_state_dict({k: sum(s[k] for s in states) / len(states) for k in states[0]})
        golden.assert_close(
            model(images).logits, record[f"{key}/logits"], atol=logits_tolerance, rtol=0, what=key
        )
    for key, case in settings["cases"].items():
        chosen = [models[name] for name in case["source"]]
        config = config_of(case, alpha=case.get("alpha_outside", case["alpha"]))
        fused = fuse([*chosen, models[case["anchor"]]], data=images, config=config)
        state = fused.model.state_dict()
        here = {vit_key(name): name for name in state}
        ties = case.get("ties", [])
        for name in [k.partition("/")[2] for k in record if k.startswith(f"{key}/")]:
            expected = record[f"{key}/{name}"]
            if name in ties or name == "logits":
                continue
            if name.startswith("map."):
                number = int(name[4:])
                nodes = ["class_token", "positions", "patch"]
                nodes += [
                    f"blocks.{b}.{part}" for b in range(settings["models"]["m1"]["blocks"]) for part in ORDER
                ]
                assert_close(
                    golden,
                    fused.maps[nodes[number]].official_map(),
                    expected,
                    case["tolerance"],
                    dtype,
                    f"{key}/{name}",
                )
                continue
            assert_close(
                golden, state[here[vit_key(name)]], expected, case["tolerance"], dtype, f"{key}/{name}"
            )
        if ties:
            plan = fused.maps["class_token"].matrix
            n0, n1 = plan.shape
            assert torch.allclose(plan.sum(0), torch.full((n1,), 1 / n1, dtype=plan.dtype), atol=1e-12)
            assert torch.allclose(plan.sum(1), torch.full((n0,), 1 / n0, dtype=plan.dtype), atol=1e-12)
            rows = [
                models[m].vit.embeddings.cls_token.detach().double().flatten()
                for m in (case["source"][0], case["anchor"])
            ]
            if case["features"] == "wts":
                rows = [r / (r.abs() + 1e-9) for r in rows]
            cost = (rows[0][:, None] - rows[1][None, :]).abs()
            least = wasserstein_distance(rows[0].numpy(), rows[1].numpy())
            assert abs(float((plan * cost).sum()) - least) <= 1e-12 * float(cost.max())
            state["vit.embeddings.cls_token"] = torch.as_tensor(
                record[f"{key}/vit.embeddings.cls_token"], dtype=dtype
            )
            fused.model.load_state_dict(state)
        if f"{key}/logits" in record:
            found = fused.model(images).logits
            golden.assert_close(
                found, record[f"{key}/logits"], atol=logits_tolerance, rtol=0, what=f"{key}/logits"
            )


class Net(torch.nn.Module):
    """The predecessor's bias-free nets, by their layer lists."""

    def __init__(self, entry, dtype):
        super().__init__()
        self.kind, self.names = entry["kind"], [name for name, _, _ in entry["layers"]]
        for name, shape, _ in entry["layers"]:
            if len(shape) == 4:
                stride = (
                    2 if self.kind == "resnet" and name in ("layer2.0.conv1", "layer2.0.shortcut.0") else 1
                )
                layer = torch.nn.Conv2d(shape[1], shape[0], shape[2], stride, shape[2] // 2, bias=False)
            else:
                layer = torch.nn.Linear(shape[1], shape[0], bias=False)
            values = parameter(f"{entry['prefix']}{name}.weight", tuple(shape))
            layer.weight.data = torch.as_tensor(values, dtype=dtype)
            self.add_module(name.replace(".", "_"), layer)

    def at(self, name):
        return getattr(self, name.replace(".", "_"))

    def forward(self, x):
        relu, pool = torch.relu, torch.nn.functional.max_pool2d
        if self.kind == "mlp":
            for name in self.names[:-1]:
                x = relu(self.at(name)(x))
            return self.at(self.names[-1])(x)
        if self.kind == "cnn":
            x = pool(relu(self.at("conv1")(x)), 2)
            x = pool(relu(self.at("conv2")(x)), 2).flatten(1)
            return self.at("fc2")(relu(self.at("fc1")(x)))
        x = relu(self.at("conv1")(x))
        x = relu(self.at("layer1.0.conv2")(relu(self.at("layer1.0.conv1")(x))) + x)
        skip = self.at("layer2.0.shortcut.0")(x)
        x = relu(self.at("layer2.0.conv2")(relu(self.at("layer2.0.conv1")(x))) + skip)
        return self.at("linear")(x.mean((2, 3)))


def net_spec(entry):
    builder = SpecBuilder(entry["kind"], [f"{n.replace('.', '_')}.weight" for n, _, _ in entry["layers"]])
    shapes = {name: shape for name, shape, _ in entry["layers"]}
    last = entry["layers"][-1][0]
    for name, shape, before in entry["layers"]:
        if before is not None:
            space, view, _ = builder.where[before]
            builder.where[before] = (space, view, shape[1] // shapes[before][0])
        space = builder.space(name, Full(shape[0])) if name != last else None
        path = name.replace(".", "_")
        builder.linear(path, before, name, space, kernel=len(shape) - 2, hook=path)
    return builder.build()


@both_dtypes
def test_otfusion(golden, dtype):
    record, settings = golden.load("otfusion.npz"), golden.settings["otfusion"]
    for key, case in settings["cases"].items():
        entries = [settings["nets"][case[side]] for side in ("source", "anchor")]
        nets = [Net(entry, dtype) for entry in entries]
        specs = {name: net_spec(entry) for name, entry in zip(("0", "1"), entries, strict=True)}
        found = {
            k: v
            for k, v in case.items()
            if k
            in (
                "features",
                "solver",
                "reg",
                "normalize",
                "squared",
                "row_norm",
                "alpha",
                "importance",
                "transport_last",
            )
        }
        rule = "otfusion_proper" if case.get("proper") else "otfusion"
        config = FusionConfig.otfusion(**found, normalization=rule)
        data = made(settings["inputs"][entries[0]["kind"]], dtype)
        fused = fuse(nets, data=data, config=config, spec=specs)
        for name, _, _ in entries[1]["layers"]:
            wanted = (
                record[f"{key}/{name}.weight"]
                if f"{key}/{name}.weight" in record
                else record[f"{key}.{name}.weight"]
            )
            assert_close(
                golden,
                fused.state[f"{name.replace('.', '_')}.weight"],
                wanted,
                case["tolerance"],
                dtype,
                f"{key} {name}",
            )
