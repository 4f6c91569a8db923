"""Folders of images and masks."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sslkit import backbones
from sslkit.data import UnreadableImage, open_source
from sslkit.data.annotated import open_annotated
from sslkit.data.annotated.image_masks import ImagesAndMasks
from sslkit.data.splits import Subset
from sslkit.evaluation.protocols import in_context, linear_segmentation, overclustering
from sslkit.evaluation.subject import Subject
from sslkit.evaluation.tokens import Unsuitable


def write(folder: Path) -> Path:
    """Three images of 6 x 4 pixels: two to train on, one to test."""
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    for i, name in enumerate("abc"):
        Image.new("RGB", (6, 4), (0, 0, 60 * i)).save(folder / "images" / f"{name}.png")
        mask = Image.new("L", (6, 4), 0)
        mask.paste(2, (1, 0, 3, 4))
        mask.putpixel((0, 0), 255)
        mask.save(folder / "masks" / f"{name}.png")
    (folder / "train.txt").write_text("a\nb\n")
    (folder / "val.txt").write_text("c\n")
    images = {"a": {"label": 2, "boxes": [[2, 1, 0, 3, 4]]}, "c": {"label": 1, "boxes": []}}
    annotations = {"classes": ["background", "cat", "dog"], "images": images}
    (folder / "annotations.json").write_text(json.dumps(annotations))
    return folder


def test_splits_labels_masks_and_boxes(tmp_path):
    folder = write(tmp_path)
    train, test = (open_source(folder, split=split) for split in ("train", "test"))
    assert isinstance(train, ImagesAndMasks)
    assert isinstance(test, ImagesAndMasks)
    assert (len(train), len(test), train.num_classes) == (2, 1, 2)
    assert train.class_names == ("cat", "dog")
    assert train.mask_class_names == ("background", "cat", "dog")
    image, label = train[0]
    assert image.shape == (3, 4, 6)
    assert label == 1
    assert train[1][1] == -1
    assert test[0][1] == 0
    assert Path(test.name(0)).name == "c.png"
    expected = torch.zeros(4, 6, dtype=torch.uint8)
    expected[:, 1:3] = 2
    expected[0, 0] = 255
    assert torch.equal(train.mask(0), expected)
    assert train.boxes(0).tolist() == [[1, 0, 3, 4]]
    assert train.box_classes(0).tolist() == [2]
    assert train.boxes(1).shape == (0, 4)
    assert train.box_classes(1).shape == (0,)


def test_palette_masks_are_read_as_indices(tmp_path):
    write(tmp_path)
    mask = Image.new("P", (6, 4), 1)
    mask.putpalette([0, 0, 0, 200, 10, 10, 5, 5, 5])
    mask.save(tmp_path / "masks" / "a.png")
    assert ImagesAndMasks(tmp_path).mask(0).unique().tolist() == [1]


def test_masks_and_boxes_of_shrunk_images(tmp_path):
    data = open_source(write(tmp_path), max_side=3)
    assert data[0][0].shape == (3, 2, 3)
    assert torch.equal(data.mask(0), open_source(tmp_path).mask(0)[1::2, 1::2])
    assert data.boxes(0).tolist() == [[0.5, 0, 1.5, 2]]


def test_masks_are_upright_as_images_are(tmp_path):
    write(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (4, 6)).save(tmp_path / "images" / "a.png", exif=exif)  # shown 6 x 4
    data = ImagesAndMasks(tmp_path)
    assert data.mask(0).shape == data[0][0].shape[1:] == (4, 6)


@pytest.mark.parametrize("missing", ["train.txt", "images", "masks"])
def test_a_missing_part_is_named_with_the_layout(tmp_path, missing):
    write(tmp_path)
    (tmp_path / missing).rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=rf"lacks {missing}.*expected images/NAME"):
        ImagesAndMasks(tmp_path)


def test_bad_contents_are_named(tmp_path):
    write(tmp_path)
    data = ImagesAndMasks(tmp_path)
    Image.new("L", (5, 4)).save(tmp_path / "masks" / "a.png")
    with pytest.raises(UnreadableImage, match=r"masks/a.png.*\[4, 5\].*images/a.png is \[4, 6\]"):
        data.mask(0)
    Image.new("CMYK", (6, 4)).save(tmp_path / "masks" / "a.png", "TIFF")
    with pytest.raises(UnreadableImage, match=r"grey .* or RGB, this one has mode CMYK"):
        data.mask(0)
    (tmp_path / "masks" / "b.png").unlink()
    with pytest.raises(UnreadableImage, match=r"b\.png"):
        data.mask(1)
    with pytest.raises(FileNotFoundError, match=r"no mask .*b\.png; 1 of 2 images have none"):
        ImagesAndMasks(tmp_path)
    Image.new("L", (6, 4)).save(tmp_path / "masks" / "b.png")
    (tmp_path / "annotations.json").write_text('{"classes": ["background"], "images": {}}')
    with pytest.raises(ValueError, match=r"names 1 class"):
        ImagesAndMasks(tmp_path)
    classes = '"classes": ["background", "cat"]'
    for images in ('["a"]', '{"a": 1}', '{"a": {"label": "1"}}'):
        (tmp_path / "annotations.json").write_text(f'{{{classes}, "images": {images}}}')
        with pytest.raises(ValueError, match=r"annotations.json is not \{"):
            ImagesAndMasks(tmp_path)
    (tmp_path / "annotations.json").write_text("[]")
    with pytest.raises(ValueError, match=r"annotations.json is not \{"):
        ImagesAndMasks(tmp_path)
    (tmp_path / "train.txt").write_text("a\nz\n")
    with pytest.raises(FileNotFoundError, match=r"train.txt names z"):
        ImagesAndMasks(tmp_path)


# --- what the values of masks mean ---------------------------------------------------------------

CLASSES = np.zeros((24, 24), np.int64)  # what every mask below shows: three bars
CLASSES[8:16], CLASSES[16:] = 1, 2
TWO = {"classes": ["background", "lung"]}
THREE = {"classes": ["background", "cat", "dog"]}
COLOURS = [[0, 0, 0], [128, 0, 0], [0, 128, 0]]


def write_masks(folder, mask, *, annotations=None, lists=True, count=6, ending=".png"):
    """``count`` images with the same mask, an array or a Pillow image."""
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    rng = np.random.default_rng(0)
    image = mask if isinstance(mask, Image.Image) else Image.fromarray(mask)
    for i in range(count):
        pixels = rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
        image.save(folder / "masks" / f"{i}{ending}")
    if lists:
        (folder / "train.txt").write_text("".join(f"{i}\n" for i in range(count // 2)))
        (folder / "val.txt").write_text("".join(f"{i}\n" for i in range(count // 2, count)))
    if annotations is not None:
        (folder / "annotations.json").write_text(json.dumps(annotations))
    return folder


def of_classes(*values):
    """Each class's value (or colour) where `CLASSES` has it."""
    return np.array(values)[CLASSES]


