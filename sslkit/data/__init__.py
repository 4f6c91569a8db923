"""Images for training and evaluation: sources, multi-crop views, a resumable loader."""

from sslkit.data.crops import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Crops,
    MultiCrop,
)
from sslkit.data.decode import UnreadableImage, read_image
from sslkit.data.loader import (
    Batch,
    MultiCropDataset,
    SampleStream,
    UnreadableLog,
    collate,
    make_loader,
)
from sslkit.data.scenes import Scene, Scenes
from sslkit.data.seeds import sample_seed
from sslkit.data.sources import (
    ImageArray,
    ImageFolder,
    Source,
    Subset,
    TorchvisionImages,
    open_source,
    train_test_split,
)

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Batch",
    "Crops",
    "ImageArray",
    "ImageFolder",
    "MultiCrop",
    "MultiCropDataset",
    "SampleStream",
    "Scene",
    "Scenes",
    "Source",
    "Subset",
    "TorchvisionImages",
    "UnreadableImage",
    "UnreadableLog",
    "collate",
    "make_loader",
    "open_source",
    "read_image",
    "sample_seed",
    "train_test_split",
]
