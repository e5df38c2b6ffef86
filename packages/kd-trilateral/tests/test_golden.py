"""The recorded numbers of tests/golden (or of ``--golden DIR``), in float64 and looser in float32."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import kd_trilateral as kdt
from fusion_core.testing import array, fill_state_dict, parameter
from kd_trilateral.geometry import Geometry
from kd_trilateral.losses import kd_terms, mix

DTYPES = [torch.float64, torch.float32]
both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["float64", "float32"])


def tensor(name, shape, scale=1.0, dtype=torch.float64):
    return torch.from_numpy(array(name, shape, scale)).to(dtype)


def label_rule(golden, count, classes, *, validation=False):
    rule = golden.settings["labels"]
    shift = rule["validation_shift" if validation else "train_shift"]
    return (torch.arange(count) * rule["multiplier"] + shift) % classes


def tolerance(case, dtype):
    return {"rtol": case["rtol"], "atol": case["atol"]} if dtype == torch.float64 else {}


def filled(module, prefix):
    with torch.no_grad():
        for name, value in module.named_parameters():
            value.copy_(torch.from_numpy(np.asarray(parameter(prefix + name, value.shape))))
    return module


@both_dtypes
@pytest.mark.golden_files("features*.npz")
def test_features(golden, golden_file, dtype):
    data, case, tag = golden.load(golden_file), golden.settings[golden_file], golden.settings["tag"]
    for group in case["groups"]:
        key, classes, batch = group["key"], group["classes"], group["batch"]
        place = f"{tag}.feat.{key}"
        zs = tensor(f"{place}.zs", (batch, classes), case["student_scale"], dtype)
        zt = tensor(f"{place}.zt", (batch, classes), case["teacher_scale"], dtype)
        y = label_rule(golden, batch, classes)
        golden.assert_close(y, data[f"{key}.y"], what="labels")
        s, t, g = zs.softmax(-1), zt.softmax(-1), F.one_hot(y, classes).to(dtype)
        tbar, _ = kdt.class_mean(t, y, classes)
        close = tolerance(case, dtype)
        golden.assert_close(tbar, data[f"{key}.tbar"], dtype, **close, what=f"{key} tbar")
        phi = {}
        for preset in case["presets"]:
            phi[preset] = kdt.features(s, t, g, tbar[y], preset)
            golden.assert_close(phi[preset], data[f"{key}.{preset}"], dtype, **close, what=f"{key} {preset}")
        width = Geometry.named("official").width(classes)
        official = {
            f"fc{i}.{kind}": torch.from_numpy(np.asarray(parameter(f"fc{i}.{kind}", shape)))
            for i, sizes in enumerate([(32, width), (16, 32), (1, 16)], 1)
            for kind, shape in (("weight", sizes), ("bias", sizes[:1]))
        }
        nets = {
            "alpha_official": (kdt.RatioNet.from_official(official), "official"),
            "alpha_net": (filled(kdt.RatioNet(width).double(), f"{place}."), "official"),
            "alpha_net_compact": (filled(kdt.RatioNet(18).double(), f"{place}.c."), "compact"),
        }
        for name, (net, preset) in nets.items():
            golden.assert_close(net.to(dtype)(phi[preset]), data[f"{key}.{name}"], dtype, **close, what=name)


@both_dtypes
@pytest.mark.golden_files("losses*.npz")
def test_losses(golden, golden_file, dtype):
    data, case, tag = golden.load(golden_file), golden.settings[golden_file], golden.settings["tag"]
    batch, classes = case["batch"], case["classes"]
    zs = tensor(f"{tag}.loss.zs", (batch, classes), case["student_scale"], dtype)
    zt = tensor(f"{tag}.loss.zt", (batch, classes), case["teacher_scale"], dtype)
    y = label_rule(golden, batch, classes)
    alpha = tensor(f"{tag}.loss.a", (batch,), dtype=dtype).sigmoid()
    close = tolerance(case, dtype)
    golden.assert_close(y, data["y"])
    golden.assert_close(alpha, data["alpha"], dtype, **close)
    bs = tensor(f"{tag}.loss.bs", (batch,), case["binary_scale"], dtype)
    bt = tensor(f"{tag}.loss.bt", (batch,), case["binary_scale"], dtype)
    by = torch.from_numpy(data["bin.y"])
    for tau in case["temperatures"]:
        at = f"tau{tau:.1f}"
        leaf = zs.clone().requires_grad_()
        kl, ce = kd_terms(leaf, zt, y, tau)
        total = mix(alpha, kl, ce)
        total.mean().backward()
        _, double_softmax = kd_terms(zs, zt, y, tau, ce_on="probs")
        binary_kl, binary_ce = kd_terms(bs, bt, by, tau, task="binary")
        for name, value in {
            f"{at}.kl": kl,
            f"{at}.ce": ce,
            f"{at}.total": total,
            f"{at}.mean": total.mean(),
            f"{at}.grad_logits": leaf.grad,
            f"{at}.ce_double_softmax": double_softmax,
            f"bin.{at}.kl": binary_kl,
            f"bin.{at}.ce": binary_ce,
        }.items():
            golden.assert_close(value, data[name], dtype, **close, what=name)
        loss = kdt.TrilateralKD(classes, temperature=tau, ratio=lambda _: alpha)  # the module says the same
        golden.assert_close(loss(zs, zt, y).loss, data[f"{at}.mean"], dtype, **close, what=f"{at} module")
    golden.assert_close(kdt.ratios.ada(zt.softmax(-1), y), data["ratio.ada"], dtype, **close)
    plain = [F.cross_entropy(z, y, reduction="none") for z in (zs, zt)]
    golden.assert_close(kdt.ratios.wls(*plain), data["ratio.wls"], dtype, **close)


class Case:
    """The linear or MLP student of the hypergradient files, ready for a step."""

    def __init__(self, golden, golden_file, preset, *, kind="hyp", dtype=torch.float64):
        self.case, tag = golden.settings[golden_file], golden.settings["tag"]
        case = self.case
        batch, inputs, classes, held = (case[k] for k in ("batch", "inputs", "classes", "validation_batch"))
        self.x = tensor(f"{tag}.{kind}.x", (batch, inputs), dtype=dtype)
        self.zt = tensor(f"{tag}.{kind}.zt", (batch, classes), case["teacher_scale"], dtype)
        self.xv = tensor(f"{tag}.{kind}.xv", (held, inputs), dtype=dtype)
        self.y = label_rule(golden, batch, classes)
        self.yv = label_rule(golden, held, classes, validation=True)
        if kind == "hyp":
            self.student = nn.Linear(inputs, classes).to(dtype)
            filled(self.student, f"{tag}.hyp.student.")
            place = f"{tag}.hyp.{preset}."
        else:
            hidden = case["hidden"]
            layers = (nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, classes))
            self.student = nn.Sequential(*layers).to(dtype)
            fill_state_dict(self.student)
            place = f"{tag}.mlp."
        self.loss = kdt.TrilateralKD(
            classes, temperature=case["temperature"], geometry=preset, preset="paper"
        ).to(dtype)
        filled(self.loss.network, place)
        self.loss.fit_class_mean(self.zt, self.y)
        self.omega = list(self.loss.network.parameters())
        self.names = [name for name, _ in self.loss.network.named_parameters()]

    def bilevel(self, optimizer, engine, **options):
        return kdt.Bilevel(
            self.student,
            self.loss,
            optimizer,
            [(self.xv, self.yv)],
            **{"hypergradient": engine, "every": 1, "normalize": False, "max_grad_norm": None, **options},
        )

    def sgd(self, **options):
        return torch.optim.SGD(self.student.parameters(), lr=self.case["inner_lr"], **options)

    def step(self, engine, optimizer=None, **options):
        """One whole step; returns the output, c and the hypergradient by name."""
        optimizer = optimizer or self.sgd()
        bilevel = self.bilevel(optimizer, engine, **options)
        out = self.loss(self.student(self.x), self.zt, self.y)
        before = [p.detach().clone() for p in self.omega]
        gradient = {}

        def spy(*_):
            gradient.update(zip(self.names, (p.grad.clone() for p in self.omega), strict=True))

        bilevel.outer.optimizer.register_step_pre_hook(spy)
        optimizer.zero_grad()
        out.loss.backward()
        bilevel.step(self.x, out)
        assert any(not torch.equal(a, b) for a, b in zip(before, self.omega, strict=True))
        return out, bilevel.last_c, gradient

    def val_loss(self):
        return F.cross_entropy(self.student(self.xv), self.yv)


def assert_close_to_largest(actual, expected, rtol, what):
    error = np.abs(actual.detach().double().numpy() - expected).max() / np.abs(expected).max()
    assert error <= rtol, f"{what}: largest error over largest entry is {error:.2e}, wanted <= {rtol}"


@pytest.mark.golden_files("hypergradient.npz")
def test_linear_hypergradient_step_by_step(golden, golden_file):
    data, case = golden.load(golden_file), golden.settings[golden_file]
    eta, close = case["inner_lr"], tolerance(case, torch.float64)
    for preset in case["presets"]:
        c = Case(golden, golden_file, preset)
        golden.assert_close(c.y, data["y"])
        golden.assert_close(c.yv, data["yv"])
        theta = {n: p.detach().clone() for n, p in c.student.named_parameters()}
        out = c.loss(c.student(c.x), c.zt, c.y)
        out.loss.backward()
        optimizer = c.sgd()
        golden.assert_close(out.alpha, data[f"{preset}.alpha"], **close)
        golden.assert_close(out.loss, data[f"{preset}.inner_loss"], **close)
        for name, p in c.student.named_parameters():
            golden.assert_close(p.grad, data[f"{preset}.inner_grad.{name}"], **close, what=name)
        optimizer.step()
        val_loss = c.val_loss()
        v = dict(zip(theta, torch.autograd.grad(val_loss, c.student.parameters()), strict=True))
        golden.assert_close(val_loss, data[f"{preset}.val_loss"], **close)
        for name, p in c.student.named_parameters():
            golden.assert_close(p, data[f"{preset}.theta1.{name}"], **close, what=name)
            golden.assert_close(v[name], data[f"{preset}.val_grad.{name}"], **close, what=name)
        batch = (c.x, c.zt, c.y)
        for engine in ("jvp", "head", "fd", "fd1"):  # the student IS its last Linear layer: head is exact
            found = kdt.per_sample_directional(
                c.student, theta, v, batch, engine, temperature=case["temperature"]
            )
            if engine in ("jvp", "head"):
                golden.assert_close(found, data[f"{preset}.c"], **close, what=engine)
                slope = -eta / len(c.y) * found
                golden.assert_close(slope, data[f"{preset}.dval_dalpha"], **close, what=engine)
                for name, g in zip(
                    c.names, kdt.hypergradient(out.alpha, found, c.omega, eta=eta), strict=True
                ):
                    golden.assert_close(g, data[f"{preset}.hypergrad.{name}"], **close, what=name)
            else:
                assert_close_to_largest(found, data[f"{preset}.c"], case[f"{engine}_rtol"], engine)


@pytest.mark.parametrize("engine", ["jvp", "head", "unrolled", "fd", "fd1"])
@pytest.mark.golden_files("hypergradient.npz")
def test_linear_engines(golden, golden_file, engine):
    data, case = golden.load(golden_file), golden.settings[golden_file]
    close = tolerance(case, torch.float64)
    for preset in case["presets"]:
        _, c, gradient = Case(golden, golden_file, preset).step(engine, outer_loss="ce", epsilon=1e-4)
        expected_c = case["inner_lr"] * data[f"{preset}.c"]
        for name, g in {"c": c, **gradient}.items():
            expected = expected_c if name == "c" else data[f"{preset}.hypergrad.{name}"]
            if engine.startswith("fd"):
                assert_close_to_largest(g, expected, case[f"{engine}_rtol"], f"{preset} {name}")
            else:
                golden.assert_close(g, expected, **close, what=f"{preset} {name}")


@pytest.mark.golden_files("hypergradient.npz")
def test_neumann_and_implicit(golden, golden_file):
    data, case = golden.load(golden_file), golden.settings[golden_file]
    close = tolerance(case, torch.float64)
    for preset in case["presets"]:
        runs = [(f"neumann{j}", {"neumann_terms": j}) for j in case["neumann_terms"]]
        runs.append(("implicit", {"damping": case["damping"], "implicit_steps": 200}))
        for key, options in runs:
            engine = key.rstrip("0123456789")
            _, _, gradient = Case(golden, golden_file, preset).step(engine, outer_loss="ce", **options)
            for name, g in gradient.items():
                golden.assert_close(g, data[f"{preset}.{key}.{name}"], **close, what=f"{preset} {key} {name}")


@pytest.mark.parametrize("order", ["inner_first", "outer_first"])
@pytest.mark.parametrize("retain", [True, False])
@pytest.mark.golden_files("hypergradient.npz")
def test_three_whole_steps(golden, golden_file, order, retain):
    data, case = golden.load(golden_file), golden.settings[golden_file]
    close = tolerance(case, torch.float64)
    for preset in case["presets"]:
        c = Case(golden, golden_file, preset)
        optimizer = c.sgd()
        outer = torch.optim.Adam(
            c.omega, lr=case["outer_lr"], betas=tuple(case["outer_betas"]), eps=case["outer_eps"]
        )
        bilevel = c.bilevel(optimizer, "jvp", outer_loss="ce", outer_optimizer=outer, order=order)
        for _ in range(case["steps"]):
            out = c.loss(c.student(c.x), c.zt, c.y)
            optimizer.zero_grad()
            bilevel.backward(out) if retain else out.loss.backward()
            bilevel.step(c.x, out)
        for name, p in c.student.named_parameters():
            golden.assert_close(p, data[f"{preset}.{order}.student.{name}"], **close, what=name)
        for name, p in c.loss.network.named_parameters():
            golden.assert_close(p, data[f"{preset}.{order}.{name}"], **close, what=name)
        golden.assert_close(c.val_loss(), data[f"{preset}.{order}.val_loss"], **close)


def inner_optimizer(case: Case, mode: str, tag: str):
    settings, student = case.case, case.student
    buffer = lambda name, p: tensor(f"{tag}.mlp.buf.{name}", p.shape, settings["buffer_scale"], p.dtype)
    if mode == "sgd":
        return case.sgd()
    if mode == "momentum":
        optimizer = case.sgd(momentum=settings["momentum"])
        for name, p in student.named_parameters():
            optimizer.state[p]["momentum_buffer"] = buffer(name, p)
        return optimizer
    adam = settings["adam"]
    optimizer = torch.optim.Adam(
        student.parameters(), lr=settings["inner_lr"], betas=tuple(adam["betas"]), eps=adam["eps"]
    )
    for name, p in student.named_parameters():
        square = tensor(f"{tag}.mlp.sq.{name}", p.shape, adam["square_scale"], p.dtype) ** 2
        step = torch.tensor(float(adam["step"] - 1))
        optimizer.state[p].update(step=step, exp_avg=buffer(name, p), exp_avg_sq=square)
    return optimizer


@pytest.mark.parametrize("mode", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("engine", ["jvp", "unrolled", "fd", "fd1"])
@pytest.mark.golden_files("hypergradient_mlp.npz")
def test_mlp_through_optimizers(golden, golden_file, engine, mode):
    data, case = golden.load(golden_file), golden.settings[golden_file]
    close = tolerance(case, torch.float64)
    if engine == "jvp":
        close = {"rtol": case["exact_rtol"], "atol": case["atol"]}
    c = Case(golden, golden_file, case["preset"], kind="mlp")
    golden.assert_close(c.y, data["y"])
    golden.assert_close(c.yv, data["yv"])
    out, _, gradient = c.step(
        engine, inner_optimizer(c, mode, golden.settings["tag"]), outer_loss="ce", epsilon=1e-4
    )
    exact = tolerance(case, torch.float64)
    golden.assert_close(out.alpha, data["alpha"], **exact)
    golden.assert_close(out.loss, data["inner_loss"], **exact)
    golden.assert_close(c.val_loss(), data[f"{mode}.val_loss"], **exact)
    for name, g in gradient.items():
        expected = data[f"{mode}.hypergrad.{name}"]
        if engine.startswith("fd"):
            assert_close_to_largest(g, expected, case[f"{engine}_rtol"], f"{mode} {name}")
        else:
            golden.assert_close(g, expected, **close, what=f"{mode} {name}")


@pytest.mark.parametrize("engine", ["jvp", "head", "unrolled", "fd", "fd1"])
@pytest.mark.golden_files("hypergradient.npz")
def test_engines_in_float32(golden, golden_file, engine):
    data, case = golden.load(golden_file), golden.settings[golden_file]
    for preset in case["presets"]:
        c = Case(golden, golden_file, preset, dtype=torch.float32)
        _, found, gradient = c.step(engine, outer_loss="ce")
        rtol = 2e-2 if engine.startswith("fd") else 1e-3
        assert_close_to_largest(found, case["inner_lr"] * data[f"{preset}.c"], rtol, f"{preset} c")
        for name, g in gradient.items():
            assert_close_to_largest(g, data[f"{preset}.hypergrad.{name}"], rtol, f"{preset} {name}")


class Stack(nn.Module):
    """The authors' student, teacher and controller: Linear layers fc1.. with LeakyReLU between."""

    def __init__(self, sizes):
        super().__init__()
        self.depth = len(sizes) - 1
        for i in range(self.depth):
            setattr(self, f"fc{i + 1}", nn.Linear(sizes[i], sizes[i + 1]))

    def forward(self, x):
        for i in range(1, self.depth):
            x = F.leaky_relu(getattr(self, f"fc{i}")(x))
        return getattr(self, f"fc{self.depth}")(x)


