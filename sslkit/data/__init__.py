"""Images for training and evaluation: sources, multi-crop views, a resumable loader."""

from sslkit.data.crops import Crops, MultiCrop
from sslkit.data.decode import UnreadableImage, decode_image, read_image
from sslkit.data.hugging_face import HuggingFaceImages, HuggingFaceStream, open_stream
from sslkit.data.image_array import ImageArray
from sslkit.data.image_folder import ImageFolder
from sslkit.data.image_source import Source, StreamSource, item_key, known_labels
from sslkit.data.loader import MultiCropDataset, make_loader
from sslkit.data.normalisation import IMAGENET_MEAN, IMAGENET_STD
from sslkit.data.sample_stream import SampleStream
from sslkit.data.samples import Batch, collate
from sslkit.data.scenes import Scene, Scenes
from sslkit.data.seeds import sample_seed
from sslkit.data.shards import TarShards, make_shards
from sslkit.data.sources import open_source
from sslkit.data.splits import Subset, train_test_split
from sslkit.data.torchvision_images import TorchvisionImages
from sslkit.data.unreadable import TooManyUnreadable, UnreadableLog, UnusableData

__all__ = [
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "Batch",
    "Crops",
    "HuggingFaceImages",
    "HuggingFaceStream",
    "ImageArray",
    "ImageFolder",
    "MultiCrop",
    "MultiCropDataset",
    "SampleStream",
    "Scene",
    "Scenes",
    "Source",
    "StreamSource",
    "Subset",
    "TarShards",
    "TooManyUnreadable",
    "TorchvisionImages",
    "UnreadableImage",
    "UnreadableLog",
    "UnusableData",
    "collate",
    "decode_image",
    "item_key",
    "known_labels",
    "make_loader",
    "make_shards",
    "open_source",
    "open_stream",
    "read_image",
    "sample_seed",
    "train_test_split",
]