def grey(*values):
    return of_classes(*values).astype(np.uint8)


@pytest.mark.parametrize(
    ("mask", "annotations", "names", "numbers"),
    [
        (grey(0, 255, 0), None, ("background", "foreground"), (0, 1, 0)),
        (grey(0, 255, 0), {**TWO, "values": [0, 255]}, None, (0, 1, 0)),
        (grey(0, 255, 0), {**TWO, "values": [255, 0]}, None, (1, 0, 1)),
        (Image.fromarray(grey(0, 255, 0)).convert("1"), TWO, None, (0, 1, 0)),
        (grey(0, 1, 255), None, ("background", "foreground"), (0, 1, 255)),
        (grey(3, 9, 4), None, ("3", "4", "9"), (0, 2, 1)),
        (of_classes(0, 1000, 40_000).astype(np.uint16), None, ("0", "1000", "40000"), (0, 1, 2)),
        (of_classes(0, 1, 2).astype(np.uint16), THREE, None, (0, 1, 2)),
        (grey(0, 7, 9), {**TWO, "values": [0, 7], "ignore": [9]}, None, (0, 1, 255)),
        (grey(*COLOURS), {**THREE, "values": COLOURS}, None, (0, 1, 2)),
        (grey(*COLOURS), None, ("#000000", "#008000", "#800000"), (0, 2, 1)),
        (
            grey(*COLOURS),
            {**TWO, "values": COLOURS[:2], "ignore": COLOURS[2:]},
            None,
            (0, 1, 255),
        ),
        (np.repeat(grey(0, 255, 0)[..., None], 3, 2), None, None, (0, 1, 0)),
        (Image.fromarray(grey(0, 1, 2)).convert("LA"), THREE, None, (0, 1, 2)),
    ],
)
@pytest.mark.filterwarnings("ignore:there is no annotations.json")
def test_values_of_masks_become_classes(tmp_path, mask, annotations, names, numbers):
    data = ImagesAndMasks(write_masks(tmp_path, mask, annotations=annotations))
    if names is None:
        names = tuple((annotations or {"classes": ["background", "foreground"]})["classes"])
    assert data.mask_class_names == names
    assert data.mask(0).dtype == torch.uint8
    assert np.array_equal(data.mask(0).numpy(), of_classes(*numbers))
    assert data.num_classes == 0  # no image has a label
    assert data[0][1] == -1


