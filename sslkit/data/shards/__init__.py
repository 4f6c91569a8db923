"""Tar shards: as a source of images, and made from a folder (``sslkit shards``)."""

from sslkit.data.shards.source import TarShards
from sslkit.data.shards.urls import expand_shards
from sslkit.data.shards.writer import ShardReport, make_shards

__all__ = ["ShardReport", "TarShards", "expand_shards", "make_shards"]
