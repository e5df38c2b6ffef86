"""What cannot be used is refused with a sentence; what is rare but sound works."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import kd_trilateral as kdt
from fusion_core.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    FusionError,
    InputError,
    ShapeError,
)
from kd_trilateral.geometry import Geometry
from kd_trilateral.losses import as_pair, generalized_ce, kd_terms, mix

Z = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
T = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 1, 2, 1])


def kd(classes=3, **options):
    return kdt.TrilateralKD(classes, **{"tbar": "none", **options})


def bilevel(loss=None, student=None, **options):
    student = student or nn.Linear(5, 3)
    options = {"val_batches": [(torch.randn(4, 5), Y)], "every": 1, **options}
    return kdt.Bilevel(student, loss or kd(), torch.optim.SGD(student.parameters(), lr=0.1), **options)


def step(engine, x=None, y=Y, zt=T):
    x = torch.randn(len(y), 5) if x is None else x
    out = engine.loss(engine.student(x), zt, y)
    out.loss.backward()
    engine.step(x, out)
    return out


def bad_teacher():
    zt = T.clone()
    zt[1, 0], zt[3, 2] = float("nan"), float("inf")
    return zt


def labels(*values):
    return torch.tensor(values)


SHAPES = {
    "logits differ": (lambda: kd()(Z, T[:, :2], Y), "teacher_logits have shape (4, 2), wanted (4, 3) like"),
    "terms differ": (lambda: kd_terms(Z, T[:2], Y, 2.0), "student_logits (4, 3) and teacher_logits (2, 3)"),
    "other classes": (lambda: kd(5)(Z, T, Y), "student_logits has shape (4, 3)", "classes=5"),
    "one dimension": (lambda: kd()(Z[:, 0], T[:, 0], Y), "student_logits has shape (4,)", "batch classes"),
    "labels short": (lambda: kd()(Z, T, Y[:3]), "labels has shape (3,)", "batch=4"),
    "labels column": (lambda: kd()(Z, T, Y[:, None]), "labels has shape (4, 1)", "wanted (batch)"),
    "alpha column": (
        lambda: mix(Z[:, :1], Z[:, 0], Z[:, 0]),
        "alpha has shape (4, 1)",
        "wanted all (batch,)",
    ),
    "kl against ce": (lambda: mix(Z[:, 0], Z[:, 0], Z[:3, 0]), "kl (4,), ce (3,)"),
    "ratio column": (
        lambda: kd(ratio=lambda context: context.vertices[0][:, :1])(Z, T, Y),
        "alpha of shape (4, 1), wanted (4,)",
        "never broadcast",
    ),
    "binary": (lambda: as_pair(Z), "logits have shape (4, 3), wanted (batch,), (batch, 1) or (batch, 2)"),
    "class weight": (lambda: kd(class_weight=torch.ones(2)), "class_weight has shape (2,)", "classes=3"),
    "class mean": (lambda: kdt.class_mean(Z, Y[:2], 3), "t has shape (4, 3) and y (2,), wanted (batch, 3)"),
    "fit logits": (lambda: kd().fit_class_mean(T[:, :2], Y), "teacher_logits has shape (4, 2)", "classes=3"),
    "fit labels": (lambda: kd().fit_class_mean(T, Y[:2]), "labels has shape (2,)", "rows=4"),
    "set tbar": (lambda: kd().set_class_mean(torch.ones(3, 2)), "tbar has shape (3, 2)", "classes=3"),
    "vertices": (
        lambda: kdt.features(Z, T[:2], Z, Z),
        "t has shape (2, 3), wanted (batch, classes) = (4, 3)",
    ),
    "features": (lambda: kdt.RatioNet(7)(Z), "phi has shape (4, 3)", "features=7"),
    "direction": (
        lambda: kdt.per_sample_directional(
            nn.Linear(5, 3), None, {"weight": torch.zeros(5, 3)}, (torch.zeros(4, 5), T, Y)
        ),
        "v['weight'] has shape (5, 3), wanted (3, 5)",
    ),
    "v": (
        lambda: kdt.precondition([], torch.optim.SGD([nn.Parameter(Z)], lr=0.1)),
        "v holds 0 tensors for 1 parameters",
    ),
}
DATA = {
    "float labels": (lambda: kd()(Z, T, Y.float()), "labels have dtype torch.float32, wanted integers"),
    "negative": (lambda: kd()(Z, T, labels(0, 1, -3, -7)), "labels[2] is -3, wanted 0..2", "index -100"),
    "too large": (lambda: kd()(Z, T, labels(0, 3, 1, 9)), "labels[1] is 3, wanted 0..2"),
    "binary label": (lambda: kd(2, task="binary")(Z[:, 0], T[:, 0], Y), "labels[2] is 2, wanted 0..1"),
    "fit labels": (lambda: kd().fit_class_mean(T, labels(0, 1, 2, 3)), "labels[3] is 3, wanted 0..2"),
    "bad teacher": (lambda: kd()(Z, bad_teacher(), Y), "teacher_logits hold NaN or infinity in rows [1, 3]",
                    "(2 rows in all)", "on_bad_teacher='zero_alpha'"),
    "fit bad teacher": (lambda: kd().fit_class_mean(bad_teacher(), Y), "NaN or infinity in rows [1, 3]"),
    "no held-out data": (lambda: bilevel(val_batches=None), "'jvp' needs held-out", "val_batches"),
    "empty held-out data": (lambda: step(bilevel(val_batches=[])), "val_batches is empty", "(x, y)"),
    "no held-out rows": (lambda: step(bilevel(val_batches=[(Z[:0], Y[:0])])), "no labels, wanted"),
    "held-out mapping": (lambda: step(bilevel(val_batches=[{"input": Z}])), "a held-out batch has no labels"),
    "held-out tensor": (lambda: step(bilevel(val_batches=[Z])), "batch is a Tensor, wanted (x, y)"),
    "held-out floats": (
        lambda: step(bilevel(val_batches=[(torch.ones(4, 5), Y.float())])),
        "held-out labels have dtype torch.float32, wanted integers",
    ),
    "held-out label": (
        lambda: step(bilevel(val_batches=[(torch.ones(4, 5), labels(0, 1, 7, 0))])),
        "held-out labels[2] is 7, wanted 0..2",
    ),
    "val_mix": (lambda: step(bilevel(hypergradient="val_mix")), "'val_mix' needs the teacher's logits"),
}  # fmt: skip
CONFIG = {
    "preset": (lambda: kd(preset="best"), "preset is 'best', wanted one of ('robust', 'paper')"),
    "task": (lambda: kd(task="regression"), "task is 'regression', wanted one of ('multiclass', 'binary')"),
    "terms task": (lambda: kd_terms(Z, T, Y, 1.0, task="no"), "task is 'no', wanted one of"),
    "ratio": (lambda: kd(ratio="magic"), "ratio is 'magic', wanted one of", "or a callable"),
    "prior": (lambda: kd(prior="magic"), "prior is 'magic', wanted one of"),
    "tbar": (lambda: kd(tbar="test"), "tbar is 'test', wanted one of ('train', 'batch', 'none')"),
    "ce_on": (lambda: kd(ce_on="softmax"), "ce_on is 'softmax', wanted one of ('logits', 'probs')"),
    "terms ce_on": (lambda: kd_terms(Z, T, Y, 1.0, ce_on="no"), "ce_on is 'no', wanted 'logits' or 'probs'"),
    "validate": (lambda: kd(validate="maybe"), "validate is 'maybe', wanted one of"),
    "on_bad_teacher": (lambda: kd(on_bad_teacher="drop"), "on_bad_teacher is 'drop', wanted one of"),
    "one class": (lambda: kd(1), "num_classes is 1, wanted >= 2"),
    "binary classes": (lambda: kd(3, task="binary"), "num_classes is 3, wanted 2"),
    "anl": (lambda: kd(ratio="anl"), "ratio 'anl'", "pass total_steps"),
    "rw": (lambda: kd(ratio="rw"), "ratio 'rw'", "pass num_samples"),
    "alpha": (lambda: kd(ratio="const", alpha=1.5), "alpha is 1.5, wanted a number in [0, 1]"),
    "init_alpha": (lambda: kd(init_alpha=1.0), "init_alpha is 1.0, wanted a number in (0, 1)"),
    "alpha_range": (lambda: kd(alpha_range=(0.8, 0.2)), "alpha_range is (0.8, 0.2), wanted 0 <= low < high"),
    "dropout": (lambda: kd(dropout=2.0), "dropout is 2.0, wanted a number in [0, 1]"),
    "label_smoothing": (lambda: kd(label_smoothing=-0.1), "label_smoothing is -0.1"),
    "geometry": (lambda: kd(geometry="round"), "geometry is 'round'", "'compact'", "'official'"),
    "blocks": (lambda: Geometry([]), "geometry blocks are [], wanted a non-empty list"),
    "settings": (lambda: kdt.Config(geometry=("s", "len:sx")), "geometry block 'len:sx' is unknown"),
    "block": (lambda: Geometry(["len:sx"]), "geometry block 'len:sx' is unknown; wanted a vertex", "len:ab"),
    "taken": (lambda: kdt.register_geometry("compact", ["s"]), "geometry 'compact' is taken"),
    "no class mean": (lambda: kdt.features(Z, Z, Z, None, "official"), "needs the class mean o, got None"),
    "network": (lambda: kdt.RatioNet(4, "deep"), "ratio network shape is 'deep', wanted one of"),
    "engine": (lambda: bilevel(hypergradient="magic"), "hypergradient is 'magic', wanted one of ('jvp'"),
    "directional": (
        lambda: kdt.per_sample_directional(nn.Linear(5, 3), None, {}, (torch.zeros(4, 5), T, Y), "no"),
        "engine is 'no', wanted 'jvp', 'fd', 'fd1' or 'head'",
    ),
    "order": (lambda: bilevel(order="middle"), "order is 'middle', wanted 'inner_first' or 'outer_first'"),
    "order of joint": (lambda: bilevel(order="outer_first", hypergradient="joint"), "'joint' has none"),
    "outer_loss": (lambda: bilevel(outer_loss="auc"), "outer_loss is 'auc', wanted one of ('ce', 'gce')"),
    "every": (lambda: bilevel(every=-1), "every is -1, wanted a number in [0, inf]"),
    "warmup_steps": (lambda: bilevel(warmup_steps=-1), "warmup_steps is -1, wanted"),
    "share": (lambda: bilevel(subsample=1.5), "subsample is 1.5, wanted"),
    "no share": (lambda: bilevel(subsample=0.0), "subsample is 0.0, wanted"),
    "no rows": (lambda: bilevel(subsample=0), "subsample is 0, wanted a number in [1, inf]"),
    "stochastic": (lambda: bilevel(stochastic="on"), "stochastic is 'on', wanted 'replay' or 'off'"),
    "terms": (lambda: step(bilevel(hypergradient="neumann", neumann_terms=0)), "neumann_terms is 0, wanted"),
    "damping": (lambda: step(bilevel(hypergradient="implicit", damping=0.0)), "damping is 0.0, wanted"),
    "no parameters": (
        lambda: kdt.Bilevel(nn.Linear(5, 3).requires_grad_(False), kd(), None, []),
        "no parameter that requires a gradient",
    ),
    "no head": (
        lambda: bilevel(student=nn.Sequential(nn.Linear(5, 4), nn.Tanh()), hypergradient="head"),
        "'head' needs a Linear layer with 3 outputs; the student's are: 0 (5->4)",
    ),
    "no such head": (
        lambda: bilevel(student=nn.Sequential(nn.Linear(5, 3)), hypergradient="head", head="fc"),
        "'head' needs a Linear layer named 'fc'; the student's are: 0 (5->3)",
    ),
    "anl steps": (lambda: kdt.ratios.anl(Z[:, 0], 1, 0), "total_steps is 0, wanted"),
    "eta": (lambda: kdt.hypergradient(Z[:, 0], Z[:, 0], [], eta=-1.0), "eta is -1.0, wanted"),
} | {
    f"temperature {tau}": (lambda tau=tau: kd(temperature=tau), f"temperature is {tau}, wanted", "(0, inf)")
    for tau in (0.0, -1.0, float("inf"), float("nan"))
} | {
    f"terms {tau}": (lambda tau=tau: kd_terms(Z, T, Y, tau), f"temperature is {tau}, wanted")
    for tau in (0.0, float("inf"))
} | {
    "geometry_temperature": (lambda: kd(geometry_temperature=0.0), "geometry_temperature is 0.0, wanted"),
}  # fmt: skip
STATE = {
    "tbar not fitted": (
        lambda: kd(geometry="official", tbar="train")(Z, T, Y),
        "T-bar is not fitted: call fit_class_mean(teacher_logits, labels)",
        "TRAINING rows",
    ),
    "rw without rows": (lambda: kd(ratio="rw", num_samples=4)(Z, T, Y), "call loss(..., sample_id=indices)"),
}
CHECKPOINT = {
    "no network": (lambda: kdt.RatioNet.from_official({"conv.weight": Z}), "'conv.weight'", "fc1..fc3"),
    "a part": (lambda: kdt.RatioNet.from_official({"fc1.weight": Z}), "'fc1.weight'", "reweighting.0/2"),
    "misfit": (
        lambda: kdt.RatioNet.from_official(
            {"linear1.weight": Z, "linear1.bias": Z[:, 0], "linear2.weight": torch.ones(1, 9)}
        ),
        "net.2.weight",
    ),
}
CASES = [
    pytest.param(error, *case[:1], case[1:], id=f"{error.__name__}-{name}")
    for error, cases in (
        (ShapeError, SHAPES),
        (DataError, DATA),
        (ConfigError, CONFIG),
        (kdt.StateError, STATE),
        (CheckpointError, CHECKPOINT),
    )
    for name, case in cases.items()
]


@pytest.mark.parametrize(("error", "call", "words"), CASES)
def test_refused_with_a_sentence(error, call, words):
    with pytest.raises(error) as caught:
        call()
    message = re.sub(r"\s+", " ", str(caught.value))
    for word in words:
        assert word in message


def test_the_family_of_errors():
    for error in (ShapeError, DataError, ConfigError, kdt.StateError):
        assert issubclass(error, InputError)
    assert issubclass(kdt.DivergedError, FusionError)
    assert not issubclass(kdt.DivergedError, InputError)


def test_a_scaler_does_not_go_with_outer_first():
    engine = bilevel(order="outer_first")
    x = torch.randn(4, 5)
    out = engine.loss(engine.student(x), T, Y)
    with pytest.raises(ConfigError, match="'outer_first' takes no GradScaler"):
        engine.step(x, out, torch.amp.GradScaler("cpu"))


def test_never_validating_lets_bad_values_through():
    assert torch.isnan(kd(validate="never")(Z, bad_teacher(), Y).loss)


# ---------------------------------------------------------------- rare but sound


def test_untrusted_teacher_rows_learn_from_the_label():
    loss = kd(on_bad_teacher="zero_alpha", geometry="official", tbar="train")
    loss.fit_class_mean(bad_teacher(), Y)
    kept = kdt.class_mean(T[[0, 2]].softmax(-1), Y[[0, 2]], 3)[0]
    torch.testing.assert_close(loss.tbar, kept)
    z = Z.clone().requires_grad_()
    out = loss(z, bad_teacher(), Y)
    assert (out.alpha == 0).tolist() == [False, True, False, True]
    out.loss.backward()
    softmax = z.detach().softmax(-1) - nn.functional.one_hot(Y, 3)
    torch.testing.assert_close(z.grad[[1, 3]], softmax[[1, 3]] / 4)


ENGINES = ["jvp", "fd", "fd1", "head", "unrolled", "neumann", "implicit", "joint", "val_mix"]


def sound(problem, engine, *, edit=None, **options):
    p = problem(**options)
    if edit is not None:
        edit(p)
    engine = p.bilevel(engine)
    for _ in range(2):
        out = p.step(engine)
    assert torch.isfinite(out.loss)
    assert all(torch.isfinite(q).all() for q in (*p.student.parameters(), *p.loss.parameters()))
    assert engine.outer.skipped == 0
    return out


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("options", [{"batch": 1}, {"classes": 2}, {"batch": 1, "classes": 2}])
def test_one_row_and_two_classes(problem, engine, options):
    out = sound(problem, engine, **options)
    assert out.alpha.shape == (options.get("batch", 6),)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_absent_class(problem, engine):
    out = sound(problem, engine, edit=lambda p: (p.y.zero_(), p.loss.fit_class_mean(p.zt, p.y)))
    assert (out.context.labels == 0).all()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("bias", [-1e4, 1e4])
def test_saturated_ratios(problem, engine, bias):
    def saturate(p):
        with torch.no_grad():
            p.loss.network.net[-1].bias.fill_(bias)

    out = sound(problem, engine, edit=saturate)
    assert ((out.alpha > 0) & (out.alpha < 1)).all()


@pytest.mark.parametrize("engine", ENGINES)
def test_empty_batch(problem, engine):
    out = sound(problem, engine, batch=6, edit=lambda p: empty(p))
    assert out.loss.item() == 0.0
    assert out.loss.requires_grad


def empty(p):
    p.x, p.zt, p.y = p.x[:0], p.zt[:0], p.y[:0]


@pytest.mark.parametrize("engine", ENGINES)
def test_all_rows_ignored(problem, engine):
    out = sound(problem, engine, edit=lambda p: p.y.fill_(-100))
    assert out.loss.item() == 0.0
    assert out.loss.requires_grad


@pytest.mark.parametrize("ignore_index", [-100, 255, -1])
@pytest.mark.parametrize("engine", ["jvp", "fd1", "head", "unrolled"])
def test_ignored_rows_count_nowhere(problem, engine, ignore_index):
    """Neither in the loss, the gradients, T-bar, c nor the held-out loss."""
    options = {"ignore_index": ignore_index, "label_smoothing": 0.1}
    short, p = problem(batch=6, **options), problem(batch=6, **options)
    keep = torch.tensor([0, 2, 3])
    gone = torch.tensor([1, 4, 5])
    short.x, short.zt, short.y = short.x[keep], short.zt[keep], short.y[keep]
    short.xv, short.yv, short.ztv = short.xv[keep], short.yv[keep], short.ztv[keep]
    p.y[gone], p.yv[gone] = ignore_index, ignore_index
    states, c = [], []
    for q in (short, p):
        q.loss.fit_class_mean(q.zt, q.y)
        engine_ = q.bilevel(engine, outer_loss="gce" if engine == "jvp" else "ce")
        out = q.step(engine_)
        c.append(engine_.last_c)
        states.append([out.loss, q.loss.tbar, *q.student.parameters(), *q.loss.parameters()])
    assert not c[1][gone].any()
    torch.testing.assert_close(c[1][keep], c[0])
    for a, b in zip(*states, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_generalized_ce_of_ignored_rows():
    y = labels(0, -100, 2, -100)
    torch.testing.assert_close(generalized_ce(Z, y), generalized_ce(Z[[0, 2]], y[[0, 2]]))
    assert generalized_ce(Z, torch.full((4,), -100)) == 0.0
