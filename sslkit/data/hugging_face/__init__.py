"""Hugging Face ``datasets`` as sources of images: map-style, streaming, and Parquet files."""

from sslkit.data.hugging_face.images import HuggingFaceImages
from sslkit.data.hugging_face.open import (
    find_parquet,
    open_hugging_face,
    open_parquet,
    open_stream,
    open_stream_test,
    split_columns,
)
from sslkit.data.hugging_face.stream import HuggingFaceReader, HuggingFaceStream

__all__ = [
    "HuggingFaceImages",
    "HuggingFaceReader",
    "HuggingFaceStream",
    "find_parquet",
    "open_hugging_face",
    "open_parquet",
    "open_stream",
    "open_stream_test",
    "split_columns",
]
