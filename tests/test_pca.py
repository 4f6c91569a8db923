"""PCA maps: planted foregrounds are found, and colours are scikit-learn's components."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from sslkit import backbones
from sslkit.data.scenes import Scenes
from sslkit.evaluation.pca import pca_maps
from sslkit.evaluation.protocols.pca import Options, evaluate
from sslkit.evaluation.subject import Subject
from tests.noise import noise


def planted(sign=1.0, seed=0):
    """Patches [4, 6, 9, 8]: a rectangle inside each image stands out; its halves differ."""
    patches = 0.1 * noise(4, 6, 9, 8, seed=seed)
    inside = torch.zeros(4, 6, 9, dtype=torch.bool)
    inside[:, 2:5, 2:7] = True
    patches[inside] += sign * 5 * torch.eye(8)[0]
    patches[:, 2:5, 2:4] += torch.eye(8)[1]
    return patches, inside


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("mean", [0.0, 50.0])
def test_planted_foreground_is_found(sign, mean):
    patches, inside = planted(sign)
    maps = pca_maps(patches + mean)
    assert torch.equal(maps.foreground, inside)
    assert (maps.rgb[~inside] == 0).all()
    assert (maps.rgb.min(), maps.rgb.max()) == (0, 1)
    red = maps.rgb[:, 2:5, 2:7, 0]
    first, second = red[:, :, :2], red[:, :, 2:]
    assert abs(first.mean() - second.mean()) > 0.5
    assert maps.explained[0] > 0.5


def test_colours_are_scikit_learns_components():
    patches, inside = planted()
    maps = pca_maps(patches, clip=0.05)
    assert maps.rgb.dtype == torch.float32
    model = PCA(3)
    components = model.fit_transform(patches[inside].double().numpy())
    # The sign that makes the largest entry of each direction positive.
    largest = np.abs(model.components_).argmax(1)
    components *= np.sign(model.components_[np.arange(3), largest])
    low, high = np.quantile(components, [0.05, 0.95], axis=0)
    expected = ((components - low) / (high - low)).clip(0, 1)
    np.testing.assert_allclose(maps.rgb[inside].numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(maps.explained.numpy(), model.explained_variance_ratio_, rtol=1e-6)


def test_without_a_threshold_every_patch_is_coloured():
    patches, _ = planted()
    maps = pca_maps(patches, threshold=None, clip=0.0)
    assert maps.foreground.all()
    expected = PCA(3, svd_solver="full").fit_transform(patches.flatten(0, 2).double().numpy())
    for component, colour in zip(expected.T, maps.rgb.flatten(0, 2).numpy().T, strict=True):
        assert abs(np.corrcoef(component, colour)[0, 1]) > 0.999999


def test_threshold_is_in_standard_deviations_of_the_first_component():
    patches = noise(3, 5, 7, 6)
    patches[..., 0] *= 10
    first = PCA(1).fit_transform(patches.flatten(0, 2).double().numpy())[:, 0]
    first = torch.from_numpy(first / first.std()).view(3, 5, 7)
    kept = pca_maps(patches, threshold=0.4).foreground
    assert torch.equal(kept, first > 0.4) or torch.equal(kept, -first > 0.4)


@pytest.mark.parametrize("grid", [(4, 6), (2, 5), (1, 9)])
def test_of_equal_borders_the_smaller_side_is_foreground(grid):
    patches = torch.zeros(2, *grid, 3)
    patches[0, 0, 0] = torch.tensor([3.0, 0.0, 0.0])
    patches[1, -1, -1] = torch.tensor([3.0, 1.0, 0.0])
    foreground = pca_maps(patches).foreground
    assert foreground.nonzero().tolist() == [[0, 0, 0], [1, grid[0] - 1, grid[1] - 1]]


def test_a_colour_without_variance_is_one_half():
    patches, inside = planted()
    patches[..., 2:] = 0
    maps = pca_maps(patches)
    assert (maps.rgb[inside][:, 2] == 0.5).all()
    assert maps.explained[2] == 0


def test_the_type_and_the_order_of_images_do_not_matter():
    patches, _ = planted()
    maps, flipped = pca_maps(patches), pca_maps(patches.flip(0).double())
    assert torch.equal(maps.foreground.flip(0), flipped.foreground)
    torch.testing.assert_close(maps.rgb.flip(0), flipped.rgb, atol=1e-5, rtol=0)
    assert pca_maps(patches.bfloat16()).rgb.shape == (4, 6, 9, 3)


@pytest.mark.parametrize(
    ("patches", "settings", "message"),
    [
        (noise(1, 2, 3, 2), {}, "at least 3 features, patches have D=2"),
        (noise(1, 2, 3, 4), {"clip": 0.5}, "clip must be at least 0 and below 0.5, got 0.5"),
        (noise(1, 2, 3, 4), {"clip": -0.1}, "got -0.1"),
        (noise(1, 2, 3, 4) / 0, {}, "NaN or infinite"),
        (torch.ones(1, 2, 3, 4), {}, "all patches are the same"),
        (noise(1, 2, 3, 4), {"threshold": 9}, "threshold=9 leaves 0 foreground patches of 6"),
    ],
)
def test_refused(patches, settings, message):
    with pytest.raises(ValueError, match=message):
        pca_maps(patches, **settings)


def test_command():
    encoder = backbones.create("sslkit_vit_micro", img_size=16)
    subject = Subject("micro", encoder, {"test": Scenes(9, size=(20, 32))}, {}, dense_size=(16, 24))
    outcome = evaluate(subject, Options(num_images=4, threshold=None))
    assert not outcome.scores
    assert len(outcome.details["explained by each colour"]) == 3
    assert outcome.details["foreground"] == 1
    pictures = [axes.images[0] for axes in outcome.figures["pca_maps"].axes if axes.images]
    assert len(pictures) == 2 * 4
    assert pictures[1].get_array().shape == (4, 6, 3)
    fewer = evaluate(replace(subject, limits={"test": 2}), Options(num_images=4, threshold=None))
    assert len([axes for axes in fewer.figures["pca_maps"].axes if axes.images]) == 2 * 2
