"""The built-in scenes: the same everywhere, balanced, without short cuts, and with true labels."""

import colorsys
import subprocess
import sys
import zlib
from itertools import combinations

import numpy as np
import pytest
import torch

from sslkit.data.scene_layout import (
    CLASS_HUES,
    CLASS_NAMES,
    CLASS_TEXTURES,
    HUE_SPREAD,
    MIN_MAIN_VISIBLE,
    MIN_OTHER_VISIBLE,
    TYPICAL_HUE_SHARE,
    TYPICAL_TEXTURE_SHARE,
    Layout,
    SceneObject,
    draw_layout,
)
from sslkit.data.scene_shapes import SHAPES, inside
from sslkit.data.scene_textures import FAMILIES, draw_texture, paint
from sslkit.data.scenes import BULGE, Scene, Scenes

CHI_SQUARE_11_DF = 31.26  # exceeded with probability 0.001 by chance

SIZES = [(64, 64), (48, 80), (96, 40), (16, 16), (17, 131)]


def some_scenes(count: int = 25) -> list[Scene]:
    return [
        Scenes(count, size=size, seed=3).scene(i)
        for size in [(64, 64), (48, 80), (96, 40)]
        for i in range(count)
    ]


def main_object(layout: Layout) -> SceneObject:
    (item,) = (item for item in layout.objects if item.label == layout.label)
    return item


def assert_same(a: Scene, b: Scene) -> None:
    for name in Scene._fields:
        x, y = getattr(a, name), getattr(b, name)
        if isinstance(x, torch.Tensor):
            torch.testing.assert_close(x, y, rtol=0, atol=0)
        else:
            assert x == y, name


# --- a source ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_items_have_the_type_and_shape_of_a_source(size):
    scenes = Scenes(3, size=size)
    assert len(scenes) == 3
    assert scenes.num_classes == len(scenes.class_names) == len(set(scenes.class_names)) >= 10
    for image, label in [scenes[i] for i in range(3)]:
        assert image.shape == (3, *size)
        assert image.dtype == torch.uint8
        assert isinstance(label, int)
        assert 0 <= label < scenes.num_classes


@pytest.mark.parametrize("size", SIZES)
def test_ground_truth_has_the_image_s_size(size):
    scene = Scenes(1, size=size).scene(0)
    assert scene.mask.shape == scene.depth.shape == size
    assert (scene.mask.dtype, scene.depth.dtype) == (torch.int64, torch.float32)


def test_item_is_the_scene_s_image_and_label():
    scenes = Scenes(5)
    image, label = scenes[2]
    assert torch.equal(image, scenes.scene(2).image)
    assert label == scenes.scene(2).label


def test_it_iterates_and_counts_from_the_end():
    scenes = Scenes(4, size=(16, 16))
    images = [image for image, _ in scenes]
    assert len(images) == 4
    assert torch.equal(scenes[-1][0], images[3])
    assert scenes.name(-1) == scenes.name(3) == "scene 3 of seed 0"
    assert torch.equal(scenes[np.int64(3)][0], images[3])


@pytest.mark.parametrize("index", [4, -5])
def test_an_index_out_of_range_is_an_error(index):
    scenes = Scenes(4)
    for access in (scenes.__getitem__, scenes.scene, scenes.name):
        with pytest.raises(IndexError, match=f"scene {index} .*4"):
            access(index)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_images": 0}, "num_images must be at least 1, got 0"),
        ({"size": (0, 64)}, r"at least 16 pixels, got \(0, 64\)"),
        ({"size": (64, 15)}, r"at least 16 pixels, got \(64, 15\)"),
        ({"size": (3, 64, 64)}, r"size must be \(height, width\)"),
        ({"seed": -1}, "seed must be a non-negative integer, got -1"),
    ],
)
def test_bad_arguments_say_what_was_expected(arguments, message):
    with pytest.raises(ValueError, match=message):
        Scenes(**{"num_images": 4, **arguments})


# --- the same scene everywhere ----------------------------------------------------------------


def test_a_scene_depends_on_neither_order_nor_num_images():
    one, other = Scenes(10, seed=5), Scenes(10_000, seed=5)
    backwards = {i: other.scene(i) for i in reversed(range(10))}
    for i in range(10):
        assert_same(one.scene(i), backwards[i])


