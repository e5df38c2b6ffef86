"""The recorded numbers of tests/golden (or of ``--golden DIR``), every case, in float64 and float32."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from adaea import DI, SI, TI, AdaEA, Momentum, Nesterov, Variance, agm_weights, loss_matrix
from adaea.draws import Recorded
from adaea.drf import disparity_filter, disparity_map, filter_bound
from fusion_core.testing import array, fill_state_dict

DTYPES = [torch.float64, torch.float32]
both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float64", "float32"])
# float32 runs were recorded to agree far better; these are the limits that the records ask for
LOOSE = {"weights": 1e-5, "losses": 1e-4, "map0": 1e-4, "iterates": 1e-6, "adv": 1e-6, "default": 1e-4}
KINDS = {
    "agm", "drf", "attack", "permutation", "batch_dependence", "all_filtered", "filter_bounds", "weights_of",
    "scores", "png_rounding",
}  # fmt: skip


class Cnn(nn.Module):
    def __init__(self, channels, classes, width):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.fc = nn.Linear(2 * width, classes)

    def forward(self, x):
        x = F.avg_pool2d(F.gelu(self.bn1(self.conv1(x))), 2)
        return 8.0 * self.fc(F.gelu(self.conv2(x)).mean((2, 3)))


class Res(nn.Module):
    def __init__(self, channels, classes, width):
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 5, stride=2, padding=2)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.fc = nn.Linear(width, classes)

    def forward(self, x):
        h = torch.tanh(self.stem(x))
        h = h + self.conv2(torch.tanh(self.conv1(h)))
        return 8.0 * self.fc(torch.tanh(F.avg_pool2d(h, 2)).mean((2, 3)))


class Block(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.ln1, self.ln2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = self.qkv(self.ln1(x)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-2, -1) / math.sqrt(d // self.heads)).softmax(-1)
        x = x + self.proj((weights @ v).transpose(1, 2).reshape(b, t, d))
        return x + self.fc2(F.gelu(self.fc1(self.ln2(x))))


class Vit(nn.Module):
    def __init__(self, channels, classes, size, patch, dim, heads, depth):
        super().__init__()
        self.patch = nn.Conv2d(channels, dim, patch, stride=patch)
        self.cls = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos = nn.Parameter(torch.zeros(1, (size // patch) ** 2 + 1, dim))
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm, self.fc = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, x):
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), tokens], 1) + self.pos
        for block in self.blocks:
            x = block(x)
        return 8.0 * self.fc(self.norm(x)[:, 0])


def build(settings, case, dtype):
    made = nn.ModuleDict()
    for name in case["surrogates"]:
        spec = dict(settings["surrogates"][name])
        family = spec.pop("family")
        if family == "vit":
            spec["size"] = case["size"]
        kinds = {"cnn": Cnn, "res": Res, "vit": Vit}
        made[name] = kinds[family](case["channels"], case["classes"], **spec)
    made.double()
    fill_state_dict(made)
    return made.to(dtype).eval()


def of_kind(kind):
    """Run a test for every entry of ``cases.json`` of that kind."""

    def mark(function):
        function.kind = kind
        return function

    return mark


def load_settings(path):
    return json.loads((Path(path) / "cases.json").read_text(encoding="utf-8"))


def pytest_generate_tests(metafunc):
    if "case" not in metafunc.fixturenames:
        return
    named = metafunc.config.getoption("--golden")
    own = Path(__file__).parent / "golden"
    folder = Path(metafunc.config.invocation_params.dir, named) if named else own
    kind = metafunc.function.kind
    cases = [case for case in load_settings(folder)["cases"] if case["kind"] == kind]
    metafunc.parametrize("case", cases, ids=[case["name"] for case in cases])


def limits(golden, case, dtype):
    table = LOOSE if dtype == torch.float32 else golden.settings["tolerances"] | case.get("tolerances", {})
    return lambda key: {"rtol": 0.0, "atol": table.get(key, table["default"])}


def inputs(case, data, dtype):
    shape = (case["batch"], case["channels"], case["size"], case["size"])
    x = 1 / (1 + np.exp(-array(f"{case['tag']}/x", shape)))
    noise = array(f"{case['tag']}/noise", shape)
    labels = data["y"] if "y" in data else case["y"]
    return torch.from_numpy(x).to(dtype), torch.from_numpy(noise).to(dtype), torch.as_tensor(labels)


def make_attack(case, **changes):
    s = case["settings"]
    mu = s.get("mu", 0.0)
    kinds = {"plain": [], "momentum": [Momentum(mu)], "nesterov": [Nesterov(mu)]}
    update = kinds[s.get("update", "plain")]
    if s.get("vmi_neighbours", 0):
        update = [*update, Variance(s["vmi_neighbours"])]
    transforms = []
    if s.get("di_probability", 0):
        transforms.append(DI(0.9, s["di_probability"]))
    if s.get("ti"):
        transforms.append(TI(**s["ti"]))
    if s.get("si_scales", 1) > 1:
        transforms.append(SI(s["si_scales"]))
    options = {
        "eps": s["eps"],
        "alpha": s["alpha"],
        "steps": s["steps"],
        "beta": s["beta"],
        "eta": s["eta"],
        "final_step": s.get("final_step"),
        "agm": s.get("agm", "exact"),
        "agm_every": s.get("agm_every", 1),
        "ratio": s.get("ratio", "given"),
        "drf": s.get("drf", "symmetric"),
        "fusion": s.get("fusion", "logits"),
        "norm": s.get("norm", "linf"),
        "targeted": s.get("targeted", False),
        "noise": s.get("start_noise", 0.001),
        "update": update,
        "transforms": transforms,
    }
    return AdaEA(**options | changes)


def recorded(case, data, noise):
    neighbours = None
    if count := case["settings"].get("vmi_neighbours", 0):
        shape = (case["settings"]["steps"], count, *noise.shape)
        neighbours = torch.from_numpy(array(f"{case['tag']}/vnoise", shape, case["neighbour_scale"]))
    resizes = data["draws"].tolist() if data.get("draws", np.zeros(0)).size else None
    return Recorded(torch.Generator().manual_seed(0), noise=noise, resizes=resizes, neighbours=neighbours)


def run(golden, case, data, dtype, surrogates=None, rows=None, **changes):
    """Adversarial images, trace and the records of all steps."""
    x, noise, y = inputs(case, data, dtype)
    if rows is not None:
        x, noise, y = x[rows], noise[rows], y[rows]
    steps = []
    models = build(golden.settings, case, dtype) if surrogates is None else surrogates
    attack = make_attack(case, surrogates=models, **changes)
    adv, trace = attack(x, y, trace=True, draws=recorded(case, data, noise), on_step=steps.append)
    return adv, trace, steps


def test_every_case_is_known(golden):
    assert {case["kind"] for case in golden.settings["cases"]} <= KINDS
    assert golden.settings["schema"] == 1
    here = {case["file"] for case in golden.settings["cases"]}
    assert set(golden.cases()) <= here


@both_dtypes
@of_kind("agm")
def test_agm(golden, case, dtype):
    data, close = golden.load(case["file"]), limits(golden, case, dtype)
    count, batch, classes = case["shape"]
    z = array(f"{case['tag']}/logits", (count, count, batch, classes), case["logits_scale"])
    get = lambda key: data[f"{case['tag']}/{key}"]
    losses = loss_matrix(torch.from_numpy(z).to(dtype), torch.from_numpy(get("y")))
    golden.assert_close(losses, get("losses"), **close("losses"))
    found = {
        "weights": agm_weights(losses.mean(-1), case["beta"]),
        "weights_per_sample": agm_weights(losses, case["beta"]),
        "weights_targeted": agm_weights(losses.mean(-1), case["beta"], targeted=True),
        "weights_received": agm_weights(losses.mean(-1), case["beta"], ratio="received"),
    }
    for key, weights in found.items():
        golden.assert_close(weights, get(key), what=key, **close("weights"))


@both_dtypes
@of_kind("drf")
def test_drf(golden, case, dtype):
    data, close = golden.load(case["file"]), limits(golden, case, dtype)
    tag = case["tag"]
    g = np.stack([array(f"{tag}/g{k}", case["shape"], 10.0**-k) for k in range(case["count"])])
    for k, axis, index in case["zeroed"]:
        np.moveaxis(g[k], axis, 0)[index] = 0.0
    g = torch.from_numpy(g).to(dtype)
    golden.assert_close(disparity_map(g, "official"), data[f"{tag}/map_official"], **close("map_official"))
    for form, key in (("official", "map_official64"), ("symmetric", "map_symmetric")):
        golden.assert_close(disparity_map(g, form), data[f"{tag}/{key}"], what=key, **close("map"))
        for eta in case["thresholds"]:
            keep = disparity_filter(g, eta, form)
            golden.assert_close(keep, data[f"{tag}/keep_{form}_{eta}"], what=f"{form} {eta}")


@both_dtypes
@of_kind("attack")
def test_attack(golden, case, dtype):
    data, close = golden.load(case["file"]), limits(golden, case, dtype)
    adv, trace, steps = run(golden, case, data, dtype)
    weights = trace.weights.unsqueeze(-1) if data["weights"].ndim > trace.weights.ndim else trace.weights
    golden.assert_close(weights, data["weights"], what="weights", **close("weights"))
    found = {"map0": steps[0].score, "iterates": torch.stack([record.images for record in steps])}
    if "grads0" in data and data["grads0"].size:  # recorded for the mean over the batch
        found["grads0"] = steps[0].gradients / case["batch"]
    found |= {"fused_grad0": steps[0].fused, "losses": trace.losses}
    for key, value in found.items():
        if key in data and data[key].size:
            golden.assert_close(value, data[key], what=key, **close(key))
    if "keep" in data and data["keep"].size:
        keep = np.unpackbits(data["keep"])[: int(np.prod(data["keep_shape"]))].reshape(data["keep_shape"])
        golden.assert_close(trace.keep, keep.astype(bool), what="keep")
    fraction = trace.keep.double().mean((1, 2, 3, 4))
    golden.assert_close(fraction, data["keep_fraction"], what="keep_fraction", **close("default"))
    if dtype == torch.float64:
        golden.assert_close(adv, data["adv"], what="adv", **close("adv"))
    else:
        near = np.abs(adv.double().numpy() - data["adv"]) <= LOOSE["adv"]
        assert near.mean() >= 0.99


@of_kind("permutation")
def test_permutation(golden, case):
    record, data = golden.load(case["file"])[case["key"]], golden.load(case["labels"])
    models = build(golden.settings, case, torch.float64)
    names = list(models)
    for form in ("official", "symmetric"):
        plain, trace, _ = run(golden, case, data, torch.float64, models, drf=form)
        for order, expected in record["orders"].items():
            moved = {names[k]: models[names[k]] for k in json.loads(order)}
            adv, turned, _ = run(golden, case, data, torch.float64, moved, drf=form)
            share = ((adv - plain).abs() > 1e-9).double().mean().item()
            assert share == pytest.approx(expected if form == "official" else 0.0, abs=1e-12)
            if form == "symmetric":
                golden.assert_close(turned.weights, trace.weights[:, json.loads(order)], rtol=0, atol=1e-10)


@of_kind("batch_dependence")
def test_batch_dependence(golden, case):
    record, data = golden.load(case["file"])[case["key"]], golden.load(case["labels"])
    weigh = lambda rows, agm: run(golden, case, data, torch.float64, rows=rows, agm=agm)[1].weights[0]
    close = limits(golden, case, torch.float64)("weights")
    golden.assert_close(weigh(None, "exact"), record["both_images"], **close)
    together = weigh(None, "per_sample")
    for image, key in enumerate(("image0_alone", "image1_alone")):
        golden.assert_close(weigh([image], "exact"), record[key], **close)
        golden.assert_close(together[:, image], record[key], **close)


@of_kind("all_filtered")
@pytest.mark.parametrize("form", ["official", "symmetric"])
def test_all_filtered_momentum(golden, case, form):
    golden.load(case["file"])[case["key"]]
    level = lambda x: x.mean((1, 2, 3)) - 0.5
    pair = {
        "up": lambda x: torch.stack([level(x), -level(x)], 1),
        "down": lambda x: torch.stack([-level(x), level(x)], 1),
    }
    adv, trace, steps = run(golden, case, {}, torch.float64, pair, drf=form)
    x, noise, _ = inputs(case, {}, torch.float64)
    eps = case["settings"]["eps"]
    assert not trace.keep.any()
    assert trace.still.all()
    assert (trace.state.momentum == 0).all()
    golden.assert_close(
        steps[0].score, torch.full_like(steps[0].score, -1.0 if form == "symmetric" else -0.5)
    )
    golden.assert_close(adv, (x + (0.001 * noise).clamp(-eps, eps)).clamp(0, 1), rtol=0, atol=1e-12)


@of_kind("filter_bounds")
def test_filter_bounds(golden, case):
    record = golden.load(case["file"])[case["key"]]
    for form in ("symmetric", "official"):
        for count, bound in record[form].items():
            assert filter_bound(int(count), form) == pytest.approx(bound, abs=1e-15)


@of_kind("png_rounding")
def test_png_rounding(golden, case):
    quantize = pytest.importorskip("adaea.quantize")
    record = golden.load(case["file"])[case["key"]]
    x, adv = (torch.tensor(record[key], dtype=torch.float64).view(1, 1, 1, -1) for key in ("x", "adv"))
    rounded, outside = quantize.to_uint8(adv, x, float(Fraction(record["eps"])))
    assert rounded.flatten().tolist() == record["expected_uint8"]
    assert outside == 0


@both_dtypes
@of_kind("weights_of")
def test_weights_of(golden, case, dtype):
    record = golden.load(case["file"])[case["key"]]
    losses = torch.tensor(record["loss_matrix"], dtype=dtype)
    weights = agm_weights(losses, record.get("beta", case["beta"]))
    golden.assert_close(weights, record["expected_weights"], rtol=0, atol=1e-10)
