"""The recorded numbers of tests/golden (or of ``--golden DIR``): network, losses, labels and schedule."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dbnet_asf.binarization import db, db_log
from dbnet_asf.checkpoint import from_official
from dbnet_asf.config import DBConfig, LabelConfig, TrainConfig
from dbnet_asf.losses import DBLoss
from dbnet_asf.model.asf import AdaptiveScaleFusion
from dbnet_asf.model.dbnet import DBOutput
from dbnet_asf.schedule import learning_rate, polynomial_lr
from dbnet_asf.targets import Targets, make_targets
from fusion_core.checkpoint import load_strict
from fusion_core.testing import array
from fusion_core.testing.detfill import parameter

both_dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
PARTS = ("bce_loss", "thresh_loss", "l1_loss", "main_loss", "nge_l1_loss", "coverage", "excede", "dice_loss")


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def tensor(x, dtype):
    return torch.from_numpy(np.array(x)).to(dtype)


@both_dtypes
def test_db_function(golden, dtype):
    settings = golden.settings["db_function"]
    record, tag, shape = golden.load(settings["file"]), golden.settings["tag"], settings["shape"]
    x = tensor(sigmoid(array(f"{tag}.db.x", shape)), dtype).requires_grad_()
    y = tensor(sigmoid(array(f"{tag}.db.y", shape, 0.5)), dtype).requires_grad_()
    double = dtype == torch.float64
    for k in settings["k"]:
        b = db(x, y, k)
        dx, dy = torch.autograd.grad(b.sum(), (x, y))
        for name, found, scale in (("b", b, 1), ("dx", dx, k), ("dy", dy, k)):
            if double:
                limits = {"rtol": settings["rtol"], "atol": settings["atol"]}
                golden.assert_close(found, record[f"k{k}.{name}"], **limits, what=name)
            else:
                atol = settings["float32_atol"]
                golden.assert_close(found / scale, record[f"k{k}.{name}"] / scale, rtol=0, atol=atol)
        if not double:
            continue
        truth = record[f"k{k}.b"]
        inside = (truth > settings["log_range"]) & (truth < 1 - settings["log_range"])
        assert inside.any()
        for name, value in (("dlpos_dx", -db_log(x, y, k)), ("dlneg_dx", -db_log(y, x, k))):
            (grad,) = torch.autograd.grad(value.sum(), x)
            golden.assert_close(
                grad.numpy()[inside], record[f"k{k}.{name}"][inside], rtol=settings["log_rtol"], atol=0
            )
            step = k * (x - y).detach()
            closed = k * torch.sigmoid(step) if name == "dlneg_dx" else -k * torch.sigmoid(-step)
            golden.assert_close(grad, closed, rtol=1e-9, atol=1e-12)


def loss_case(golden, name, dtype):
    settings = golden.settings["losses"]
    case, tag, shape = settings["cases"][name], golden.settings["tag"], settings["shape"]
    flat = (shape[0], *shape[2:])
    p = tensor(sigmoid(array(f"{tag}.loss.p", shape)), dtype).requires_grad_()
    t = tensor(sigmoid(array(f"{tag}.loss.t", shape, 0.5)), dtype).requires_grad_()
    maps = {
        "gt": array(f"{tag}.loss.gt", shape)[:, 0] > 1.0,
        "mask": array(f"{tag}.loss.mask", flat) > -1.3,
        "thresh_map": 0.3 + 0.4 * sigmoid(array(f"{tag}.loss.tm", flat)),
        "thresh_mask": array(f"{tag}.loss.tk", flat) > 0.3,
    }
    maps |= {key: np.full_like(maps[key], value) for key, value in case.get("constant", {}).items()}
    made = {key: torch.from_numpy(value) for key, value in maps.items()}
    made["thresh_map"] = made["thresh_map"].to(dtype)
    options = case.get("options", {})
    words = {"bce_scale": "alpha", "l1_scale": "beta"}
    loss = DBLoss(**{words[key]: value for key, value in options.items()}, loss=case["loss"])
    return loss, DBOutput.from_maps(p, t, settings["k"]), Targets(**made), p, t


@both_dtypes
def test_losses(golden, dtype):
    settings = golden.settings["losses"]
    record = golden.load("losses.npz")
    for name in settings["cases"]:
        loss, output, targets, p, t = loss_case(golden, name, dtype)
        total, parts = loss(output, targets)
        dp, dt = torch.autograd.grad(total, (p, t), allow_unused=True)
        double = dtype == torch.float64
        rtol = settings["rtol"] if double else settings["float32_rtol"]
        golden.assert_close(total, record[f"{name}.loss"], rtol=rtol, atol=1e-12, what=name)
        known = {key for key in PARTS if f"{name}.{key}" in record}
        assert known == set(parts), name
        for key in known:
            what = f"{name}.{key}"
            golden.assert_close(parts[key], np.squeeze(record[what]), rtol=rtol, atol=1e-9, what=what)
        for key, grad in (("dp", dp), ("dt", dt)):
            wanted = record[f"{name}.{key}"]
            grad = torch.zeros(wanted.shape) if grad is None else grad
            atol = (settings["grad_rtol"] if double else 1e-5) * np.abs(wanted).max()
            golden.assert_close(grad, wanted, rtol=0, atol=atol, what=f"{name}.{key}")


def differing(found, wanted):
    return int((np.asarray(found) != np.asarray(wanted)).sum())


def test_labels(golden):
    settings = golden.settings["labels"]
    layouts, record = golden.load(f"{settings['file']}.json"), golden.load(f"{settings['file']}.npz")
    words = ("min_text_size", "shrink_ratio", "thresh_min", "thresh_max")
    config = LabelConfig(**{word: settings[word] for word in words})
    for name, case in layouts.items():
        size = (case["height"], case["width"])
        arguments = (case["polygons"], case["ignore"], size)
        made = make_targets(*arguments, config, training=case["training"])
        for key in ("gt", "mask", "thresh_mask"):
            wanted = record[f"{name}.{key}"].reshape(size).astype(bool)
            found = getattr(made, key).numpy()
            allowed = settings["pixel_fraction"] * max(int(wanted.sum()), 1)
            assert differing(found, wanted) <= allowed, (name, key)
        wanted = record[f"{name}.thresh_map"].reshape(size)
        off = int((np.abs(made.thresh_map.numpy() - wanted) > settings["atol"]).sum())
        assert off <= differing(made.thresh_mask.numpy(), record[f"{name}.thresh_mask"].reshape(size)), name
        assert list(made.ignore) == [bool(flag) for flag in record[f"{name}.ignore"]], name
        if name in settings["exact_distance"]:
            exact = make_targets(*arguments, config.replace(distance="exact"), training=case["training"])
            assert np.abs(exact.thresh_map.numpy() - wanted).max() < settings["exact_atol"], name


@both_dtypes
def test_asf(golden, dtype, official_name):
    settings = golden.settings["asf"]
    record, tag = golden.load(settings["file"]), golden.settings["tag"]
    levels = [tensor(array(f"{tag}.asf.p{i}", settings["level_shape"]), dtype) for i in (5, 4, 3, 2)]
    for kind in settings["types"]:
        module = AdaptiveScaleFusion(settings["in_channels"], kind).to(dtype).eval()
        prefix = "decoder.concat_attention."
        state = {
            key: tensor(parameter(official_name(f"neck.asf.{key}").removeprefix(prefix), value.shape), dtype)
            for key, value in module.state_dict().items()
        }
        load_strict(module, state)
        with torch.no_grad():
            out, attention = module(levels)
        limit = settings["atol"] if dtype == torch.float64 else settings["float32_atol"]
        for key, found in (("out", out), ("attention", attention)):
            golden.assert_close(found, record[f"{kind}.{key}"], rtol=0, atol=limit, what=f"{kind}.{key}")


def check_array(golden, record, key, found, settings, double):
    limit = settings["thresh_binary_atol"] if key.endswith("thresh_binary") else settings["slice_atol"]
    limit = limit if double else settings["float32_atol"]
    found = found.detach().double().numpy()
    assert list(found.shape) == list(record[f"{key}.shape"]), key
    height, width = found.shape[-2:]
    cut = found if found.size < 2500 else found[0:1, :4, :: max(1, height // 16), :: max(1, width // 16)]
    golden.assert_close(cut, record[f"{key}.slice"], rtol=0, atol=limit, what=key)
    if not double:
        return
    flat = found.ravel()
    stats = [
        flat.mean(), flat.std(), flat.min(), flat.max(), np.abs(flat).sum(),
        (flat * np.cos(np.arange(flat.size))).sum(),
    ]  # fmt: skip
    scale = np.array([np.abs(flat).mean()] * 4 + [np.abs(flat).sum()] * 2)
    off = np.abs(np.array(stats) - record[f"{key}.stats"]) / scale
    bound = settings["stats_rtol"] if not key.endswith("thresh_binary") else 1e-7
    assert off.max() < bound, (key, off)


@pytest.mark.slow
@both_dtypes
@pytest.mark.filterwarnings("ignore::fusion_core.errors.FusionWarning")
def test_models(golden, dtype, official_state):
    settings, tag = golden.settings["models"], golden.settings["tag"]
    for name, case in settings["cases"].items():
        record = golden.load(f"{name}.npz")
        words = ("backbone", "dcn", "dcn_offset", "attention", "inner", "serial", "k")
        config = DBConfig(**{word: case[word] for word in words})
        rule = case["dcn_offset"] if case["dcn_offset"] == "strided" else None  # else found by itself
        net = from_official(official_state(config, "model.module."), k=case["k"], dcn_offset=rule)
        for word in words:
            assert getattr(net.config, word) == case[word], word
        net = net.to(dtype).eval()
        x = tensor(array(f"{tag}.model.x", case["input_shape"]), dtype)
        double = dtype == torch.float64
        with torch.no_grad():
            features = net.backbone(x)
            fused, _ = net.neck(features)
            out = net(x)
            arrays = {f"eval.c{i}": feature for i, feature in zip((2, 3, 4, 5), features, strict=True)}
            arrays |= {"eval.fuse": fused, "eval.logit": out.prob_logit, "eval.binary": out.prob}
            for key, found in arrays.items():
                check_array(golden, record, key, found, settings, double)
            if double:
                trained = net.train()(x)
                for key in ("binary", "thresh", "thresh_binary"):
                    found = {
                        "binary": trained.prob,
                        "thresh": trained.thresh,
                        "thresh_binary": trained.binary,
                    }
                    check_array(golden, record, f"train.{key}", found[key], settings, double)


def test_schedule(golden):
    settings = golden.settings["schedule"]
    for case in golden.load(settings["file"]):
        options = {"lr": case["lr"], "epochs": case["epochs"], "power": case["factor"]}
        found = [polynomial_lr(epoch, **options) for epoch in case["epoch"]]
        golden.assert_close(found, case["value"], rtol=0, atol=settings["atol"])
        config = TrainConfig(lr=case["lr"], epochs=case["epochs"], power=case["factor"])
        steps = [(3 * epoch + 1, 3 * (case["epochs"] + 1), 3) for epoch in case["epoch"]]
        found = [learning_rate(config, *arguments) for arguments in steps]
        golden.assert_close(found, case["value"], rtol=0, atol=settings["atol"])