def test_a_scene_depends_on_no_process():
    code = (
        "import zlib; from sslkit.data.scenes import Scenes; d = Scenes(50, seed=7);"
        "print([zlib.crc32(d[i][0].numpy().tobytes()) for i in (41, 3, 12)])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    here = Scenes(42, seed=7)
    assert run.stdout.strip() == str(
        [zlib.crc32(here[i][0].numpy().tobytes()) for i in (41, 3, 12)]
    )


def test_a_scene_takes_no_part_in_the_global_random_state():
    np.random.seed(0)  # noqa: NPY002 - the global state is the point
    torch.manual_seed(0)
    first = Scenes(1).scene(0)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert_same(first, Scenes(1).scene(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_no_two_scenes_are_alike_within_or_across_seeds():
    # 2**32 is there because numpy pads short entropy with zeros: (0, 1) and 2**32 must not meet.
    images = {
        Scenes(40, size=(16, 16), seed=seed)[i][0].numpy().tobytes()
        for seed in (0, 1, 2, 2**32, 2**32 + 1)
        for i in range(40)
    }
    assert len(images) == 5 * 40


@pytest.mark.parametrize(("size", "factor"), [((40, 40), 2), ((40, 56), 3)])
def test_another_resolution_shows_the_same_scene(size, factor):
    small = Scenes(12, size=size)
    large = Scenes(12, size=(size[0] * factor, size[1] * factor))
    for i in range(12):
        a, b = small.scene(i), large.scene(i)
        assert a.label == b.label
        pooled = torch.nn.functional.avg_pool2d(b.image.double(), factor)
        # A point sample and a mean over `factor` ** 2 of them differ in fine texture.
        assert (pooled - a.image).abs().mean() < 8
        centres = b.mask[factor // 2 :: factor, factor // 2 :: factor]
        assert (centres != a.mask).double().mean() < (0.05 if factor % 2 == 0 else 1e-9)
        for near, far in zip(a.keypoints, b.keypoints, strict=True):
            assert near[:2] == far[:2]
            assert near.visible == far.visible
            assert (near.x * factor, near.y * factor) == pytest.approx((far.x, far.y))


# --- no short cut -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def layouts() -> list[Layout]:
    return [draw_layout(np.random.default_rng(i), 1.6, 1.0) for i in range(2400)]


def test_labels_are_uniform(layouts):
    counts = np.bincount([layout.label for layout in layouts], minlength=len(CLASS_NAMES))
    expected = len(layouts) / len(CLASS_NAMES)
    assert ((counts - expected) ** 2 / expected).sum() < CHI_SQUARE_11_DF


NOT_OF_THE_CLASS = {
    "place": lambda layout: main_object(layout).centre,
    "ground": lambda layout: layout.ground.texture.colours.ravel(),
    "light": lambda layout: layout.light.tint,
    "haze": lambda layout: layout.light.haze,
}


@pytest.mark.parametrize("what", NOT_OF_THE_CLASS)
def test_class_does_not_show_in(what, layouts):
    labels = np.array([layout.label for layout in layouts])
    values = np.array([NOT_OF_THE_CLASS[what](layout) for layout in layouts])
    for k in range(len(CLASS_NAMES)):
        members = values[labels == k]
        error = values.std(axis=0) / np.sqrt(len(members))
        # 4.5 standard errors: 24 to 72 comparisons by chance exceed it once in 2000 runs.
        np.testing.assert_array_less(
            np.abs(members.mean(axis=0) - values.mean(axis=0)), 4.5 * error
        )


def test_a_class_usually_has_its_hue_and_its_texture(layouts):
    of_its_hue = of_its_texture = 0
    for layout in layouts:
        item, name = main_object(layout), CLASS_NAMES[layout.label]
        hue, _, _ = colorsys.rgb_to_hsv(*item.texture.colours[1])
        of_its_hue += abs((hue - CLASS_HUES[name] + 0.5) % 1 - 0.5) < 3 * HUE_SPREAD
        of_its_texture += item.texture.family == CLASS_TEXTURES[name]
    # A hue drawn from all of them lies within 3 spreads of any by chance, a texture is 1 of 12.
    hue_share = TYPICAL_HUE_SHARE + (1 - TYPICAL_HUE_SHARE) * 6 * HUE_SPREAD
    texture_share = TYPICAL_TEXTURE_SHARE + (1 - TYPICAL_TEXTURE_SHARE) / 12
    assert of_its_hue / len(layouts) == pytest.approx(hue_share, abs=0.03)  # 3.8 standard errors
    assert of_its_texture / len(layouts) == pytest.approx(texture_share, abs=0.025)


def test_objects_lie_all_over_the_image(layouts):
    centres = np.array([main_object(layout).centre / [1.6, 1.0] for layout in layouts])
    np.testing.assert_allclose(centres.mean(axis=0), 0.5, atol=0.02)
    assert (centres.std(axis=0) > 0.1).all()


# --- true ground truth ------------------------------------------------------------------------


def test_the_main_object_has_the_largest_visible_area():
    for scene in some_scenes():
        areas = {b.label: int((scene.mask == b.label + 1).sum()) for b in scene.boxes}
        assert max(areas, key=areas.__getitem__) == scene.label


def test_boxes_are_tight_around_the_visible_pixels_of_distinct_objects():
    for scene in some_scenes():
        assert sorted(b.label + 1 for b in scene.boxes) == scene.mask.unique()[1:].tolist()
        for label, x0, y0, x1, y1 in scene.boxes:
            visible = scene.mask == label + 1
            assert visible[y0:y1, x0:x1].sum() == visible.sum()
            for side in (
                visible[y0, x0:x1],
                visible[y1 - 1, x0:x1],
                visible[y0:y1, x0],
                visible[y0:y1, x1 - 1],
            ):
                assert side.any()


def test_objects_are_nearer_than_the_ground_and_boxes_go_from_far_to_near():
    for scene in some_scenes():
        ground = scene.depth[scene.mask == 0]
        assert ground.min() > 5 - 1e-4
        assert ground.max() < 13
        ranges = [scene.depth[scene.mask == b.label + 1] for b in scene.boxes]
        assert all(d.max() - d.min() <= BULGE + 1e-6 for d in ranges)
        for far, near in zip([ground, *ranges], ranges, strict=False):
            assert near.max() < far.min()


def test_the_ground_is_a_plane_seen_in_perspective():
    for scene in some_scenes(5):
        inverse = 1 / scene.depth.double()
        rows, columns = torch.nonzero(scene.mask == 0, as_tuple=True)
        design = torch.stack([torch.ones_like(rows), rows, columns], dim=1).double()
        target = inverse[rows, columns, None]
        residual = design @ torch.linalg.lstsq(design, target).solution - target
        assert residual.abs().max() < 1e-6


def around(point, mask):
    """The mask in the 5 x 5 pixels about a key point: a tip is thinner than a pixel at its end."""
    row, column = int(point.y), int(point.x)
    return mask[max(row - 2, 0) : row + 3, max(column - 2, 0) : column + 3]


def test_keypoints_are_those_of_the_boxes_objects():
    for scene in some_scenes():
        expected = [
            (b.label, name) for b in scene.boxes for name in SHAPES[CLASS_NAMES[b.label]].keypoints
        ]
        assert [(p.label, p.name) for p in scene.keypoints] == expected


def test_a_keypoint_is_visible_where_its_object_is():
    seen = hidden = 0
    for scene in some_scenes():
        height, width = scene.mask.shape
        order = {0: -1} | {b.label + 1: rank for rank, b in enumerate(scene.boxes)}
        for point in scene.keypoints:
            within = 0 <= point.x < width and 0 <= point.y < height
            if point.visible:
                assert within
                assert (around(point, scene.mask) == point.label + 1).any(), point
                seen += 1
            elif within:
                covers = [order[int(c)] for c in around(point, scene.mask).unique()]
                assert max(covers) > order[point.label + 1], point
                hidden += 1
    assert seen > 500
    assert hidden > 20


@pytest.mark.parametrize("aspect", [(1.0, 1.0), (2.5, 1.0)])
def test_layout_keeps_its_bounds_on_occlusion(aspect):
    """Shares counted anew on a grid that goes past the border, where the layout uses samples."""
    width, height = aspect
    x = np.arange(-0.5, width + 0.5, 0.02)[None]
    y = np.arange(-0.5, height + 0.5, 0.02)[:, None]
    within = (x > 0) & (x < width) & (y > 0) & (y < height)
    sampling_error = 0.05
    num_objects = set()
    for seed in range(400):
        layout = draw_layout(np.random.default_rng(seed), width, height)
        num_objects.add(len(layout.objects))
        insides = [item.distance(x, y) < 0 for item in layout.objects]
        areas = {}
        covered = ~within
        for item, silhouette in reversed(list(zip(layout.objects, insides, strict=True))):
            areas[item.label] = (silhouette & ~covered).sum()
            bound = MIN_MAIN_VISIBLE if item.label == layout.label else MIN_OTHER_VISIBLE
            assert areas[item.label] >= (bound - sampling_error) * silhouette.sum()
            covered |= silhouette
        assert max(areas, key=areas.__getitem__) == layout.label
        assert all(a.depth > b.depth + BULGE for a, b in combinations(layout.objects, 2))
    assert num_objects == {1, 2, 3}


# --- shapes and textures ----------------------------------------------------------------------


def test_every_class_has_a_texture_family_of_its_own():
    assert tuple(CLASS_TEXTURES) == CLASS_NAMES
    assert sorted(CLASS_TEXTURES.values()) == sorted(FAMILIES)


@pytest.mark.parametrize("name", SHAPES)
def test_shape_is_of_one_size_with_its_keypoints_inside(name):
    shape = SHAPES[name]
    points = np.array(list(shape.keypoints.values())).T
    assert (shape.distance(*points) < 0).all()
    radius = np.hypot(*inside(name).points)
    assert 0.9 < radius.max() < 1.25
    assert 1.1 < inside(name).area < np.pi + 0.05
    rim = np.random.default_rng(0).uniform(1.3, 3, size=20)
    angle = np.linspace(0, 2 * np.pi, 20)
    assert (shape.distance(rim * np.cos(angle), rim * np.sin(angle)) > 0).all()


@pytest.mark.parametrize("name", SHAPES)
def test_shape_distance_is_true_at_the_outline(name):
    """Where a fine grid changes sign, the distance rises by about one a unit: smooth edges."""
    step = 0.01
    axis = np.arange(-1.3, 1.3, step)
    x, y = np.meshgrid(axis, axis)
    distance = SHAPES[name].distance(x, y)
    slope = np.hypot(*np.gradient(distance, step))
    at_outline = slope[np.abs(distance) < step]
    assert 0.7 < np.median(at_outline) < 1.3


@pytest.mark.parametrize("name", [n for n in SHAPES if 0 < SHAPES[n].rotation < np.pi])
def test_shape_looks_the_same_after_twice_its_rotation(name):
    x, y = np.random.default_rng(0).uniform(-1.1, 1.1, size=(2, 500))
    turn = 2 * SHAPES[name].rotation
    turned = np.cos(turn) * x - np.sin(turn) * y, np.sin(turn) * x + np.cos(turn) * y
    np.testing.assert_allclose(
        SHAPES[name].distance(*turned), SHAPES[name].distance(x, y), atol=1e-6
    )


def test_area_of_known_shapes():
    assert inside("disc").area == pytest.approx(np.pi, rel=0.01)
    assert inside("ring").area == pytest.approx(np.pi * (1 - 0.52**2), rel=0.01)
    assert inside("triangle").area == pytest.approx(0.75 * np.sqrt(3), rel=0.01)
    assert inside("square").area == pytest.approx(1.7**2, rel=0.01)


@pytest.mark.parametrize("family", FAMILIES)
def test_texture_stays_between_its_colours_and_uses_their_range(family):
    colours = np.array([[0.2, 0.9, 0.5], [0.8, 0.1, 0.5]])
    texture = draw_texture(np.random.default_rng(0), family, frequency=6, colours=colours)
    x = np.linspace(-1, 1, 200, dtype=np.float32)[None]
    y = np.linspace(-1, 1, 150, dtype=np.float32)[:, None]
    image = paint(texture, x, y)
    assert image.shape == (3, 150, 200)
    assert image.dtype == np.float32
    low, high = colours.min(axis=0)[:, None, None], colours.max(axis=0)[:, None, None]
    assert (image >= low - 1e-6).all()
    assert (image <= high + 1e-6).all()
    assert np.ptp(image[0]) > 0.45
    assert image[0].std() > 0.1
