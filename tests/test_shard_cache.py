"""Copies of remote shards: their limit, failures, and processes that ask at the same time."""

import multiprocessing
import os
import time
from pathlib import Path

import pytest

from sslkit.data.shards.cache import ShardCache


def test_cache_keeps_to_its_limit_and_drops_the_oldest(tmp_path):
    for name in "abcd":
        (tmp_path / name).write_bytes(bytes(1000))
    cache = ShardCache(tmp_path / "cache", max_bytes=2500)
    paths = {}

    def ask(name):
        time.sleep(0.02)  # the order is that of file times
        paths[name] = Path(cache.path(f"pipe:cat {tmp_path / name}"))
        return {each for each in paths if paths[each].exists()}

    assert ask("a") == {"a"}
    assert ask("b") == {"a", "b"}
    assert ask("a") == {"a", "b"}
    assert ask("c") == {"a", "c"}
    assert ask("d") == {"c", "d"}
    assert paths["d"].read_bytes() == bytes(1000)
    (tmp_path / "e").write_bytes(bytes(9000))
    assert ask("e") == {"e"}  # larger than the limit, but needed


def test_a_failed_copy_leaves_nothing(tmp_path):
    cache = ShardCache(tmp_path / "cache", max_bytes=100)
    with pytest.raises(OSError, match="exit 3"):
        cache.path("pipe:printf 'half a file'; exit 3")
    assert [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"] == []


def test_one_process_copies_while_others_wait(tmp_path):
    (tmp_path / "shard.tar").write_bytes(bytes(5000))
    url = f"pipe:echo x >> {tmp_path}/log; sleep 0.3; cat {tmp_path}/shard.tar"
    cache = ShardCache(tmp_path / "cache", max_bytes=10**6)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()

    def ask():
        queue.put(os.path.getsize(cache.path(url)))

    children = [context.Process(target=ask) for _ in range(4)]
    for child in children:
        child.start()
    assert [queue.get(timeout=60) for _ in children] == [5000] * 4
    for child in children:
        child.join()
    assert (tmp_path / "log").read_text() == "x\n"
