"""Images are brought to the channels of the model, by one rule, wherever a model sees images."""

import numpy as np
import pytest
import torch
from PIL import Image

from sslkit import backbones
from sslkit.commands.main import run as sslkit_command
from sslkit.data import MultiCrop, MultiCropDataset
from sslkit.data.annotated.annotated_source import KeypointPair
from sslkit.data.channels import with_channels
from sslkit.data.image_array import ImageArray
from sslkit.data.scenes import Scenes
from sslkit.evaluation.encoders import as_encoder
from sslkit.evaluation.features import extract
from sslkit.evaluation.protocols import attention, correspondence, in_context, lost, pca
from sslkit.evaluation.subject import Subject
from sslkit.evaluation.views import EvalTransform


def extract_command(words: list[str]) -> int:
    return sslkit_command(["extract", *words])


def test_luminance_is_pillows():
    pixels = np.random.default_rng(0).integers(0, 256, (60, 50, 3), dtype=np.uint8)
    expected = torch.from_numpy(np.array(Image.fromarray(pixels).convert("L")))
    found = with_channels(torch.from_numpy(pixels).permute(2, 0, 1), 1)
    assert found.dtype == torch.uint8
    assert torch.equal(found, expected[None])


def test_grey_is_kept_both_ways():
    grey = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    colour = with_channels(grey, 3)
    assert colour.shape == (3, 16, 16)
    assert torch.equal(colour[1], grey[0])
    assert torch.equal(with_channels(colour, 1), grey)
    assert with_channels(colour, 3) is colour


@pytest.mark.parametrize(("have", "want"), [(3, 2), (1, 2), (2, 1), (2, 3), (4, 3), (3, 4), (4, 1)])
def test_other_numbers_are_refused_with_both(have, want):
    image = torch.zeros(have, 4, 4, dtype=torch.uint8)
    with pytest.raises(
        ValueError, match=rf"image has {have} .* model takes {want}: .*in_chans={have}"
    ):
        with_channels(image, want)


def images(channels, count=6):
    rng = np.random.default_rng(0)
    return ImageArray(rng.integers(0, 256, (count, 20, 24, channels), dtype=np.uint8))


@pytest.mark.parametrize(("have", "want"), [(1, 1), (1, 3), (3, 1), (4, 4)])
def test_features_are_those_of_converted_images(have, want):
    encoder = backbones.create("sslkit_vit_micro", img_size=16, in_chans=want)
    source = images(have)
    found = extract(encoder, source, transform=EvalTransform(16), batch_size=4).cls
    views = [EvalTransform(16)(with_channels(source[i][0], want)) for i in range(len(source))]
    with torch.no_grad():
        expected = encoder.eval()(torch.stack(views)).cls
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_what_cannot_be_converted_is_an_error_in_one_line(num_workers):
    encoder = backbones.create("sslkit_vit_micro", img_size=16)
    with pytest.raises(ValueError, match=r"^image 0: the image has 4 .* takes 3") as error:
        extract(encoder, images(4), transform=EvalTransform(16), num_workers=num_workers)
    assert "\n" not in str(error.value)


def test_an_encoder_that_does_not_say_gets_images_as_they_are():
    encoder = as_encoder(lambda x: (x.mean((2, 3)), x.movedim(1, -1)))
    assert extract(encoder, images(5), transform=EvalTransform(16)).cls.shape == (6, 5)


class Pairs(Scenes):
    """Each scene with itself."""

    def pair(self, index):
        image, points = self[index][0], torch.tensor([[3.0, 4.0], [20.0, 11.0]])
        box = torch.tensor([0.0, 0.0, 20.0, 20.0])
        return KeypointPair(image, image, points, points, box, "scene", 0)


@pytest.mark.filterwarnings("ignore:.*_masks have no pixel")
def test_protocols_of_a_grey_model_on_colour_images():
    data = {"train": Pairs(6, size=(24, 32)), "test": Pairs(4, size=(24, 32), seed=1)}
    encoder = backbones.create("sslkit_vit_micro", img_size=16, in_chans=1)
    subject = Subject("grey", encoder, data, {}, global_size=16, dense_size=16)
    for module, options in (
        (in_context, in_context.Options()),
        (lost, lost.Options()),
        (pca, pca.Options(num_images=2)),
        (attention, attention.Options(num_images=2)),
        (correspondence, correspondence.Options(image_size=32)),
    ):
        outcome = module.evaluate(subject, options)
        assert outcome.scores or outcome.figures
    assert subject.images("test", [0])[0].shape == (1, 16, 16)


def test_crops_of_a_grey_model():
    crops = MultiCrop(global_size=16, local_size=8, num_local=1, channels=1)
    found = crops(images(3)[0][0], generator=torch.Generator().manual_seed(0))
    grey = with_channels(images(3)[0][0], 1)
    expected = crops(grey, generator=torch.Generator().manual_seed(0))
    assert found.globals_.shape == (2, 1, 16, 16)
    assert torch.equal(found.globals_, expected.globals_)
    dataset = MultiCropDataset(images(3), crops, seed=0)
    assert dataset[0, 1].crops.locals_.shape == (1, 1, 8, 8)


def test_the_extraction_command_reads_a_folder_of_photographs_for_a_grey_model(tmp_path):
    weights = tmp_path / "grey.safetensors"
    encoder = backbones.create("sslkit_vit_micro", img_size=16, in_chans=1)
    backbones.save(encoder, weights, {})
    (tmp_path / "images").mkdir()
    for i in range(3):
        pixels = images(3)[i][0].permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    words = ["--weights", weights, "--data", tmp_path / "images", "--output", tmp_path / "f.npy"]
    extract_command([*map(str, words), "--device", "cpu"])
    expected = extract(encoder, [images(3)[i] for i in range(3)], transform=EvalTransform(16)).cls
    np.testing.assert_allclose(np.load(tmp_path / "f.npy"), expected.numpy(), rtol=1e-4, atol=1e-5)
