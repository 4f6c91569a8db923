"""Public data sets in miniature, in the format that their archives have on disk."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

SIZES = [(6, 8), (5, 4), (7, 7)]
"""(height, width) of the images of a set."""


def write_image(path: Path, size: tuple[int, int], seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(path)


def write_grey(path: Path, mask: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask).save(path)


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def random_mask(size: tuple[int, int], values: list[int], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).choice(np.array(values, np.uint8), size)


# --- Pascal VOC ----------------------------------------------------------------------------------


def voc_palette() -> list[int]:
    """The development kit's colour map: bits of the index, dealt to red, green and blue."""
    palette = []
    for index in range(256):
        colour = [0, 0, 0]
        for bit in range(8):
            colour[bit % 3] |= (index >> bit & 1) << (7 - bit // 3)
        palette += colour
    return palette


def voc_mask(i: int) -> np.ndarray:
    return random_mask(SIZES[i], [0, 1, 15, 20, 255], seed=i)


VOC_XML = """<annotation>
	<folder>VOC2012</folder>
	<filename>{name}.jpg</filename>
	<source>
		<database>The VOC2007 Database</database>
		<annotation>PASCAL VOC2007</annotation>
		<image>flickr</image>
	</source>
	<size>
		<width>{width}</width>
		<height>{height}</height>
		<depth>3</depth>
	</size>
	<segmented>1</segmented>{objects}
</annotation>
"""
VOC_OBJECT = """
	<object>
		<name>{name}</name>
		<pose>Unspecified</pose>
		<truncated>{truncated}</truncated>
		<difficult>{difficult}</difficult>
		<bndbox>
			<xmin>{x0}</xmin>
			<ymin>{y0}</ymin>
			<xmax>{x1}</xmax>
			<ymax>{y1}</ymax>
		</bndbox>
		<part>
			<name>head</name>
			<bndbox>
				<xmin>2</xmin>
				<ymin>2</ymin>
				<xmax>3</xmax>
				<ymax>3</ymax>
			</bndbox>
		</part>
	</object>"""

# Name, truncated, difficult and the box of the file: from 1, inclusive.
VOC_OBJECTS = [
    [("person", 0, 0, (1, 1, 8, 6)), ("dog", 1, 0, (3, 2, 3, 2)), ("dog", 0, 1, (2, 3, 5, 6))],
    [("cat", 1, 1, (1, 2, "3.5", "4.25"))],
    [],
]


def write_voc(root: Path) -> Path:
    """Three images: two to train, the last to validate; returns VOCdevkit/VOC2012."""
    year = root / "VOCdevkit" / "VOC2012"
    names = ["2007_000032", "2007_000039", "2008_000123"]
    lists = {"train": names[:2], "val": names[2:], "trainval": names}
    for kind in ("Segmentation", "Main"):
        for split, members in lists.items():
            write_text(year / "ImageSets" / kind / f"{split}.txt", "\n".join(members) + "\n")
    write_text(year / "ImageSets" / "Segmentation" / "trainaug.txt", names[1] + "\n")
    for i, name in enumerate(names):
        write_image(year / "JPEGImages" / f"{name}.jpg", SIZES[i], seed=i)
        mask = Image.fromarray(voc_mask(i), "P")
        mask.putpalette(voc_palette())
        path = year / "SegmentationClass" / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        mask.save(path)
        write_grey(year / "SegmentationClassAug" / f"{name}.png", np.full(SIZES[i], i, np.uint8))
        objects = ""
        for each, truncated, difficult, (x0, y0, x1, y1) in VOC_OBJECTS[i]:
            objects += VOC_OBJECT.format(
                name=each, truncated=truncated, difficult=difficult, x0=x0, y0=y0, x1=x1, y1=y1
            )
        height, width = SIZES[i]
        xml = VOC_XML.format(name=name, width=width, height=height, objects=objects)
        write_text(year / "Annotations" / f"{name}.xml", xml)
    return year


# --- ADE20K --------------------------------------------------------------------------------------


def ade_mask(i: int) -> np.ndarray:
    """Values as in the file: 0 is no class."""
    return random_mask(SIZES[i], [0, 1, 2, 150], seed=10 + i)


def write_ade20k(root: Path) -> Path:
    """Two images to train, one to validate; returns ADEChallengeData2016."""
    root = root / "ADEChallengeData2016"
    places = [("training", "ADE_train_00000001"), ("training", "ADE_train_00000002")]
    places.append(("validation", "ADE_val_00000001"))
    for i, (split, name) in enumerate(places):
        write_image(root / "images" / split / f"{name}.jpg", SIZES[i], seed=i)
        write_grey(root / "annotations" / split / f"{name}.png", ade_mask(i))
    rows = ["Idx\tRatio\tTrain\tVal\tName", "1\t0.1576\t11664\t1172\twall"]
    rows += ["2\t0.1072\t6046\t612\tbuilding, edifice", "3 \t0.0878\t8265\t796\tsky "]
    rows += [f"{i}\t0.0001\t10\t1\tthing {i}, synonym" for i in range(4, 151)]
    write_text(root / "objectInfo150.txt", "\n".join(rows) + "\n")
    scenes = ["ADE_train_00000001 street", "ADE_train_00000002 airport_terminal"]
    scenes += ["ADE_val_00000001 street", "ADE_val_00000002 bathroom"]
    write_text(root / "sceneCategories.txt", "\n".join(scenes) + "\n")
    return root


# --- COCO ----------------------------------------------------------------------------------------

COCO_NAMES = ["000000000139", "000000000285", "000000000632"]
COCO_CATEGORIES = [
    {"supercategory": "vehicle", "id": 3, "name": "car"},
    {"supercategory": "person", "id": 1, "name": "person"},
    {"supercategory": "animal", "id": 17, "name": "cat"},
    {"supercategory": "animal", "id": 18, "name": "dog"},
]


def coco_map(i: int) -> np.ndarray:
    return random_mask(SIZES[i], [0, 2, 90, 91, 119, 181, 255], seed=20 + i)


def coco_annotation(image: int, category: int, box: list, segmentation, crowd: int = 0) -> dict:
    return {
        "segmentation": segmentation,
        "area": box[2] * box[3],
        "iscrowd": crowd,
        "image_id": int(COCO_NAMES[image]),
        "bbox": box,
        "category_id": category,
        "id": 1000 * image + category,
    }


def rectangle(x0: float, y0: float, x1: float, y1: float) -> list[float]:
    return [x0, y0, x1, y0, x1, y1, x0, y1]


def coco_annotations() -> list[dict]:
    """Image 0: a dog's box over a crowd and before a person; image 1: two cats; image 2: none."""
    height, width = SIZES[0]
    crowd = {"size": [height, width], "counts": [0, 3 * height, (width - 3) * height]}
    return [
        coco_annotation(0, 18, [2, 1, 2, 3], [rectangle(2, 1, 4, 4)]),
        coco_annotation(0, 1, [1, 0, 5, 5], [rectangle(1, 0, 6, 5)]),
        coco_annotation(0, 3, [0, 0, 3, height], crowd, crowd=1),
        coco_annotation(1, 17, [0.5, 0, 1.5, 2], [rectangle(0.5, 0, 2, 2)]),
        coco_annotation(1, 17, [2, 3, 1, 1], [rectangle(2, 3, 3, 4)]),
    ]


def write_coco(root: Path, *, split: str = "val", images: str = "", maps: str = "stuffthingmaps"):
    """Three images of one split, with pixel maps and instances."""
    entries = []
    for i, name in enumerate(COCO_NAMES):
        write_image(root / images / f"{split}2017" / f"{name}.jpg", SIZES[i], seed=i)
        write_grey(root / maps / f"{split}2017" / f"{name}.png", coco_map(i))
        height, width = SIZES[i]
        entry = {"file_name": f"{name}.jpg", "height": height, "width": width, "id": int(name)}
        entries.append({"license": 3, "date_captured": "2013-11-21 01:34:01", **entry})
    content = {
        "info": {"description": "COCO 2017 Dataset", "year": 2017},
        "licenses": [],
        "images": entries[::-1],
        "annotations": coco_annotations(),
        "categories": COCO_CATEGORIES,
    }
    write_text(root / "annotations" / f"instances_{split}2017.json", json.dumps(content))
    return root


# --- SPair-71k -----------------------------------------------------------------------------------

SPAIR_PAIR = {
    "filename": "000001-2008_002719-2008_004100:aeroplane",
    "src_imname": "2008_002719.jpg",
    "trg_imname": "2008_004100.jpg",
    "src_imsize": [8, 6, 3],
    "trg_imsize": [4, 5, 3],
    "src_bndbox": [1, 1, 7, 5],
    "trg_bndbox": [0, 1, 3, 5],
    "category": "aeroplane",
    "src_pose": "Unspecified",
    "trg_pose": "Unspecified",
    "src_kps": [[2, 1], [5, 3], [7, 4]],
    "trg_kps": [[0, 1], [1, 4], [3, 2]],
    "kps_ids": ["0", "7", "11"],
    "mirror": 0,
    "viewpoint_variation": 2,
    "scale_variation": 0,
    "truncation": 2,
    "occlusion": 1,
    "pair_id": 1,
}


def write_spair(root: Path) -> Path:
    """A pair to train, and its reverse to test; returns SPair-71k."""
    root = root / "SPair-71k"
    for i, name in enumerate(["2008_002719", "2008_004100"]):
        write_image(root / "JPEGImages" / "aeroplane" / f"{name}.jpg", SIZES[i], seed=i)
        write_text(root / "ImageAnnotation" / "aeroplane" / f"{name}.json", "{}")
    swapped = {}
    for key, value in SPAIR_PAIR.items():
        side = {"src": "trg", "trg": "src"}.get(key[:3], key[:3])
        swapped[side + key[3:]] = value
    swapped |= {"filename": "000001-2008_004100-2008_002719:aeroplane", "viewpoint_variation": 0}
    for split, pair in (("trn", SPAIR_PAIR), ("test", swapped)):
        write_text(root / "Layout" / "large" / f"{split}.txt", f"{pair['filename']}\n")
        path = root / "PairAnnotation" / split / f"{pair['filename']}.json"
        write_text(path, json.dumps(pair))
    return root


# --- NYU Depth V2 --------------------------------------------------------------------------------

NYU_SCENES = ["kitchen", "bedroom", "kitchen", "office"]


def nyu_arrays(size: tuple[int, int] = (480, 640)) -> tuple[np.ndarray, np.ndarray]:
    """Images [N, h, w, 3] and depths [N, h, w] in metres, of each scene."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (len(NYU_SCENES), *size, 3), np.uint8)
    return images, generator.uniform(0.7, 9.9, (len(NYU_SCENES), *size)).astype(np.float32)


def write_nyu_file(root: Path, *, size: tuple[int, int] = (480, 640)) -> Path:
    """Images 1 and 3 to test, 2 and 4 to train; as MATLAB writes it: HDF5, axes reversed."""
    import h5py
    from scipy.io import savemat

    images, depths = nyu_arrays(size)
    root.mkdir(parents=True, exist_ok=True)
    path = root / "nyu_depth_v2_labeled.mat"
    with h5py.File(path, "w", userblock_size=512) as file:
        file.create_dataset("images", data=images.transpose(0, 3, 2, 1), compression="gzip")
        file.create_dataset("depths", data=depths.transpose(0, 2, 1))
        file.create_dataset("rawDepths", data=depths.transpose(0, 2, 1))
        scenes = file.create_dataset("sceneTypes", (1, len(NYU_SCENES)), dtype=h5py.ref_dtype)
        for i, scene in enumerate(NYU_SCENES):
            codes = np.array([[ord(character)] for character in scene], np.uint16)
            scenes[0, i] = file.create_dataset(f"#refs#/{i}", data=codes).ref
    with open(path, "r+b") as block:
        block.write(b"MATLAB 7.3 MAT-file, Platform: GLNXA64, HDF5 schema 0.5 .".ljust(116))
    splits = {"trainNdxs": np.array([[2.0], [4.0]]), "testNdxs": np.array([[1.0], [3.0]])}
    savemat(root / "splits.mat", splits)
    return path


def write_nyu_folder(root: Path, *, size: tuple[int, int] = (480, 640)) -> Path:
    """The same split as folders; returns the folder of train and test."""
    images, depths = nyu_arrays(size)
    for i, scene in enumerate(NYU_SCENES):
        folder = root / ("test" if i % 2 == 0 else "train") / scene
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[i]).save(folder / f"rgb_{i:05d}.jpg")
        millimetres = (depths[i] * 1000).astype(np.uint16)
        Image.fromarray(millimetres).save(folder / f"sync_depth_{i:05d}.png")
    return root


# --- OpenOOD -------------------------------------------------------------------------------------


def write_openood(root: Path) -> Path:
    """CIFAR-10's lists, two images each."""
    for name, classes in [
        *[("train_cifar10", (0, 9)), ("val_cifar10", (1, 1)), ("test_cifar10", (3, 8))],
        *[(f"test_{other}", (-1, -1)) for other in ("cifar100", "tin", "mnist", "svhn")],
        *[(f"test_{other}", (-1, -1)) for other in ("texture", "places365")],
    ]:
        split, folder = name.split("_", 1)
        files = [f"{folder}/{split}/{i:04d}.png" for i in range(len(classes))]
        lines = [f"{file} {label}" for file, label in zip(files, classes, strict=True)]
        write_text(root / "benchmark_imglist" / "cifar10" / f"{name}.txt", "\n".join(lines) + "\n")
        for i, file in enumerate(files):
            write_image(root / "images_classic" / file, (4, 4), seed=i)
    (root / "images_largescale").mkdir()
    return root
