"""Hugging Face ``datasets`` as sources of images: map-style, and streaming."""

from sslkit.data.hugging_face.images import HuggingFaceImages
from sslkit.data.hugging_face.open import open_hugging_face, open_stream, open_stream_test
from sslkit.data.hugging_face.stream import HuggingFaceReader, HuggingFaceStream

__all__ = [
    "HuggingFaceImages",
    "HuggingFaceReader",
    "HuggingFaceStream",
    "open_hugging_face",
    "open_stream",
    "open_stream_test",
]
