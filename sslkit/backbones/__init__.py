"""Vision Transformers as masked, multi-crop token encoders, and convolutional networks beside them.

A token encoder is any module with ``forward(images, masks=None) -> Tokens`` and
``forward_many(images, masks=None) -> list[Tokens]``.
"""

from sslkit.backbones.cnn import CNNEncoder, create_cnn, load_cnn, save_cnn
from sslkit.backbones.encoder import ViTEncoder
from sslkit.backbones.encoder_file import read_metadata, save
from sslkit.backbones.factory import create
from sslkit.backbones.load_report import LoadReport
from sslkit.backbones.pretrained import Pretrained, load, load_pretrained
from sslkit.backbones.tokens import Tokens

__all__ = [
    "CNNEncoder",
    "LoadReport",
    "Pretrained",
    "Tokens",
    "ViTEncoder",
    "create",
    "create_cnn",
    "load",
    "load_cnn",
    "load_pretrained",
    "read_metadata",
    "save",
    "save_cnn",
]

# Former names.
read = load_pretrained
Loaded = Pretrained
