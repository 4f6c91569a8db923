"""A streaming data set as an endless stream that can be entered anywhere."""

import random
from collections import deque
from collections.abc import Iterator
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

from torch import Tensor

from sslkit.data.decode import MAX_SIDE, UnreadableImage
from sslkit.data.hugging_face.images import Columns, HuggingFaceImages
from sslkit.data.protocols import MAX_REPLACEMENTS, StreamItem
from sslkit.data.seeds import sample_seed

if TYPE_CHECKING:
    from datasets import IterableDataset

_ROWS_AT_A_TIME = 16


class HuggingFaceStream:
    """A ``datasets.IterableDataset`` as an endless stream.

    It is a :class:`~sslkit.data.protocols.StreamSource`.

    The stream has ``S = min(dataset.num_shards, max_lanes)`` lanes. Lane l holds the shards (the
    files) ``l``, ``l + S``, ``l + 2 S``, ... and is read to its end over and over. Pass e of it
    puts its shards in random order and shuffles their samples in a buffer of
    ``max(shuffle // S, 1)``, by a seed that depends on (seed, l, e). Sample p of the stream is
    item ``p // S`` of lane ``p % S``. So the stream is a function of the seed alone, whatever the
    number of ranks, workers and restarts.

    What it costs:

    - Every worker process reads all lanes of its rank's samples, and drops, undecoded, what other
      workers show: n workers transfer the data n times. Where ``world_size`` divides S, ranks
      read different lanes. Tar shards (:class:`sslkit.data.shards.TarShards`) transfer once.
    - A resumed run reads through what it skips, undecoded: the first pass of a lane, to learn its
      length, and the current one up to the position.
    - Lanes of different lengths end their passes at different times: the epoch of a sample is
      that of its lane, and images of a short lane are shown more often.
    - A broken image is replaced by the next one of its lane that can be read.

    Args:
        dataset: streaming; its features must be known.
        image, label: see :class:`HuggingFaceImages`; integer labels that are not a ClassLabel
            need ``num_classes``.
        num_classes: where the features do not say.
        shuffle: samples in the buffers of all lanes together; they lie in memory, undecoded, in
            each worker (its rank's part).
        max_lanes: how many files are read at a time, at most. A multiple of the number of ranks
            keeps their lanes apart.
        held_out: samples that the stream leaves out, about the same number at the beginning of
            the first shard of each lane; :meth:`held_out_images` gives them.
        max_side: see :func:`sslkit.data.decode.read_image`.
    """

    def __init__(
        self,
        dataset: "IterableDataset",
        *,
        image: str | None = None,
        label: str | None = None,
        num_classes: int | None = None,
        shuffle: int = 4096,
        max_lanes: int = 64,
        held_out: int = 0,
        max_side: int = MAX_SIDE,
    ):
        if max_lanes < 1 or shuffle < 1 or held_out < 0:
            raise ValueError(
                f"max_lanes and shuffle must be at least 1 and held_out at least 0, got "
                f"{max_lanes}, {shuffle} and {held_out}"
            )
        if dataset.features is None:
            raise ValueError(
                "the features of this streaming data set are not known; give them when making it, "
                "for example dataset.cast(features)"
            )
        self._columns = Columns(dataset.features, image, label)
        self._dataset = self._columns.of(dataset.with_format(None))
        self.num_lanes = min(dataset.num_shards, max_lanes)
        self.shuffle = shuffle
        self.held_out = held_out
        self.max_side = max_side
        self.num_classes = self._columns.num_classes if num_classes is None else num_classes
        self.class_names = self._columns.class_names

    def reader(self, seed: int) -> "HuggingFaceReader":
        """Read the stream of ``seed``."""
        return HuggingFaceReader(self, seed)

    def held_out_images(self) -> HuggingFaceImages:
        """The ``held_out`` samples, read into memory (undecoded) now.

        Raises:
            ValueError: ``held_out`` is 0.
        """
        from datasets import Dataset

        if self.held_out == 0:
            raise ValueError("this stream holds no sample out; make it with held_out=2000, say")
        rows: list[dict[str, Any]] = []
        for lane in range(self.num_lanes):
            rows += islice(self._shard(lane), self._num_held_out(lane))
        table = Dataset.from_list(rows, features=self._dataset.features)
        columns = self._columns
        return HuggingFaceImages(
            table, image=columns.image, label=columns.label, max_side=self.max_side
        )

    def rows(self, seed: int, lane: int, epoch: int) -> Iterator[dict[str, Any]]:
        """Pass ``epoch`` of ``lane``, undecoded."""
        # Not by IterableDataset.shuffle: its order depends on the version of datasets, and it
        # keeps threads, which wait for seconds at the end of each pass.
        generator = random.Random(sample_seed(seed, lane, epoch))
        shards = list(range(lane, self._dataset.num_shards, self.num_lanes))
        generator.shuffle(shards)
        buffer: list[dict[str, Any]] = []
        size = max(self.shuffle // self.num_lanes, 1)
        for row in chain.from_iterable(map(self._training_rows, shards)):
            if len(buffer) < size:
                buffer.append(row)
            else:
                i = generator.randrange(size)
                yield buffer[i]
                buffer[i] = row
        generator.shuffle(buffer)
        yield from buffer

    def decode(self, row: dict[str, Any], name: str) -> tuple[Tensor, int]:
        """The image and label of a row."""
        image, label = self._columns.decode(row, name, self.max_side)
        return image, label if self.num_classes else -1

    def _shard(self, index: int) -> Iterator[dict[str, Any]]:
        shard = self._dataset.shard(num_shards=self._dataset.num_shards, index=index)
        # Unlike __iter__, iter() does not deal the files out to the workers of a torch loader.
        for batch in shard.iter(batch_size=_ROWS_AT_A_TIME):
            for values in zip(*batch.values(), strict=True):
                yield dict(zip(batch, values, strict=True))

    def _training_rows(self, shard: int) -> Iterator[dict[str, Any]]:
        is_first_of_its_lane = shard < self.num_lanes
        return islice(
            self._shard(shard), self._num_held_out(shard) if is_first_of_its_lane else 0, None
        )

    def _num_held_out(self, lane: int) -> int:
        return self.held_out // self.num_lanes + (lane < self.held_out % self.num_lanes)


class HuggingFaceReader:
    """Reads a :class:`HuggingFaceStream`; the positions asked of it must rise."""

    def __init__(self, stream: HuggingFaceStream, seed: int):
        self.stream = stream
        self.seed = seed
        self._lanes: dict[int, _Lane] = {}

    def read(self, position: int) -> StreamItem:
        """Sample number ``position`` of the stream.

        Raises:
            RuntimeError: 64 images of its lane in a row cannot be read.
        """
        item, lane_number = divmod(position, self.stream.num_lanes)
        if lane_number not in self._lanes:
            self._lanes[lane_number] = _Lane(self.stream, self.seed, lane_number, item)
        lane = self._lanes[lane_number]
        lane.advance(item)
        unreadable: list[tuple[int, UnreadableImage]] = []
        for ahead in range(MAX_REPLACEMENTS):
            at = position + ahead * self.stream.num_lanes
            _, row = lane.peek(ahead)
            try:
                image, label = self.stream.decode(row, f"[sample {at} of the stream]")
            except UnreadableImage as error:
                unreadable.append((at, error))
                continue
            return StreamItem(image, label, lane.peek(0)[0], at, tuple(unreadable))
        first = unreadable[0][1]
        raise RuntimeError(
            f"{MAX_REPLACEMENTS} images in a row of lane {lane_number} of the stream are "
            f"unreadable, the first of them {first.name}: {first.reason}"
        )


class _Lane:
    """The rows of a lane from item ``start`` on, with those read ahead for a broken image."""

    def __init__(self, stream: HuggingFaceStream, seed: int, lane: int, start: int):
        self._rows = _endless(stream, seed, lane, start)
        self._next = start
        self._ahead: deque[tuple[int, dict[str, Any]]] = deque()

    def advance(self, item: int) -> None:
        """Drop what comes before ``item``."""
        while self._next < item:
            self.peek(0)
            self._ahead.popleft()
            self._next += 1

    def peek(self, count: int) -> tuple[int, dict[str, Any]]:
        """Epoch and row of the item ``count`` after the current one."""
        while len(self._ahead) <= count:
            self._ahead.append(next(self._rows))
        return self._ahead[count]


def _endless(
    stream: HuggingFaceStream, seed: int, lane: int, start: int
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Epoch and row of the items of a lane from number ``start`` on."""
    epoch, to_skip = 0, start
    while True:
        length = 0
        for row in stream.rows(seed, lane, epoch):
            length += 1
            if to_skip:
                to_skip -= 1
            else:
                yield epoch, row
        if length == 0:
            raise ValueError(f"lane {lane} of the stream has no rows; lower max_lanes or held_out")
        epoch += 1 + to_skip // length  # all passes are as long as the one just read
        to_skip %= length
