"""Every bad input of an attack gets its type and a sentence; every edge case its defined outcome."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn

from adaea import (
    DI,
    SI,
    TI,
    AdaEA,
    Admix,
    Ens,
    Momentum,
    Nesterov,
    Variance,
    agm_weights,
    disparity_filter,
    disparity_map,
    loss_matrix,
)
from adaea.budget import project, step
from adaea.drf import filter_bound
from adaea.fusion import fuse_logits, fused_loss
from adaea.trace import AttackState
from adaea.transforms import smooth, smoothing_kernel
from fusion_core.errors import (
    ConfigError,
    DataError,
    FusionError,
    FusionWarning,
    InputError,
    NonFiniteError,
    ShapeError,
)


# surrogates
@pytest.mark.parametrize("none", [[], {}, None, nn.ModuleList()])
def test_no_surrogates(batch, none):
    with pytest.raises(InputError, match=r"surrogates is (empty|None), wanted at least one"):
        AdaEA(steps=1)(*batch(), surrogates=none)


def test_a_name_is_no_surrogate():
    with pytest.raises(InputError, match=r"'0:str' is 'timm:resnet18', wanted a module .* load_model"):
        AdaEA(["timm:resnet18"])


def test_class_counts_differ(nets, batch):
    models = nets(1, classes=4) | {"wide": nets(1, classes=7)["net0"]}
    with pytest.raises(ShapeError, match=r"'net0' has 4 classes and 'wide' has 7"):
        AdaEA(models)(*batch())


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        (lambda z: z.argmax(1), DataError, r"returned torch.int64, wanted float logits.*audited"),
        (lambda z: z[:, :, None], ShapeError, r"returned shape \(2, 4, 1\), wanted \(batch, classes\)"),
        (lambda z: z[0], ShapeError, r"returned shape \(4,\)"),
        (lambda z: z[:1], ShapeError, r"batch=2"),
        (lambda z: "cat", ShapeError, r"'odd': the model returned a str without logits"),
        (lambda z: {"scores": z}, ShapeError, r"wanted a tensor, .logits"),
        (lambda z: z.detach(), InputError, r"'odd' gives no gradient to its input"),
        (lambda z: z * 0 + 1, InputError, r"'odd' gives no gradient"),
        (lambda z: z * math.nan, NonFiniteError, r"'odd' gave a gradient that is not finite"),
    ],
)
def test_a_surrogate_answers_wrongly(nets, batch, answer, error, words):
    models = nets(2)
    models["odd"] = lambda x: answer(models["net0"](x))
    with pytest.raises(error, match=words):
        AdaEA(models, eta=-0.4)(*batch())


@pytest.mark.parametrize(
    "spoil",
    [
        lambda x: (x * 255).round() / 255,
        lambda x: (x * 255).to(torch.uint8).to(x.dtype) / 255,
        torch.Tensor.detach,
    ],
    ids=["round", "uint8", "detach"],
)
def test_no_gradient_to_the_input(nets, batch, spoil):
    models = nets(2)
    models["odd"] = lambda x: models["net1"](spoil(x))
    with pytest.raises(InputError, match=r"'odd' gives no gradient to its input .*differentiable"):
        AdaEA(models, steps=1)(*batch())


def test_no_grad_inside(nets, batch):
    models = nets(2)
    with pytest.raises(InputError, match=r"'0:function' gives no gradient"):
        AdaEA([torch.no_grad()(lambda x: models["net0"](x)), models["net1"]])(*batch())


# images and labels
@pytest.mark.parametrize(
    ("images", "error", "words"),
    [
        (
            torch.zeros(2, 3, 4, 4, dtype=torch.uint8),
            DataError,
            r"images are torch.uint8, wanted a float tensor",
        ),
        ([[0.0]], DataError, r"images are list"),
        (torch.zeros(3, 4, 4), ShapeError, r"images have shape \(3, 4, 4\), wanted \(batch, channels"),
        (
            torch.full((2, 3, 4, 4), -1.5),
            DataError,
            r"-1.5 to -1.5, wanted 0 to 1: pass images that are not norm",
        ),
        (torch.full((2, 3, 4, 4), 1.0 + 2e-6), DataError, r"let the surrogates apply mean and std"),
        (torch.full((2, 3, 4, 4), math.nan), NonFiniteError, r"images hold NaN or infinity"),
        (torch.full((2, 3, 4, 4), math.inf), NonFiniteError, r"images hold NaN or infinity"),
    ],
)
def test_images(nets, images, error, words):
    with pytest.raises(error, match=words):
        AdaEA(nets(2))(images, torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("labels", "error", "words"),
    [
        (torch.tensor([0.0, 1.0]), DataError, r"labels are torch.float32, wanted an integer tensor"),
        (torch.tensor([True, False]), DataError, r"labels are torch.bool"),
        ([0, 1], DataError, r"labels are list"),
        (torch.tensor([0]), ShapeError, r"labels have shape \(1,\), wanted \(2,\)"),
        (torch.tensor([[0], [1]]), ShapeError, r"labels have shape \(2, 1\)"),
        (torch.tensor([0, -1]), DataError, r"labels go down to -1"),
        (torch.tensor([0, 4]), DataError, r"labels go up to 4, wanted 0 to 3"),
    ],
)
def test_labels(nets, batch, labels, error, words):
    for attack in (AdaEA(nets(2)), AdaEA(nets(2), target="random")):
        with pytest.raises(error, match=words):
            attack(batch()[0], labels)


def test_a_little_outside_is_let_through(nets, batch):
    x, y = batch()
    x[0, 0, 0, 0] = 1 + 5e-7
    assert AdaEA(nets(2), steps=1)(x, y).max() <= 1
    wide = AdaEA(nets(2), steps=1, bounds=(-1, 1))(2 * batch()[0] - 1, y)
    assert wide.min() < 0


# targets
@pytest.mark.parametrize(
    ("target", "error", "words"),
    [
        (lambda labels, logits: labels, DataError, r"target equals the label of every image"),
        (lambda labels, logits: labels[:1], ShapeError, r"target gave \(1,\) classes"),
        (lambda labels, logits: labels + 9, DataError, r"target gave classes up to 1\d, wanted 0 to 3"),
        (4, DataError, r"target gave classes up to 4"),
    ],
)
def test_targets(nets, batch, target, error, words):
    with pytest.raises(error, match=words):
        AdaEA(nets(2), target=target)(*batch())


# settings
@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"eps": -0.1}, r"eps is -0.1, wanted a number >= 0"),
        ({"eps": math.nan}, r"eps is nan"),
        ({"alpha": 0.0}, r"alpha is 0.0"),
        ({"alpha": -1.0}, r"alpha is -1.0"),
        ({"steps": 0}, r"steps is 0, wanted an integer of at least 1"),
        ({"steps": float("inf")}, r"steps is inf"),
        ({"eps": float("inf")}, r"eps is inf"),
        ({"alpha": float("inf")}, r"alpha is inf"),
        ({"steps": 2.5}, r"steps is 2.5"),
        ({"noise": -1.0}, r"noise is -1.0"),
        ({"final_step": 0.0}, r"final_step is 0.0"),
        ({"beta": -1.0}, r"beta is -1.0"),
        ({"eta": math.nan}, r"eta is nan"),
        ({"agm_every": -1}, r"agm_every is -1"),
        ({"agm_batch_size": 0}, r"agm_batch_size is 0"),
        ({"agm_dtype": "int8"}, r"dtype is 'int8'"),
        ({"norm": "l1"}, r"norm is 'l1', wanted one of \['linf', 'l2'\]"),
        ({"agm": "fast"}, r"agm is 'fast', wanted one of \['exact'"),
        ({"drf": "on"}, r"drf is 'on'"),
        ({"ratio": "both"}, r"ratio is 'both'"),
        ({"fusion": "votes"}, r"fusion is 'votes'"),
        ({"loss": "hinge"}, r"loss is 'hinge'"),
        ({"start": "zero"}, r"start is 'zero'"),
        ({"target": "worst"}, r"target is 'worst'"),
        ({"bounds": (1.0, 0.0)}, r"bounds are \(1.0, 0.0\)"),
        ({"update": "mi"}, r"update holds 'm', wanted Momentum"),
        ({"update": DI()}, r"update holds DI\(.*wanted Momentum"),
        ({"update": [Momentum(), Nesterov()]}, r"Momentum and Nesterov, wanted one"),
        ({"transforms": [DI(), DI(0.8)]}, r"at most one part of each kind"),
        ({"transforms": [SI(), Admix()]}, r"SI and Admix, wanted one"),
        ({"agm": "linear", "loss": "margin"}, r"loss is 'margin', wanted 'ce' with agm='linear'"),
        ({"agm_transform": True}, r"agm_transform is True, wanted DI"),
        ({"agm_transform": True, "transforms": DI(), "agm": "linear"}, r"got 'linear'"),
    ],
)
def test_settings(setting, words):
    with pytest.raises(ConfigError, match=words):
        AdaEA(**setting)
    with pytest.raises(ConfigError, match=words):
        AdaEA().with_(**setting)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DI(0.0), r"DI rate is 0.0"),
        (lambda: DI(0.9, 1.5), r"DI probability is 1.5"),
        (lambda: DI(sides="long"), r"DI sides is 'long'"),
        (lambda: SI(0), r"SI scales is 0"),
        (lambda: Admix(-0.1), r"Admix strength is -0.1"),
        (lambda: Admix(others=0), r"Admix others is 0"),
        (lambda: TI(0), r"TI size is 0"),
        (lambda: TI(kind="box"), r"TI kind is 'box'"),
        (lambda: TI(nsig=0), r"TI nsig is 0"),
        (lambda: Momentum(-0.1), r"Momentum mu is -0.1"),
        (lambda: Nesterov(-0.1), r"Nesterov mu is -0.1"),
        (lambda: Variance(0), r"Variance neighbours is 0"),
        (lambda: Variance(radius=0.0), r"Variance radius is 0.0"),
        (lambda: AdaEA().with_(epsilon=1), r"no setting 'epsilon', wanted one of"),
        (lambda: AdaEA.from_config({"attack": "Ens"}), r"attack is 'Ens', wanted 'AdaEA'"),
        (lambda: AdaEA.from_config({"epsilon": 1}), r"no setting 'epsilon'"),
        (lambda: AdaEA.from_config({"update": [{"part": "Adam"}]}), r"part is 'Adam'"),
        (lambda: AdaEA.from_config({"update": [{"part": "Momentum", "nu": 1}]}), r"part Momentum: .*nu"),
        (lambda: AdaEA(target=lambda labels, logits: labels).config(), r"target is a function"),
        (lambda: step(torch.ones(1, 1, 1, 1), 1.0, "l1"), r"norm is 'l1'"),
        (lambda: project(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1), 1.0, "l1"), r"norm is 'l1'"),
        (lambda: agm_weights(torch.ones(2, 2), -1.0), r"beta is -1.0"),
        (lambda: agm_weights(torch.ones(2, 2), ratio="sum"), r"ratio is 'sum'"),
        (lambda: disparity_map(torch.ones(2, 1, 1, 1, 1), "fast"), r"form is 'fast'"),
        (lambda: filter_bound(1), r"surrogates is 1"),
        (lambda: fuse_logits(torch.ones(1, 1, 2), torch.ones(1), "loss"), r"fusion is 'loss'"),
        (lambda: fused_loss(torch.ones(1, 1, 2), torch.ones(1), torch.tensor([0]), "x"), r"fusion is 'x'"),
        (lambda: smoothing_kernel(3, "box"), r"kind is 'box'"),
    ],
)
def test_parts_and_functions(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


def test_shapes_of_the_equations():
    for shape in ((2, 3), (2,), (2, 2, 2, 2)):
        with pytest.raises(ShapeError, match=r"loss_matrix has shape"):
            agm_weights(torch.ones(shape))
    with pytest.raises(ShapeError, match=r"logits have shape \(2, 3, 1, 4\)"):
        loss_matrix(torch.ones(2, 3, 1, 4), torch.tensor([0]))
    with pytest.raises(ShapeError, match=r"gradients have shape \(2, 3, 4, 4\)"):
        disparity_filter(torch.ones(2, 3, 4, 4))
    with pytest.raises(ShapeError, match=r"kernel has 5 x 5 pixels, wanted at most"):
        smooth(torch.ones(1, 1, 4, 9), smoothing_kernel(5))


def test_transforms_that_do_not_fit(nets, batch):
    oblong, y = batch(size=(8, 12))
    adv = AdaEA(nets(2), transforms=DI(0.8, 1.0), steps=1)(oblong, y)
    assert adv.shape == oblong.shape
    with pytest.raises(ShapeError, match=r"DI got images of 8 x 12, wanted square"):
        AdaEA(nets(2), transforms=DI(sides="square"))(oblong, y)
    with pytest.raises(ConfigError, match=r"DI rate 1.01 makes 8 of 8 pixels"):
        AdaEA(nets(2), transforms=DI(1.01))(*batch())
    with pytest.raises(ConfigError, match=r"DI rate 0.1 makes 0 of 8 pixels"):
        AdaEA(nets(2), transforms=DI(0.1))(*batch())
    with pytest.raises(ShapeError, match=r"TI kernel has 15 x 15 pixels, wanted at most .* 8 x 8"):
        AdaEA(nets(2), transforms=TI())(*batch())


def test_a_state_of_other_images(nets, batch, tmp_path):
    _, trace = AdaEA(nets(2), steps=1)(*batch(), trace=True)
    with pytest.raises(ShapeError, match=r"state holds images of shape \(2, 3, 8, 8\)"):
        AdaEA(nets(2), steps=1)(*batch(3), state=trace.state)
    with pytest.raises(ShapeError, match=r"state holds weights of 2 surrogates, wanted 3"):
        AdaEA(nets(3), steps=1)(*batch(), state=trace.state)
    with pytest.raises(DataError, match=r"is no state of an attack"):
        AttackState.load(tmp_path / "nothing.npz")


def test_devices_that_are_not_there(nets, batch):
    with pytest.raises(
        ConfigError, match=r"devices names \['vit'\], wanted surrogates among \['net0', 'net1'\]"
    ):
        AdaEA(nets(2), devices={"vit": "cpu"})(*batch())
    with pytest.raises(InputError, match=r"'cuda:77' is not on this machine"):
        AdaEA(nets(2), devices={"net0": "cuda:77"})(*batch())


# memory
class Small(nn.Module):
    """Refuses batches above a size, as a full device does."""

    def __init__(self, net, most):
        super().__init__()
        self.net, self.most, self.seen = net, most, []

    def forward(self, x):
        self.seen.append(len(x))
        if len(x) > self.most and not torch.is_grad_enabled():
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return self.net(x)


def test_out_of_memory_halves_the_candidates(nets, batch):
    x, y = batch(4)
    models = nets(3)
    small = models | {"net1": Small(models["net1"], 6)}
    attack = AdaEA(steps=3)
    adv, trace = attack(x, y, surrogates=models, trace=True)
    again, other = attack(x, y, surrogates=small, trace=True)
    torch.testing.assert_close(again, adv, rtol=0, atol=1e-9)
    torch.testing.assert_close(other.weights, trace.weights, rtol=0, atol=1e-10)
    assert small["net1"].seen.count(12) == 1, "the smaller chunk is remembered"


def test_out_of_memory_on_one_candidate(nets, batch):
    models = nets(2)
    with pytest.raises(FusionError, match=r"out of memory on a single item.*batch_size was 4"):
        AdaEA({"net0": models["net0"], "net1": Small(models["net1"], 0)})(*batch())


def test_other_errors_pass(nets, batch):
    def broken(x):
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        AdaEA([nets(1)["net0"], broken])(*batch())


# edge cases
def test_an_empty_batch(nets):
    x, y = torch.zeros(0, 3, 8, 8), torch.zeros(0, dtype=torch.int64)
    for attack in (AdaEA(nets(3)), Ens(nets(3)), AdaEA(nets(3), target="random", transforms=Admix())):
        adv, trace = attack(x, y, trace=True)
        assert adv.shape == x.shape
        assert len(trace.weights) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_eps_zero_gives_the_images_back(nets, batch, dtype):
    x, y = batch(dtype=dtype)
    adv, trace = AdaEA(nets(3), eps=0, start="uniform", noise=1.0)(x, y, trace=True)
    assert torch.equal(adv, x)
    assert adv.data_ptr() != x.data_ptr()
    assert trace.weights.shape == (0, 3)
    assert trace.losses.shape == (0, 3, 2)


def test_an_image_without_gradient_stays_and_the_others_go(nets, batch):
    x, y = batch(2)
    x[0] = 0.0
    dark = lambda net: lambda images: net(images * (images.amax((1, 2, 3), keepdim=True) > 0.1))
    models = [dark(net.eval()) for net in nets(3).values()]
    adv, trace = AdaEA(models, noise=0, steps=3, update=Momentum())(x, y, trace=True)
    assert torch.equal(adv[0], x[0])
    assert (adv[1] - x[1]).abs().max() > 1e-3
    assert trace.still.tolist() == [[True, False]] * 3
    assert torch.isfinite(trace.state.momentum).all()


def test_a_filtered_image_does_not_poison_the_momentum():
    """The published code divides 0 by 0 here, and the image stays frozen without a word."""
    x = torch.stack([torch.full((3, 4, 4), 0.8), torch.full((3, 4, 4), 0.2)]).double()

    def up(images):
        level = images.mean((1, 2, 3)) - 0.5
        return torch.stack([level, -level], 1)

    def torn(images):  # agrees with the other about dark images only
        bright = images.mean((1, 2, 3), keepdim=True).squeeze(-1).squeeze(-1) > 0.5
        return torch.where(bright, -up(images), up(images))

    attack = AdaEA([up, torn], drf="official", update=Momentum(), steps=3, noise=0, eta=0.0)
    adv, trace = attack(x, torch.tensor([0, 0]), trace=True)
    assert trace.kept.tolist() == [[0.0, 1.0]] * 3
    assert trace.still.tolist() == [[True, False]] * 3
    assert torch.isfinite(trace.state.momentum).all()
    assert not trace.state.momentum[0].any()
    assert torch.equal(adv[0], x[0])
    torch.testing.assert_close(adv[1], x[1] - 6 / 255)


def test_a_saturated_surrogate_is_told(nets, batch):
    x, _ = batch(2, dtype=torch.float32)
    models = nets(2, dtype=torch.float32)
    for net in models.values():
        net.eval()
    y = models["net0"](x).argmax(1)
    sure = models | {"net0": lambda images: 1e5 * models["net0"](images)}
    with pytest.warns(FusionWarning, match=r"'net0' is so sure .* loss='logit'"):
        adv, trace = AdaEA(sure, steps=2)(x, y, trace=True)
    assert torch.isfinite(trace.weights).all()
    assert (adv - x).abs().max() > 1e-3, "the other surrogate still moves the images"
    AdaEA(sure, steps=2, loss="logit")(x, y)


@pytest.mark.parametrize("drf", ["symmetric", "official"])
@pytest.mark.parametrize("count", [2, 4, 5])
def test_an_inactive_filter_is_told(nets, batch, drf, count):
    x, y = batch(2)
    bound = filter_bound(count, drf)
    models = nets(count)
    with pytest.warns(FusionWarning, match=rf"filter is inactive: eta is .* {count} surrogates"):
        _, trace = AdaEA(models, drf=drf, eta=bound, steps=1)(x, y, trace=True)
    assert trace.keep.all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AdaEA(models, drf=drf, eta=bound + 1e-3, steps=1)(x, y)


def test_the_documented_official_run_never_filters(batch, nets):
    x, y = batch(2)
    with pytest.warns(FusionWarning, match=r"eta is -0.3, and with 4 surrogates .* below -0.2708") as told:
        _, trace = AdaEA.official(nets(4), steps=2)(x, y, trace=True)
    assert told[0].filename == __file__, "it points at the caller's line"
    assert trace.keep.all()
    g = torch.randn(4, 64, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert disparity_filter(g, -0.3, "official").all()
    assert not disparity_filter(g, -0.3).all(), "the corrected map does reach it"


def test_one_channel_and_lonely_admix_are_told(nets, batch):
    x, y = batch(2, channels=1)
    with pytest.warns(FusionWarning, match=r"one channel"):
        _, trace = AdaEA(nets(3, channels=1), steps=1)(x, y, trace=True)
    assert torch.isfinite(trace.weights).all()
    x, y = batch(1)
    with pytest.warns(FusionWarning, match=r"Admix mixes nothing"):
        AdaEA(nets(2), transforms=Admix(others=1, scales=1), steps=1)(x, y)
    Ens(nets(2, channels=1), steps=1)(*batch(2, channels=1))
