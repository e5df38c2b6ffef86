import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adaea import metrics
from adaea.quantize import to_uint8
from fusion_core.errors import ConfigError, DataError, ShapeError


def vectors(count=40, classes=3):
    row = st.lists(st.integers(0, classes - 1), min_size=1, max_size=count)
    return row.flatmap(
        lambda y: st.tuples(
            st.just(y),
            *(st.lists(st.integers(0, classes - 1), min_size=len(y), max_size=len(y)) for _ in range(3)),
        )
    )


@given(vectors())
def test_rates_agree_with_counting(drawn):
    y, clean, adv, target = (torch.tensor(v) for v in drawn)
    found = metrics.score(y, clean, adv, target)
    right = [i for i in range(len(y)) if clean[i] == y[i]]
    won = [i for i in right if adv[i] != y[i]]
    if right:
        assert found.strict.value == len(won) / len(right)
        assert 0 <= found.strict.low <= found.strict.value <= found.strict.high <= 1
    else:
        assert math.isnan(found.strict.value)
        assert math.isnan(found.official.value)
    assert found.fooling.value == pytest.approx(1 - found.adversarial.value)
    asked = [i for i in range(len(y)) if target[i] != y[i]]
    hit = [i for i in asked if adv[i] == target[i]]
    if asked:
        assert found.targeted.value == len(hit) / len(asked)


@given(vectors())
def test_strict_is_fooling_when_every_image_was_right(drawn):
    y, _, adv, _ = (torch.tensor(v) for v in drawn)
    found = metrics.score(y, y, adv)
    assert found.strict == found.fooling
    assert found.official.value == pytest.approx(found.strict.value)
    assert found.targeted is None


def test_no_image_right_before_gives_nan_and_the_whole_interval():
    y = torch.tensor([0, 1])
    for rate in (metrics.strict_asr(y, 1 - y, y), metrics.official_asr(y, 1 - y, y)):
        assert math.isnan(rate.value)
        assert (rate.low, rate.high) == (0.0, 1.0)


def test_official_counts_mended_images_against_the_attack():
    y = torch.zeros(4, dtype=torch.long)
    assert metrics.official_asr(y, torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 0, 1])).value == -0.5
    assert metrics.strict_asr(y, torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 0, 1])).value == 0.0


def test_a_target_equal_to_the_label_is_not_counted():
    y = torch.tensor([0, 0, 1])
    found = metrics.targeted_success(y, torch.tensor([0, 1, 0]), torch.tensor([0, 1, 2]))
    assert found.value == 0.5


def test_bad_vectors_are_named():
    y = torch.tensor([0, 1])
    with pytest.raises(ShapeError, match=r"adversarial has 3 entries, wanted 2"):
        metrics.strict_asr(y, y, torch.tensor([0, 1, 2]))
    with pytest.raises(DataError, match=r"clean is torch.float32, wanted class indices"):
        metrics.strict_asr(y, y.float(), y)
    with pytest.raises(ShapeError, match="labels has shape"):
        metrics.accuracy(torch.zeros(2, 2, dtype=torch.long), y)


def test_perturbation_agrees_with_scikit_image():
    skimage = pytest.importorskip("skimage.metrics")
    draw = np.random.default_rng(0)
    x = torch.from_numpy(draw.random((3, 3, 24, 20)))
    other = (x + torch.from_numpy(draw.normal(0, 0.05, x.shape))).clamp(0, 1)
    ours = metrics.ssim(x, other)
    for i in range(3):
        wanted = skimage.structural_similarity(
            x[i].numpy(),
            other[i].numpy(),
            channel_axis=0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=1.0,
        )
        assert float(ours[i]) == pytest.approx(wanted, rel=1e-9)
    found = metrics.perturbation(x, other, chunk=2)
    psnr = [skimage.peak_signal_noise_ratio(x[i].numpy(), other[i].numpy(), data_range=1.0) for i in range(3)]
    assert found.psnr == pytest.approx(np.mean(psnr))
    assert found.linf == pytest.approx(float((other - x).abs().flatten(1).amax(1).mean()))
    assert found.l2 == pytest.approx(float((other - x).flatten(1).norm(dim=1).mean()))


def test_perturbation_of_nothing():
    x = torch.rand(2, 1, 7, 9, generator=torch.Generator().manual_seed(0))
    found = metrics.perturbation(x, x)
    assert (found.linf, found.l2) == (0.0, 0.0)
    assert found.ssim == pytest.approx(1.0)
    assert math.isnan(found.psnr)
    assert math.isnan(metrics.perturbation(x[:0], x[:0]).linf)
    with pytest.raises(ShapeError, match="adversarial has shape"):
        metrics.perturbation(x, x[:1])


@given(
    seed=st.integers(0, 10_000),
    eps=st.sampled_from([0.0, 1 / 255, 2 / 255, 8 / 255, 0.05, 0.3]),
    grid=st.booleans(),
)
def test_rounding_keeps_the_linf_budget(seed, eps, grid):
    draw = torch.Generator().manual_seed(seed)
    x = torch.rand(2, 3, 5, 5, generator=draw, dtype=torch.float64)
    x = (x * 255).round() / 255 if grid else x
    adv = (x + (2 * torch.rand(x.shape, generator=draw, dtype=x.dtype) - 1) * eps).clamp(0, 1)
    images, outside = to_uint8(adv, x, eps)
    distance = (images.double() / 255 - x).abs()
    kept = distance <= eps + 1e-9
    assert int((~kept).sum()) <= outside
    assert outside == 0 or not grid
    assert bool(((images.double() / 255 - adv).abs()[kept] <= 1 / 255 + 1e-9).all())


@given(seed=st.integers(0, 10_000), eps=st.floats(0.01, 3.0))
def test_rounding_keeps_the_l2_budget_of_images_on_the_grid(seed, eps):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 256, (3, 3, 6, 6), generator=draw).double() / 255
    step = torch.randn(x.shape, generator=draw, dtype=x.dtype)
    length = step.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    adv = (x + step / length * eps).clamp(0, 1)
    images, outside = to_uint8(adv, x, eps, norm="l2")
    assert outside == 0
    assert float((images.double() / 255 - x).flatten(1).norm(dim=1).max()) <= eps * (1 + 1e-6)


def test_values_without_a_byte_are_counted_and_take_the_nearest():
    x = torch.full((1, 1, 1, 2), 0.5)
    images, outside = to_uint8(x + 1e-4, x, 1e-4)
    assert outside == 2
    assert images.flatten().tolist() == [128, 128]
    with pytest.raises(ConfigError, match=r"eps is -0\.1"):
        to_uint8(x, x, -0.1)
    with pytest.raises(ConfigError, match="norm is 'l1'"):
        to_uint8(x, x, 0.1, norm="l1")
    with pytest.raises(ShapeError, match="adversarial has shape"):
        to_uint8(x[0], x, 0.1)


def test_the_rule_of_the_record():
    x = torch.tensor([0.1, 0.5, 0.503, 0.997, 0.0, 1.0], dtype=torch.float64).view(1, 1, 1, 6)
    adv = torch.tensor(
        [0.13098039215686275, 0.46862745098039216, 0.5343725490196078, 1.0, 0.0, 0.9686274509803922],
        dtype=torch.float64,
    ).view(1, 1, 1, 6)
    assert to_uint8(adv, x, 8 / 255)[0].flatten().tolist() == [33, 120, 136, 255, 0, 247]
