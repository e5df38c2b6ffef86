"""The attack as an object: its options, its randomness, and that it leaves no trace on what it was given."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

import adaea
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
    disparity_map,
    loss_matrix,
)
from adaea.draws import Draws
from adaea.fusion import fuse_logits
from adaea.plain import plain_attack
from adaea.targets import target_labels
from fusion_core.errors import InputError
from fusion_core.seeding import generator


def snapshot(models):
    parts = [part for net in models.values() for part in net.modules()]
    tensors = [t for net in models.values() for t in (*net.parameters(), *net.buffers())]
    return (
        [part.training for part in parts],
        [(t.requires_grad, id(t.grad), None if t.grad is None else t.grad.clone()) for t in tensors],
        [t.detach().clone() for t in tensors],
    )


def same(first, second):
    flat = lambda nested: [
        x for entry in nested for x in (flat(entry) if isinstance(entry, tuple | list) else [entry])
    ]
    pairs = zip(flat(first), flat(second), strict=True)
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


@pytest.fixture
def worn(nets):
    """Surrogates as a user may leave them: half in training, some frozen, with gradients."""
    models = nets(3)
    models["net0"].eval()
    models["net1"][0].weight.requires_grad_(False)
    models["net2"](torch.rand(2, 3, 8, 8, dtype=torch.float64)).sum().backward()
    return models


class Clumsy(nn.Module):
    """Draws from every global generator and then may fail."""

    def __init__(self, net, fail):
        super().__init__()
        self.net, self.fail, self.calls = net, fail, 0

    def forward(self, x):
        self.calls += 1
        random.random()
        np.random.rand()  # noqa: NPY002 - a surrogate that draws so is what is tested
        x = x + 1e-9 * torch.rand_like(x)
        if self.fail and self.calls > 3:
            raise KeyError("in the middle")
        return self.net(x)


@pytest.mark.parametrize("fail", [False, True])
def test_callers_things_come_back_untouched(worn, batch, fail):
    x, y = batch()
    worn["net1"] = Clumsy(worn["net1"], fail)
    images, labels, before = x.clone(), y.clone(), snapshot(worn)
    state = (random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state())  # noqa: NPY002
    attack = AdaEA(
        worn, update=[Momentum(), Variance(1)], transforms=[DI(0.8), Admix(scales=2), TI(3)], steps=2
    )
    if fail:
        with pytest.raises(KeyError, match="in the middle"):
            attack(x, y)
    else:
        assert not torch.equal(attack(x, y), x)
    assert same(before, snapshot(worn))
    assert torch.equal(x, images)
    assert torch.equal(y, labels)
    assert random.getstate() == state[0]
    assert np.array_equal(np.random.get_state()[1], state[1])  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), state[2])


def test_images_that_need_a_gradient_and_odd_layouts(nets, batch):
    x, y = batch(dtype=torch.float32)
    models = nets(3, dtype=torch.float32)
    plain = AdaEA(models, steps=2)(x, y)
    leaf = x.clone().requires_grad_()
    assert torch.equal(AdaEA(models, steps=2)(leaf, y), plain)
    assert leaf.grad is None
    last = x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(AdaEA(models, steps=2)(last, y.int()), plain, rtol=0, atol=1e-5)
    with torch.no_grad():
        assert torch.equal(AdaEA(models, steps=2)(x, y), plain)
    with torch.inference_mode():
        assert torch.equal(AdaEA(models, steps=2)(x.clone(), y.clone()), plain)


def test_seeds_and_generators(nets, batch):
    x, y = batch()
    models = nets(3)
    attack = AdaEA(models, steps=2, noise=0.01, transforms=DI(0.8))
    assert torch.equal(attack(x, y), attack(x, y))
    assert not torch.equal(attack(x, y), attack.with_(seed=1)(x, y))
    made = generator(5)
    first = attack(x, y, generator=made)
    assert not torch.equal(first, attack(x, y, generator=made)), "the stream has moved on"
    assert torch.equal(first, attack(x, y, generator=generator(5)))
    assert torch.equal(AdaEA(models, steps=2, noise=0)(x, y), AdaEA(models, steps=2, noise=0, seed=9)(x, y))


def test_the_first_point_is_where_start_says(nets, batch):
    x, y = batch()
    x = x.round()  # half of the noise leads out of bounds
    models = nets(2)
    points = {}
    for start in ("normal", "projected"):
        keep = lambda record, start=start: points.setdefault(start, record.point)
        AdaEA(models, start=start, steps=1)(x, y, on_step=keep)
    noise = torch.randn(x.shape, generator=generator(0, "adaea"), dtype=x.dtype)
    torch.testing.assert_close(points["normal"], x + 0.001 * noise)
    assert points["normal"].min() < 0
    torch.testing.assert_close(points["projected"], points["normal"].clamp(0, 1))


PARTS = {
    "plain": {},
    "mi": {"update": Momentum()},
    "ni": {"update": Nesterov()},
    "vni": {"update": [Variance(2), Nesterov()]},
    "di": {"transforms": DI(0.8, 0.9)},
    "di grows": {"transforms": DI(1.3, 0.9)},
    "si": {"transforms": SI(2)},
    "admix": {"transforms": Admix(0.2, 2, 2)},
    "all": {"transforms": [TI(3), SI(2), DI(0.8)], "update": [Variance(1), Momentum()]},
    "judged": {"transforms": DI(0.8), "agm_transform": True},
    "half": {"agm_dtype": "bfloat16"},
}


@pytest.mark.parametrize("options", PARTS.values(), ids=PARTS)
def test_parts_compose(nets, batch, options, device):
    x, y = batch(3, dtype=torch.float32)
    x, y = x.to(device), y.to(device)
    models = {name: net.to(device) for name, net in nets(3, dtype=torch.float32).items()}
    adv, trace = AdaEA(models, steps=3, **options)(x, y, trace=True)
    plain = AdaEA(models, steps=3)(x, y)
    assert adv.device == x.device
    assert torch.isfinite(adv).all()
    torch.testing.assert_close(trace.weights.sum(1), torch.ones_like(trace.weights[:, 0]))
    for k, net in enumerate(models.values()):
        before = nn.functional.cross_entropy(net.eval()(x), y, reduction="none")
        if not options:
            torch.testing.assert_close(trace.losses[0, k], before, rtol=0, atol=1e-2)
    if options and "agm_dtype" not in options:
        assert not torch.equal(adv, plain)


@pytest.mark.parametrize("agm", [True, False])
@pytest.mark.parametrize("drf", [True, False])
def test_the_ablation_switches_work_with_di_and_ti(nets, batch, agm, drf):
    """In the published code these switches keep the DI and TI classes from being constructed."""
    x, y = batch(2)
    models = nets(3)
    parts = {"transforms": [DI(0.8, 0.9), TI(3)], "update": Momentum(0.0), "steps": 3, "eta": 0.2}
    adv, trace = AdaEA(models, agm=agm, drf=drf, **parts)(x, y, trace=True)
    assert torch.isfinite(adv).all()
    assert (trace.weights == 1 / 3).all().item() is not agm
    assert trace.keep.all().item() is not drf


def test_candidates_are_judged_through_a_fresh_draw_on_request(nets, batch):
    x, y = batch(2)
    models = nets(3)
    first = []
    parts = {"transforms": DI(0.7, 1.0), "steps": 1}
    keep = lambda record: first.append(record)
    AdaEA(models, **parts)(x, y, on_step=keep)
    AdaEA(models, agm_transform=True, **parts)(x, y, on_step=keep)
    assert torch.equal(first[0].gradients, first[1].gradients), "the step's own draws are the same"
    assert (first[0].weights - first[1].weights).abs().max() > 1e-4


def test_admix_is_the_mean_over_partners_and_scales(nets, batch):
    x, y = batch(3)
    models = {name: net.eval() for name, net in nets(2).items()}
    partners, steps = [], []

    class Noted(Draws):
        def partners(self, size, count):
            partners.append(super().partners(size, count))
            return partners[-1]

    attack = AdaEA(models, transforms=Admix(0.3, 2, 3), steps=1, noise=0)
    attack(x, y, draws=Noted(generator(0)), on_step=steps.append)
    (others,), (record,) = partners, steps
    leaf = x.clone().requires_grad_()
    copies = [(leaf + 0.3 * x[row]) / 2**s for row in others for s in range(3)]
    own, fused = [], 0.0
    for net in models.values():
        losses = [nn.functional.cross_entropy(net(copy), y, reduction="sum") for copy in copies]
        own.append(torch.autograd.grad(sum(losses) / 6, leaf, retain_graph=True)[0])
    for copy in copies:
        z = sum(w * net(copy) for w, net in zip(record.weights, models.values(), strict=True))
        fused = fused + nn.functional.cross_entropy(z, y, reduction="sum") / 6
    torch.testing.assert_close(record.gradients, torch.stack(own), rtol=0, atol=1e-10)
    torch.testing.assert_close(record.fused, torch.autograd.grad(fused, leaf)[0], rtol=0, atol=1e-10)


def test_bfloat16_forwards_change_weights_in_the_third_digit_only(nets, batch):
    x, y = batch(3, dtype=torch.float32)
    models = nets(3, dtype=torch.float32)
    seen = []
    hook = models["net1"].register_forward_pre_hook(
        lambda module, inputs: seen.append((torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))
    )
    _, exact = AdaEA(models, steps=1, beta=1)(x, y, trace=True)
    assert seen == [(False, True), (False, False)], "one forward with a graph, one without for all candidates"
    _, half = AdaEA(models, steps=1, beta=1, agm_dtype="bfloat16")(x, y, trace=True)
    assert seen[2:] == [(False, True), (True, False)]
    hook.remove()
    assert not torch.equal(half.weights, exact.weights)
    torch.testing.assert_close(half.weights, exact.weights, rtol=0, atol=1e-2)


@pytest.mark.parametrize("agm", ["linear", "off"])
def test_linear_and_even_weights_take_no_further_forwards(nets, batch, agm):
    calls = []
    models = nets(3)
    models["net0"].register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    AdaEA(models, agm=agm, steps=3)(*batch(2))
    assert calls == [2, 2, 2]


def test_half_precision_surrogates_take_a_float32_perturbation(nets, batch):
    x, y = batch(3, dtype=torch.float32)
    models = nets(3, dtype=torch.float32)
    models["net1"] = models["net1"].to(torch.bfloat16)
    adv, trace = AdaEA(models, steps=3)(x, y, trace=True)
    assert adv.dtype == trace.weights.dtype == trace.losses.dtype == torch.float32
    assert models["net1"][0].weight.dtype == torch.bfloat16
    assert (adv - x).abs().max() > 1e-3


def test_surrogates_of_several_dtypes(nets, batch):
    x, y = batch(3, dtype=torch.float64)
    models = nets(3)
    mixed = models | {"net1": nets(3, dtype=torch.float32)["net1"]}
    adv, trace = AdaEA(mixed, steps=3, update=Variance(1))(x, y, trace=True)
    expected, other = AdaEA(models, steps=3, update=Variance(1))(x, y, trace=True)
    assert adv.dtype == torch.float64
    assert ((adv - expected).abs() <= 1e-6).double().mean() > 0.99
    torch.testing.assert_close(trace.weights, other.weights, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_and_maps_of_half_precision_are_computed_in_float32(dtype):
    z = (8 * torch.randn(3, 3, 4, 10, generator=generator(0))).to(dtype)
    y = torch.tensor([0, 3, 9, 1])
    close = {"rtol": 1e-6, "atol": 1e-6}
    assert loss_matrix(z, y).dtype == torch.float32
    torch.testing.assert_close(loss_matrix(z, y), loss_matrix(z.float(), y), **close)
    sure = torch.tensor([[60.0, 0.0]], dtype=dtype)
    assert fuse_logits(torch.stack([sure, -sure]), torch.tensor([0.5, 0.5]), "probs").isfinite().all()
    g = torch.randn(3, 2, 3, 4, 4, generator=generator(1)).to(dtype) * 1e-4
    torch.testing.assert_close(disparity_map(g), disparity_map(g.float()), **close)
    assert agm_weights(loss_matrix(z, y).to(dtype)).dtype == torch.float32


def test_outputs_of_other_libraries(nets, batch):
    x, y = batch()
    models = nets(2)

    class Output:
        def __init__(self, logits):
            self.logits = logits

    wrapped = {
        "attribute": lambda images: Output(models["net0"](images)),
        "tuple": lambda images: (models["net1"](images), None),
        "dict": lambda images: {"logits": models["net0"](images)},
    }
    for net in models.values():
        net.eval()
    bare = {"a": models["net0"], "b": models["net1"], "c": models["net0"]}
    assert torch.equal(AdaEA(wrapped, steps=2)(x, y), AdaEA(bare, steps=2)(x, y))


def test_kinds_of_surrogates(nets, batch):
    x, y = batch()
    models = nets(2)
    listed = AdaEA(list(models.values()), steps=1)(x, y)
    assert torch.equal(AdaEA(models, steps=1)(x, y), listed)
    assert torch.equal(AdaEA(nn.ModuleDict(models), steps=1)(x, y), listed)
    assert torch.equal(AdaEA(nn.ModuleList(models.values()), steps=1)(x, y), listed)
    assert torch.equal(AdaEA(steps=1)(x, y, surrogates=models), listed)
    alone, trace = AdaEA(models["net0"], steps=1)(x, y, trace=True)
    assert trace.names == ("0:Sequential",)
    assert torch.equal(alone, Ens(models["net0"], steps=1)(x, y))


@pytest.mark.slow
def test_compiled_surrogates(nets, batch):
    x, y = batch()
    models = nets(2)
    compiled = [torch.compile(net, backend="eager") for net in models.values()]
    torch.testing.assert_close(AdaEA(compiled, steps=1)(x, y), AdaEA(models, steps=1)(x, y))


def test_devices_move_a_surrogate_for_the_run(nets, batch, device):
    x, y = batch(dtype=torch.float32)
    models = nets(2, dtype=torch.float32)
    at = []
    models["net1"].register_forward_pre_hook(lambda module, inputs: at.append(inputs[0].device.type))
    adv = AdaEA(models, devices={"net1": device}, steps=1)(x, y)
    assert set(at) == {device}
    assert adv.device == x.device
    assert models["net1"][0].weight.device.type == "cpu"


def test_agm_every(nets, batch):
    x, y = batch()
    weights = lambda every: AdaEA(nets(3), agm_every=every, steps=4)(x, y, trace=True)[1].weights
    assert len({tuple(row) for row in weights(1).tolist()}) == 4
    assert len({tuple(row) for row in weights(2).tolist()}) == 2
    assert len({tuple(row) for row in weights(0).tolist()}) == 1


def test_target_maps(nets, batch):
    x, y = batch(4)
    models = {name: net.eval() for name, net in nets(3).items()}
    logits = torch.stack([net(x) for net in models.values()]).detach()
    least = logits.softmax(-1).mean(0).argmin(-1)
    assert torch.equal(target_labels("least-likely", y, logits), least)
    wanted = {
        "least-likely": least,
        2: torch.full_like(y, 2),
        "function": (y + 1) % 4,
    }
    for rule, expected in wanted.items():
        target = (lambda labels, z: (labels + 1) % z.shape[-1]) if rule == "function" else rule
        attack = AdaEA(models, target=target, steps=3, eps=0.1, alpha=0.02)
        assert attack.targeted
        adv, trace = attack(x, y, trace=True)
        assert torch.equal(trace.targets, expected)
        loss = lambda images, e=expected: nn.functional.cross_entropy(models["net0"](images), e).item()
        assert loss(adv) < loss(x)
        direct = attack.with_(target="label", targeted=True)
        assert torch.equal(direct(x, expected), adv), "the same as giving the wanted labels"
    _, trace = AdaEA(models, target="random", steps=1)(x, y, trace=True)
    assert (trace.targets != y).all()
    assert ((trace.targets >= 0) & (trace.targets < 4)).all()
    assert AdaEA(target="random").with_(targeted=False).target == "label"


@pytest.mark.parametrize("steps", [1, 4])
def test_the_plain_loop_of_the_benchmark_is_the_same_attack(nets, batch, steps):
    x, y = batch(3)
    models = {name: net.eval() for name, net in nets(3).items()}
    attack = AdaEA(models, drf="official", eta=0.0, steps=steps)
    adv, trace = attack(x, y, trace=True)
    noise = generator(0, "adaea")
    found = plain_attack(list(models.values()), x, y, steps=steps, eta=0.0, generator=noise)
    assert 0 < trace.kept.mean() < 1
    torch.testing.assert_close(adv, found, rtol=0, atol=1e-9)


def test_order_of_draws(nets, batch):
    class Noted(Draws):
        def __init__(self, made):
            super().__init__(made)
            self.order = []

        def __getattribute__(self, name):
            if name in ("normal", "partners", "resize", "neighbour"):
                self.order.append(name)
            return super().__getattribute__(name)

    draws = Noted(generator(0))
    parts = {"transforms": [Admix(others=1, scales=1), DI(0.8)], "update": Variance(2), "agm_transform": True}
    AdaEA(nets(2), steps=1, **parts)(*batch(), draws=draws)
    assert draws.order == ["normal", "partners", *["resize"] * 4, *["neighbour"] * 2]


def test_the_names_of_this_half_are_public():
    for name in ("AdaEA", "Ens", "DI", "TI", "SI", "Admix", "Momentum", "Nesterov", "Variance", "Trace"):
        assert getattr(adaea, name).__name__ == name
        assert name in adaea.__all__
    for name in ("agm_weights", "loss_matrix", "disparity_filter", "disparity_map"):
        assert callable(getattr(adaea, name))
    with pytest.raises(AttributeError, match="no attribute 'SVRE'"):
        adaea.SVRE  # noqa: B018


def test_random_targets_need_other_classes(batch):
    x, y = batch(2, classes=1)
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 1)).double()
    with pytest.raises(InputError, match=r"two classes, got 1"):
        AdaEA([net, net], target="random")(x, y)
