"""Files that annotate an image, such as its mask, told from images by their names."""

import re
from collections.abc import Container, Iterable

_WORDS = """
annotation annotations depth disparity groundtruth gt instance instances label labelids labels mask
masks matte normal normals panoptic seg segm segmentation semantic trimap
"""
WORDS = frozenset(_WORDS.split())
"""What the last part of an annotation's name is: ``7.mask.png``, ``7_seg.png``."""

_IMAGES = frozenset(["image", "images", "img", "imgs", "rgb"])
_LAST_WORD = re.compile(r"(?:(.*)[._-])?([A-Za-z]+)", re.DOTALL)


def is_annotation(stem: str, beside: Container[str] | None = None) -> bool:
    """Whether a file is an annotation by its name without the extension.

    Args:
        stem: the name.
        beside: names of the files beside it. The annotated image must be among them; None: any.

    >>> is_annotation("7.mask"), is_annotation("7_mask", beside=["7"]), is_annotation("7_cat")
    (True, True, False)
    """
    match = _LAST_WORD.fullmatch(stem)
    if match is None or match[2].lower() not in WORDS:
        return False
    return beside is None or (match[1] is not None and match[1] in beside)


def are_images_and_annotations(folders: Iterable[str]) -> bool:
    """Whether folders are those of images and of their annotations, such as images and masks.

    >>> are_images_and_annotations(["images", "masks"]), are_images_and_annotations(["mask", "cap"])
    (True, False)
    """
    names = {name.lower() for name in folders}
    return bool(names & _IMAGES) and bool(names & WORDS) and names <= _IMAGES | WORDS
