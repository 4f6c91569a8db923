"""Figures of segmentations and depths: they can be read, and hold what they are given."""

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb

from sslkit.evaluation import figures as draw
from sslkit.evaluation.figures.style import class_colour
from tests.test_figures import assert_can_be_read, images, masks


def depths(count):
    """Depth [count, 48, 72] from 1 to 5 m, growing upwards, with an unknown corner."""
    depth = torch.linspace(5, 1, 48).view(1, -1, 1).expand(count, 48, 72).clone()
    depth[:, :6, :10] = 0
    return depth


def noise(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


FIGURES = {
    "segmentation_small": lambda: draw.segmentation(
        images(1), masks(1), masks(1), title="Overclustering"
    ),
    "segmentation_many": lambda: draw.segmentation(
        images(6), masks(6), torch.arange(20).repeat(6, 4, 1).repeat_interleave(9, 1)
    ),
    "depth": lambda: draw.depth(images(5), depths(5), 6 - depths(5)[:, ::4, ::4]),
    "position_maps": lambda: draw.position_maps(
        {
            "linear": noise(6, 9) / 12,
            "two layers": noise(6, 9) / 20,
            "before RASA: linear": noise(6, 9) / 50,
            "before RASA: two layers": noise(6, 9) / 90,
        }
    ),
    "position_maps_one": lambda: draw.position_maps({"linear": noise(4, 4) / 5}),
    "depth_one": lambda: draw.depth(images(1), depths(1), depths(1)),
}


@pytest.mark.parametrize("name", FIGURES)
def test_figure_can_be_read(name):
    assert_can_be_read(FIGURES[name](), name)


def test_masks_of_another_size_are_drawn_at_that_of_the_images():
    truth = torch.zeros(1, 24, 36, dtype=torch.uint8)
    truth[:, :, 18:] = 3
    figure = draw.segmentation(images(1), truth, truth + 1, title="Linear", class_names="abcde")
    assert figure.get_label().startswith("Linear. ")
    _image, drawn, predicted = (np.asarray(axes.images[0].get_array()) for axes in figure.axes)
    colour = np.array(to_rgb(class_colour(3)))
    grey = draw.segmentation(images(1), truth * 0, truth * 0).axes[1].images[0].get_array()
    np.testing.assert_allclose(drawn[:, :36], grey[:, :36])
    np.testing.assert_allclose(drawn[:, 36:], 0.3 * grey[:, 36:] + 0.7 * colour, atol=1e-6)
    assert not np.allclose(predicted[:, :36], drawn[:, :36])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["b", "d", "e", "ignored"]


def test_depths_share_one_scale_and_unknown_ones_are_left_out():
    truth = depths(2)
    figure = draw.depth(images(2), truth, truth / 2)
    shown = [axes.images[0] for axes in figure.axes[2:6]]
    assert {image.get_clim() for image in shown} == {(0.0, 5.0)}  # predictions reach 0 at a corner
    unknown = np.ma.getmaskarray(shown[0].get_array())
    np.testing.assert_array_equal(unknown, truth[0].numpy() == 0)
    np.testing.assert_allclose(shown[2].get_array(), truth[0].numpy() / 2)
    assert figure.axes[-1].get_ylabel() == "depth (m)"
