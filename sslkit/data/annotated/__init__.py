"""Images with annotations: masks, boxes, depth, key points. A data set a file."""

from sslkit.data.annotated.ade20k import ADE20K
from sslkit.data.annotated.annotated_source import Boxed, KeypointPair, Paired, Segmented, WithDepth
from sslkit.data.annotated.coco import COCOStuff, COCOThings
from sslkit.data.annotated.image_masks import ImagesAndMasks
from sslkit.data.annotated.nyu_depth import NYUDepthFile, NYUDepthFolder, open_nyu_depth
from sslkit.data.annotated.open import open_annotated
from sslkit.data.annotated.openood import ImageList, ListFile, OODLists, find_ood_lists
from sslkit.data.annotated.pascal_voc import VOCBoxes, VOCSegmentation
from sslkit.data.annotated.spair import SPair

__all__ = [
    "ADE20K",
    "Boxed",
    "COCOStuff",
    "COCOThings",
    "ImageList",
    "ImagesAndMasks",
    "KeypointPair",
    "ListFile",
    "NYUDepthFile",
    "NYUDepthFolder",
    "OODLists",
    "Paired",
    "SPair",
    "Segmented",
    "VOCBoxes",
    "VOCSegmentation",
    "WithDepth",
    "find_ood_lists",
    "open_annotated",
    "open_nyu_depth",
]
