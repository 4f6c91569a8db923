"""The floor: colour and place of patches, as an encoder."""

import pytest
import torch

from sslkit.evaluation.floor import ColourAndPosition, colour_position_patches
from sslkit.evaluation.position import position_probe
from sslkit.evaluation.tokens import encode


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_patches_hold_mean_colour_and_place():
    x = images(2, 3, 8, 18)
    found = colour_position_patches(x, (4, 6))
    assert found.shape == (2, 2, 3, 5)
    for i in range(2):
        for j in range(3):
            patch = x[:, :, 4 * i : 4 * i + 4, 6 * j : 6 * j + 6]
            torch.testing.assert_close(found[:, i, j, :3], patch.mean((2, 3)))
            place = torch.tensor([(2 * i + 1) / 2 - 1, (2 * j + 1) / 3 - 1])
            torch.testing.assert_close(found[:, i, j, 3:], place.expand(2, 2))
    assert position_probe(found, found).r2 == pytest.approx(1, abs=1e-5)


def test_encoder_of_pixels():
    x = images(3, 3, 32, 32)
    tokens = encode(ColourAndPosition(8), x, want=("cls", "patches"))
    assert torch.equal(tokens["cls"], x.flatten(1))
    assert torch.equal(tokens["patches"], colour_position_patches(x, 8))
    output = ColourAndPosition((8, 16), cls_size=(2, 4))(images(2, 4, 16, 32))
    assert output.cls.shape == (2, 4 * 2 * 4)
    assert output.registers.shape == (2, 0, 32)
    assert output.patches.shape == (2, 2, 2, 6)


def test_refused():
    with pytest.raises(
        ValueError, match="30 by 32 pixels, which patch_size=8 by 8 does not divide"
    ):
        ColourAndPosition(8)(images(1, 3, 30, 32))
