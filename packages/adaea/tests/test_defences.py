import pytest
import torch
from torch import nn

from adaea import defences
from fusion_core.errors import ConfigError, FusionWarning

WORDS = ["jpeg:75", "bits:4", "median:3", "box:3", "gaussian:0.8", "resize-pad:0.8", "smoothing:0.1:4"]


@pytest.fixture(scope="module")
def images():
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Mean(nn.Module):
    def forward(self, x):
        return torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)


@pytest.mark.parametrize("word", WORDS)
def test_an_answer_depends_on_the_image_and_the_seed_alone(word, images):
    build = defences.parse_defence(word)
    whole = build(Mean(), seed=3)(images)
    torch.testing.assert_close(build(Mean(), seed=3)(images), whole, rtol=0, atol=0)
    torch.testing.assert_close(build(Mean(), seed=3)(images[1:2]), whole[1:2])
    moved = build(Mean(), seed=4)(images)
    random = word.startswith(("resize", "smoothing"))
    assert torch.equal(moved, whole) is not random
    assert not torch.allclose(whole, Mean()(images), atol=1e-4)


def test_values_of_the_simple_ones(images):
    ident = nn.Identity()
    torch.testing.assert_close(defences.BitDepth(ident, 4)(images), (images * 15).round() / 15)
    flat = torch.full((1, 1, 8, 8), 0.3)
    for wrapper in (defences.GaussianBlur(ident), defences.BoxBlur(ident), defences.MedianBlur(ident)):
        torch.testing.assert_close(wrapper(flat), flat)
    spot = torch.zeros(1, 1, 5, 5)
    spot[0, 0, 2, 2] = 1.0
    assert defences.MedianBlur(ident)(spot).sum() == 0
    torch.testing.assert_close(defences.BoxBlur(ident)(spot)[0, 0, 1:4, 1:4], torch.full((3, 3), 1 / 9))
    blurred = defences.GaussianBlur(ident, 1.0)(torch.nn.functional.pad(spot, (4,) * 4))
    torch.testing.assert_close(blurred.sum(), torch.tensor(1.0))
    assert float(blurred[0, 0, 6, 6] / blurred[0, 0, 6, 7]) == pytest.approx(torch.e**0.5)
    assert torch.equal(defences.Purifier(ident, lambda x: 1 - x)(images), 1 - images)


def test_jpeg_loses_little_at_high_quality_and_takes_gray_images(images):
    smooth = torch.nn.functional.interpolate(images[:, :1, :4, :4], (32, 32), mode="bilinear")
    error = [(defences.JPEG(nn.Identity(), quality)(smooth) - smooth).abs().mean() for quality in (95, 10)]
    assert float(error[0]) < 0.01 < float(error[1])
    with pytest.raises(ConfigError, match="these have 2"):
        defences.JPEG(nn.Identity())(images[:, :2])


def test_resize_pad_keeps_the_size_and_shrinks_the_picture(images):
    found = defences.RandomResizePad(nn.Identity(), 0.5, seed=1)(torch.ones_like(images))
    assert found.shape == images.shape
    share = float((found > 0).float().mean())
    assert 0.25 <= share < 1
    same = defences.RandomResizePad(nn.Identity(), 1.0)(images)
    torch.testing.assert_close(same, images)


def test_smoothing_averages_probabilities(images):
    model = Mean()
    found = defences.RandomizedSmoothing(model, 0.2, 3, seed=5)(images)
    torch.testing.assert_close(found.exp().sum(1), torch.ones(3))
    calm = defences.RandomizedSmoothing(model, 0.0, 2)(images)
    torch.testing.assert_close(calm, model(images).log_softmax(1))


def test_gradients_are_masked_with_a_warning_or_pass_straight_through(images):
    x = images.clone().requires_grad_(True)
    with pytest.warns(FusionWarning, match="BitDepth masks its gradient"):
        masked = torch.autograd.grad(defences.BitDepth(Mean(), 3)(x).sum(), x)[0]
    assert not masked.any()
    through = defences.BitDepth(Mean(), 3, straight_through=True)
    (gradient,) = torch.autograd.grad(through(x)[:, :3].sum(), x)
    torch.testing.assert_close(gradient, torch.full_like(x, 1 / 256))
    torch.testing.assert_close(through(images), defences.BitDepth(Mean(), 3)(images))


def test_eot_averages_draws(images):
    one = [defences.RandomResizePad(Mean(), 0.6, seed=2, eot=n)(images) for n in (1, 4)]
    assert not torch.allclose(one[0], one[1])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda m: defences.JPEG(m, 0), "quality is 0"),
        (lambda m: defences.BitDepth(m, 9), "bits is 9"),
        (lambda m: defences.MedianBlur(m, 4), "odd number"),
        (lambda m: defences.GaussianBlur(m, 0.0), "sigma is 0"),
        (lambda m: defences.RandomResizePad(m, 0.0), "rate is 0"),
        (lambda m: defences.RandomizedSmoothing(m, -1.0), "sigma is -1"),
        (lambda m: defences.RandomizedSmoothing(m, 0.1, 0), "draws is 0"),
        (lambda m: defences.BitDepth(m, 4, eot=0), "eot is 0"),
        (lambda m: defences.BoxBlur(m, 9)(torch.zeros(1, 1, 4, 4)), "too large for images"),
        (lambda m: defences.parse_defence("gzip:3"), "defence is 'gzip:3'"),
        (lambda m: defences.parse_defence("jpeg:high"), "quality is 'high'"),
        (lambda m: defences.parse_defence("jpeg:75:3"), "defence is 'jpeg:75:3'"),
    ],
)
def test_bad_settings_are_named(make, words):
    with pytest.raises(ConfigError, match=words):
        make(Mean())


def test_straight_through_needs_equal_sizes(images):
    shrink = defences.Purifier(nn.Identity(), lambda x: x[..., ::2, ::2], straight_through=True)
    with pytest.raises(ConfigError, match="same size"):
        shrink(images)
