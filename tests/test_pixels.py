"""Every pixel operation against torchvision's."""

import colorsys

import pytest
import torch
import torchvision.transforms.v2.functional as vision
from hypothesis import given
from hypothesis import strategies as st

from sslkit.data import pixels


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def random_image(height=40, width=56, channels=3):
    shape = (channels, height, width)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=seeded(0))


def apply(operation, image, *factors):
    """The operation on one image [C, h, w], which is changed."""
    column = torch.tensor(factors, dtype=torch.float32).view(-1, 1, 1, 1, 1)
    result = operation(image[None], column, pixels.Scratch(image.device))
    assert result.data_ptr() == image.data_ptr()
    return result[0]


def shift_hue_(images, factors, scratch):
    """By turns, as torchvision."""
    shifts = torch.tensor(pixels.hue_shifts(factors.item())).view(3, 1, 1, 1, 1)
    return pixels.shift_hue_(images, shifts, scratch)


def float_images():
    """[C, h, w] in 0..255, with saturated, grey, black and white pixels among them."""

    def build(seed, height, width, channels, levels):
        x = torch.rand(channels, height, width, generator=seeded(seed))
        return (x * levels).round() / levels * 255

    sizes = st.integers(2, 20)
    return st.builds(
        build,
        st.integers(0, 999),
        sizes,
        sizes,
        st.sampled_from([1, 3]),
        st.sampled_from([1, 2, 255]),
    )


@pytest.mark.parametrize(
    ("ours", "theirs", "factors"),
    [
        (pixels.adjust_brightness_, vision.adjust_brightness, st.floats(0, 2)),
        (pixels.adjust_contrast_, vision.adjust_contrast, st.floats(0, 2)),
        (pixels.adjust_saturation_, vision.adjust_saturation, st.floats(0, 2)),
        (shift_hue_, vision.adjust_hue, st.floats(-0.5, 0.5)),
    ],
    ids=["brightness", "contrast", "saturation", "hue"],
)
def test_jitter_operations_equal_torchvisions(ours, theirs, factors):
    @given(image=float_images(), factor=factors)
    def check(image, factor):
        expected = theirs(image / 255, factor) * 255
        torch.testing.assert_close(apply(ours, image, factor), expected, atol=2e-3, rtol=0)

    check()


@given(
    rgb=st.tuples(*[st.integers(0, 255)] * 3),
    turns=st.floats(-0.5, 0.5),
)
def test_hue_equals_the_standard_librarys(rgb, turns):
    hue, saturation, value = colorsys.rgb_to_hsv(*(channel / 255 for channel in rgb))
    expected = colorsys.hsv_to_rgb((hue + turns) % 1, saturation, value)
    image = torch.tensor(rgb, dtype=torch.float32).view(3, 1, 1)
    result = apply(shift_hue_, image, turns).flatten() / 255
    torch.testing.assert_close(result, torch.tensor(expected), atol=1e-5, rtol=0)


@given(image=float_images())
def test_grey_and_solarise_equal_torchvisions(image):
    scaled = image / 255
    solarised = vision.solarize(scaled, 128 / 255) * 255
    result = apply(pixels.solarise_, image.clone())
    torch.testing.assert_close(result, solarised, atol=1e-4, rtol=0)
    grey = vision.rgb_to_grayscale(scaled, num_output_channels=len(image)) * 255
    torch.testing.assert_close(apply(pixels.to_grey_, image), grey, atol=1e-4, rtol=0)


def test_solarise_starts_at_128():
    image = torch.tensor([0.0, 127.0, 128.0, 255.0]).view(1, 1, 4)
    assert apply(pixels.solarise_, image).flatten().tolist() == [0, 127, 127, 0]


@pytest.mark.parametrize("kernel_size", [3, 5, 9])
@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_blur_equals_torchvisions(kernel_size, sigma, channels):
    image = random_image(9, 13, channels).float()
    expected = vision.gaussian_blur(image, [kernel_size] * 2, [sigma] * 2)
    result = apply(pixels.gaussian_blur_, image, *pixels.gaussian_taps(kernel_size, sigma))
    torch.testing.assert_close(result, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("operation", "factors"),
    [(pixels.adjust_saturation_, [0.3]), (shift_hue_, [0.2]), (pixels.to_grey_, [])],
)
@pytest.mark.parametrize("channels", [1, 2, 4])
def test_colour_operations_leave_other_than_rgb_alone(operation, factors, channels):
    image = random_image(channels=channels).float()
    assert torch.equal(apply(operation, image.clone(), *factors), image)


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("operation", pixels.OPERATIONS)
def test_every_image_has_its_own_factors(operation, channels):
    images = torch.rand(3, channels, 12, 15, generator=seeded(0)) * 255
    factors = torch.tensor(
        {
            pixels.shift_hue_: [pixels.hue_shifts(turns) for turns in (-0.5, 0.0, 0.3)],
            pixels.gaussian_blur_: [pixels.gaussian_taps(5, sigma) for sigma in (0.1, 0.4, 2.0)],
        }.get(operation, [(0.3,), (1.0,), (1.7,)])
    ).T.reshape(-1, 3, 1, 1, 1)
    result = operation(images.clone(), factors, pixels.Scratch(images.device))
    for n, image in enumerate(images):
        assert torch.equal(result[n], apply(operation, image.clone(), *factors[:, n].flatten()))