def test_the_classes_that_were_found_are_told_once_they_are_asked_for(tmp_path):
    folder = write_masks(tmp_path, grey(0, 128, 255), lists=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train, test = (open_annotated(folder, split=split) for split in ("train", "test"))
        assert isinstance(train, Subset)  # training on the images reads no mask
        sides = [{side.name(i) for i in range(len(side))} for side in (train, test)]
        assert len(sides[0] | sides[1]) == 6
        assert not sides[0] & sides[1]
    with pytest.warns(UserWarning, match=r"6 masks in .* hold 2 classes, 0, 128; 255 is ignored"):
        assert train.mask_class_names == ("background", "foreground")


@pytest.mark.parametrize(
    ("mask", "annotations", "message"),
    [
        (
            of_classes(0, 1, 7),
            TWO,
            r"masks/0.png: 192 pixels hold 7, .*2 classes have 0, 1, and 255",
        ),
        (
            of_classes(0, 255, 9),
            {**TWO, "values": [0, 255]},
            "192 pixels hold 9, .* nothing is ign",
        ),
        (of_classes(*COLOURS), THREE, r'colour image, .*"values": \[\[0, 0, 0\]'),
        (of_classes(*COLOURS), {**TWO, "values": COLOURS[:2]}, "192 pixels hold #008000, which no"),
        (
            np.zeros((24, 20)),
            TWO,
            r"masks/0.png: it is \[24, 20\], but .*images/0.png is \[24, 24\]",
        ),
    ],
)
def test_masks_that_do_not_fit_are_named(tmp_path, mask, annotations, message):
    folder = write_masks(tmp_path, mask.astype(np.uint8), annotations=annotations)
    with pytest.raises(UnreadableImage, match=message):
        ImagesAndMasks(folder).mask(0)
    subject = Subject("none", torch.nn.Identity(), {"train": ImagesAndMasks(folder)}, {})
    found = type("Found", (), {"indices": torch.tensor([0])})
    with pytest.raises(ValueError, match=rf"mask of the train data cannot be used.*{message}"):
        subject.masks("train", found)


def test_a_transparent_mask_is_refused(tmp_path):
    mask = Image.new("RGBA", (24, 24), (0, 0, 0, 0))
    with pytest.raises(UnreadableImage, match="transparent"):
        ImagesAndMasks(write_masks(tmp_path, mask, annotations=TWO)).mask(0)


def test_masks_with_loss_are_refused(tmp_path):
    mask = grey(0, 255, 0)
    folder = write_masks(tmp_path / "a", mask, ending=".jpg")
    with pytest.raises(ValueError, match=r"0.jpg is not a mask: .*JPEG"):
        ImagesAndMasks(folder)
    folder = write_masks(tmp_path / "b", mask, annotations=TWO)
    Image.fromarray(mask).save(folder / "masks" / "0.png", "JPEG")  # whatever it is called
    with pytest.raises(UnreadableImage, match="it is a JPEG file"):
        ImagesAndMasks(folder).mask(0)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((24, 24), np.uint8), "6 masks in .* all hold 0: there are no classes"),
        (np.arange(576).reshape(24, 24).astype(np.uint16), "575 different values.* number objects"),
    ],
)
def test_masks_without_classes_are_refused(tmp_path, mask, message):
    with pytest.raises(ValueError, match=message):
        _ = ImagesAndMasks(write_masks(tmp_path, mask)).mask_class_names


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": [0]}, "gives 1 values to 2 classes"),
        ({"values": [0, 0]}, "all values must be different"),
        ({"values": [0, 3], "ignore": [3]}, "all values must be different"),
        ({"values": [0, -1]}, "-1 is neither a grey level nor a colour"),
        ({"values": [0, 1.5]}, "1.5 is neither a grey level nor a colour"),
        ({"values": [[0, 0, 0], [1, 2]]}, r"\[1, 2\] is not a colour"),
        ({"values": [0, [1, 2, 3]]}, "either all grey levels or all colours"),
        ({"classes": [str(c) for c in range(256)]}, "names 256 class"),
        ({"images": {"0": {"label": 2}}}, "labels 0 with 2, but there are 2 classes"),
        ({"images": {"0": {"boxes": [[1, 0, 0, 4]]}}}, "a box is"),
        ({"images": {"0": {"boxes": [[1, 4, 0, 2, 3]]}}}, "x0 < x1"),
        ({"images": {"0": {"boxes": [[2, 0, 0, 2, 3]]}}}, "a class c below 2"),
        ({"images": {"0": {"boxes": [[1, 0, 0, float("nan"), 3]]}}}, "a box is"),
    ],
)
def test_annotations_that_cannot_be_used(tmp_path, changes, message):
    mask = grey(0, 1, 0)
    with pytest.raises(ValueError, match=rf"annotations.json.*{message}"):
        ImagesAndMasks(write_masks(tmp_path, mask, annotations={**TWO, **changes}))