@pytest.mark.golden_files("official_loop*.npz")
def test_official_loop(golden, golden_file):
    data, case, tag = golden.load(golden_file), golden.settings[golden_file], golden.settings["tag"]
    dtype = getattr(torch, case["dtype"])
    rows, inputs, classes = case["batch"], case["inputs"], case["classes"]
    x = tensor(f"{tag}.loop.x", (rows, inputs), dtype=dtype)
    y = torch.arange(rows) % classes
    golden.assert_close(y, data["y"])
    student = Stack([inputs, *case["student_hidden"], classes]).to(dtype)
    teacher = Stack([inputs, *case["teacher_hidden"], classes]).to(dtype)
    controller = Stack([9 * classes, 32, 16, 1]).to(dtype)
    for module in (student, teacher, controller):
        fill_state_dict(module)
    loss = kdt.TrilateralKD(
        classes, temperature=case["temperature"], geometry="official", ce_on="probs", tbar="batch"
    )
    loss.network = kdt.RatioNet.from_official(controller.state_dict())
    start = [p.detach().clone() for p in loss.network.parameters()]
    optimizer = torch.optim.Adam(student.parameters(), lr=case["learning_rate"])
    bilevel = kdt.Bilevel(student, loss, optimizer, hypergradient="frozen")
    with torch.no_grad():
        zt = teacher(x)
    alphas, phi = [], []
    for _ in range(case["epochs"]):
        out = loss(student(x), zt, y)
        alphas.append(out.alpha.detach())
        phi.append(out.context.phi)
        optimizer.zero_grad()
        out.loss.backward()
        bilevel.step(x, out)
    first = {"rtol": case["first_epoch_rtol"], "atol": 1e-7}
    golden.assert_close(alphas[0], data["alphas"][0], **first)
    golden.assert_close(phi[0], data["features_first"], **first)
    close = {"rtol": case["rtol"], "atol": case["atol"]}
    golden.assert_close(torch.stack(alphas), data["alphas"], **close)
    golden.assert_close(phi[-1], data["features_last"], **close)
    for name, p in student.named_parameters():
        golden.assert_close(p, data[f"student_after.{name}"], **close, what=name)
    change = max(
        float((a - b).detach().abs().max()) for a, b in zip(start, loss.network.parameters(), strict=True)
    )
    assert change == float(data["controller_max_change"])


@both_dtypes
@pytest.mark.golden_files("edges*.npz")
def test_edges(golden, golden_file, dtype):
    data, case = golden.load(golden_file), golden.settings[golden_file]
    zs, zt, tbar = (torch.from_numpy(data[k]).to(dtype) for k in ("zs", "zt", "tbar"))
    y, classes = torch.from_numpy(data["y"]), case["classes"]
    g = F.one_hot(y, classes).to(dtype)
    close = tolerance(case, dtype)
    for preset in case["presets"]:
        phi = kdt.features(zs.softmax(-1), zt.softmax(-1), g, tbar[y], preset)
        assert torch.isfinite(phi).all()
        golden.assert_close(phi, data[f"feat.{preset}"], dtype, **close, what=preset)
    for tau in case["temperatures"]:
        kl, ce = kd_terms(zs, zt, y, tau)
        assert torch.isfinite(kl).all()
        rtol = case["rtol_by_temperature"].get(str(tau), case["rtol"])
        if dtype == torch.float32:
            rtol = 1e-4
        golden.assert_close(kl, data[f"kl.tau{tau:.1f}"], dtype, rtol=rtol, what=f"tau {tau}")
    golden.assert_close(ce, data["ce"], dtype, **close)
