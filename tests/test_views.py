"""Evaluation views against torchvision's."""

import pytest
import torch
import torchvision.transforms.v2.functional as vision
from hypothesis import given
from hypothesis import strategies as st

from sslkit.data.crops import IMAGENET_MEAN, IMAGENET_STD
from sslkit.evaluation.views import EvalTransform, PaddedView


def image(height=40, width=56, channels=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (channels, height, width), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(
    ("size", "crop", "resize"),
    [
        ((375, 500), (224, 224), None),
        ((500, 375), (224, 224), None),
        ((64, 1000), (56, 70), 60),
        ((20, 30), (28, 42), 32),
        ((300, 301), (30, 20), 30),
    ],
)
def test_view_is_resize_centre_crop_normalise(size, crop, resize):
    picture = image(*size)
    shorter = 256 if resize is None else resize
    bicubic = vision.InterpolationMode.BICUBIC
    resized = vision.resize(picture.float(), [shorter], bicubic, antialias=True).clamp(0, 255)
    top, left = ((full - cut) // 2 for full, cut in zip(resized.shape[1:], crop, strict=True))
    cut = resized[:, top : top + crop[0], left : left + crop[1]]
    expected = vision.normalize(cut / 255, list(IMAGENET_MEAN), list(IMAGENET_STD))
    found = EvalTransform(crop, resize)(picture)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@given(
    size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    crop=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    resize=st.none() | st.integers(1, 60),
    channels=st.sampled_from([1, 3, 5]),
)
def test_view_of_any_shape(size, crop, resize, channels):
    view = EvalTransform(crop, resize)
    found = view(image(*size, channels))
    assert (found.shape, found.dtype) == ((channels, *crop), torch.float32)
    assert found.isfinite().all()
    assert view.mask(torch.zeros(size, dtype=torch.uint8)).shape == crop


def test_an_image_of_the_crops_size_is_only_normalised():
    picture = image(32, 48, channels=2)
    found = EvalTransform((32, 48), resize=32, mean=(0.5, 0.25), std=(1, 2))(picture)
    expected = (picture / 255 - torch.tensor([0.5, 0.25])[:, None, None]) / torch.tensor(
        [1.0, 2.0]
    ).view(2, 1, 1)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [(2, 64_000), (64_000, 2)])
def test_of_an_extremely_long_image_the_middle_is_seen(size):
    picture = torch.zeros(3, *size, dtype=torch.uint8)
    along = 1 + size.index(64_000)
    picture.narrow(along, 32_000, 32_000).fill_(255)  # white from the middle on
    view = EvalTransform((64, 64), mean=(0.0,) * 3, std=(1.0,) * 3)
    seen, cut = view(picture), view.mask((picture[0] > 0).byte())
    assert seen.shape == (3, 64, 64)
    for pixels in (seen[0], cut.float()):
        ends = pixels.movedim(along - 1, 0)[[0, -1]].mean(1)
        torch.testing.assert_close(ends, torch.tensor([0.0, 1.0]), atol=0.1, rtol=0)


def test_mask_is_cut_where_the_image_is():
    mask = torch.zeros(60, 90, dtype=torch.uint8)
    mask[10:40, 30:70] = 200  # a class above 127
    picture = mask.expand(3, -1, -1)
    view = EvalTransform((28, 35), resize=32, mean=(0, 0, 0), std=(1, 1, 1))
    found = view.mask(mask)
    assert found.dtype == torch.uint8
    assert set(found.unique().tolist()) == {0, 200}
    bright = view(picture)[0] > 100 / 255
    assert (bright == (found == 200)).float().mean() > 0.98


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: EvalTransform(0), ValueError, "must be positive, got crop=0"),
        (lambda: EvalTransform((8, -1)), ValueError, r"crop=\(8, -1\)"),
        (lambda: EvalTransform(8, resize=0), ValueError, "resize=0"),
        (lambda: EvalTransform(8)(torch.zeros(3, 9, 9)), TypeError, "uint8 .* got torch.float32"),
        (lambda: EvalTransform(8)(image()[0]), TypeError, r"\[C, h, w\], got .* \[40, 56\]"),
        (
            lambda: EvalTransform(8, mean=(0, 0, 0))(image(channels=4)),
            ValueError,
            r"mean has 3 value\(s\) but the image has 4",
        ),
        (lambda: EvalTransform(8, std=(1,))(image()), ValueError, r"std has 1 value\(s\)"),
        (
            lambda: EvalTransform(8).mask(image()),
            ValueError,
            r"must be \[h, w\], got \[3, 40, 56\]",
        ),
    ],
)
def test_refused_views(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_padding_is_right_and_below_and_the_mean_colour():
    picture = image(9, 5)
    found = PaddedView((4, 4))(picture)
    assert found.shape == (3, 12, 8)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    torch.testing.assert_close(found[:, :9, :5], (picture / 255 - mean) / std)
    assert not found[:, 9:].any()
    assert not found[:, :, 5:].any()