# --- masks that leave no two classes to compare --------------------------------------------------

PROTOCOLS = {
    "in-context": lambda subject: in_context.evaluate(subject, in_context.Options()),
    "linear-segmentation": lambda subject: linear_segmentation.evaluate(
        subject, linear_segmentation.Options(epochs=1)
    ),
    "overclustering": lambda subject: overclustering.evaluate(
        subject, overclustering.Options(num_clusters=(0,), seeds=(0,))
    ),
}


def segmented(folder):
    data = {split: open_source(folder, split=split) for split in ("train", "test")}
    encoder = backbones.create("sslkit_vit_micro", img_size=16)
    return Subject("micro", encoder, data, {}, global_size=16, dense_size=24)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_binary_masks_score_both_classes_or_nothing(tmp_path, name):
    mask = grey(0, 255, 0)
    folder = write_masks(tmp_path, mask, annotations=TWO)
    with (
        pytest.warns() if name != "overclustering" else warnings.catch_warnings(),
        pytest.raises(Unsuitable, match=r"lung \(1\); 33.3 % .*are 255.*\"values\": \[0, 255\]"),
    ):
        PROTOCOLS[name](segmented(folder))
    (folder / "annotations.json").write_text(json.dumps({**TWO, "values": [0, 255]}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outcome = PROTOCOLS[name](segmented(folder))
    score = next(iter(outcome.scores.values()))
    assert score.num_items == 3
    assert 0 < score.value < 1


@pytest.mark.parametrize("name", PROTOCOLS)
def test_classes_without_a_pixel_are_named(tmp_path, name):
    mask = grey(0, 2, 0)
    folder = write_masks(tmp_path, mask, annotations=THREE)
    with pytest.warns(UserWarning, match=r"masks have no pixel of 1 of the 3 classes: cat \(1\)"):
        PROTOCOLS[name](segmented(folder))
