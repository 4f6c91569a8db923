"""SPair-71k: pairs of images of one category with corresponding key points.

The format: Min et al. 2019, SPair-71k: A Large-scale Benchmark for Semantic Correspondence
(arXiv 1908.10543), and the development kit in its archive. ``Layout/large/test.txt`` lists the
pairs, one ``000001-2008_002719-2008_004100:aeroplane`` a line; ``PairAnnotation/test`` has a JSON
file for each.
"""

import os
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sslkit.data.annotated.annotated_files import (
    check_files,
    check_layout,
    image_sizes,
    read_json,
    read_names,
)
from sslkit.data.annotated.annotated_source import KeypointPair
from sslkit.data.annotated.boxes import check_boxes, is_numbers
from sslkit.data.decode import MAX_SIDE, read_image
from sslkit.data.labels import as_label
from sslkit.data.string_table import StringTable

_TREE = """\
  SPair-71k/
    JPEGImages/CATEGORY/NAME.jpg
    Layout/large/{trn,val,test}.txt
    PairAnnotation/{trn,val,test}/NUMBER-NAME-NAME:CATEGORY.json"""


class SPair:
    """SPair-71k. Key points are those that both images show.

    Coordinates are as in the files: (x, y) in pixels. The box is (x0, y0, x1, y1), whose larger
    side, ``max(x1 - x0, y1 - y0)``, the benchmark measures errors against.

    Args:
        folder: ``SPair-71k`` or its parent.
        split: the benchmark's: trn (53,340 pairs), val (5,384), test (12,234).
        max_side: see :func:`sslkit.data.decode.read_image`.

    Raises:
        FileNotFoundError: a part of the layout or the annotation of a pair is missing.
        ValueError: on access, an annotation that cannot be used, with the reason.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        split: Literal["trn", "val", "test"] = "test",
        max_side: int = MAX_SIDE,
    ):
        root = Path(folder)
        if (root / "SPair-71k").is_dir():
            root = root / "SPair-71k"
        layout = f"Layout/large/{split}.txt"
        check_layout(root, ["JPEGImages", layout, f"PairAnnotation/{split}"], _TREE)
        names = read_names(root / layout)
        self.folder = root
        self.split = split
        self.max_side = max_side
        check_files(root / "PairAnnotation" / split, [f"{name}.json" for name in names], "pair")
        self._names = StringTable(names)

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        """The path of the pair's annotation."""
        return str(self.folder / "PairAnnotation" / self.split / f"{self._names[index]}.json")

    def pair(self, index: int) -> KeypointPair:
        """Pair number ``index``."""
        path = Path(self.name(index))
        try:
            fields = read_json(path)
            category = _file_name(fields["category"])
            source_name, target_name = (
                str(self.folder / "JPEGImages" / category / _file_name(fields[key]))
                for key in ("src_imname", "trg_imname")
            )
            source_points, target_points = _points(fields["src_kps"]), _points(fields["trg_kps"])
            viewpoint_difference = as_label(fields["viewpoint_variation"], num_classes=3)
            if len(source_points) != len(target_points):
                raise ValueError(
                    f"it has {len(source_points)} source and {len(target_points)} target key points"
                )
            box = fields["trg_bndbox"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} is not an annotation of SPair-71k: {type(error).__name__}: {error}"
            ) from error
        check_boxes([box], image_sizes(target_name, self.max_side)[0], f"{path}, {target_name}")
        target_box = torch.tensor(box, dtype=torch.float32)
        source_scale, target_scale = self._scale(source_name), self._scale(target_name)
        return KeypointPair(
            source_image=read_image(source_name, max_side=self.max_side),
            target_image=read_image(target_name, max_side=self.max_side),
            source_keypoints=source_points * source_scale,
            target_keypoints=target_points * target_scale,
            target_box=target_box * target_scale.repeat(2),
            category=category,
            viewpoint_difference=viewpoint_difference,
            source_name=source_name,
            target_name=target_name,
        )

    def _scale(self, path: str) -> Tensor:
        """(x, y) of a point in the image that is read, for that in the file: [2]."""
        (stored_height, stored_width), (height, width) = image_sizes(path, self.max_side)
        return torch.tensor([width / stored_width, height / stored_height])


def _points(points: Any) -> Tensor:
    """Finite (x, y), float32 [n, 2]."""
    if not isinstance(points, list) or not all(is_numbers(each, 2) for each in points):
        raise ValueError("key points that are not pairs (x, y) of finite numbers")
    return torch.tensor(points, dtype=torch.float32).view(-1, 2)


def _file_name(name: Any) -> str:
    if not isinstance(name, str) or not name or Path(name).name != name:
        raise ValueError(f"{name!r} is not the name of a file")
    return name
