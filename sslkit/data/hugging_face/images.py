"""A map-style data set as a source, and which columns of a data set are its images and labels."""

from typing import TYPE_CHECKING, Any

from torch import Tensor

from sslkit.data.decode import MAX_SIDE, UnreadableImage, decode_image, read_image
from sslkit.data.fingerprint import digest

_DIGESTED = 64  # images whose bytes tell one data set from another

if TYPE_CHECKING:
    from datasets import Dataset, Features


class HuggingFaceImages:
    """A ``datasets.Dataset`` as a source; images are decoded by :mod:`sslkit.data.decode`.

    Args:
        dataset: map-style. Formats and transforms that were set on it do not count.
        image: the column of images; None takes the one whose feature is ``datasets.Image``.
        label: the column of labels; None takes the one whose feature is ``datasets.ClassLabel``,
            or integers in a column called ``label``, or no labels. Class names come from the
            ClassLabel; of integers, the largest says how many classes there are. Null is no label.
        max_side: see :func:`sslkit.data.decode.read_image`.

    Raises:
        ValueError: a column is missing, or there are several to choose from.
    """

    def __init__(
        self,
        dataset: "Dataset",
        *,
        image: str | None = None,
        label: str | None = None,
        max_side: int = MAX_SIDE,
    ):
        self.max_side = max_side
        self._columns = Columns(dataset.features, image, label)
        self._dataset = self._columns.of(dataset.with_format(None))
        self.num_classes = self._columns.num_classes
        self.class_names = self._columns.class_names
        if self._columns.label is not None and self.class_names is None:
            labels = (each for each in self._dataset[self._columns.label] if each is not None)
            self.num_classes = max(labels, default=-1) + 1

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} images")
        return self._columns.decode(self._dataset[index], f"[{index}]", self.max_side)

    def name(self, index: int) -> str:
        """The path that the data set has for the image, if any, and its index."""
        return self._columns.name(self._dataset[index], f"[{index}]")

    def names_digest(self) -> str:
        """A digest of labels and of evenly spaced images, undecoded: all are in large files."""
        step = max(-(-len(self) // _DIGESTED), 1)
        rows = (self._dataset[index] for index in range(0, len(self), step))
        return digest(part for row in rows for part in self._columns.identity(row))


class Columns:
    """Which columns hold image and label, and how a row is read; see :class:`HuggingFaceImages`."""

    def __init__(self, features: "Features", image: str | None, label: str | None):
        from datasets import ClassLabel, Image, Value

        self.image = _pick(features, image, [n for n, f in features.items() if type(f) is Image])
        labels = [name for name, feature in features.items() if type(feature) is ClassLabel]
        plain = features.get("label")
        if not labels and isinstance(plain, Value) and "int" in plain.dtype:
            labels = ["label"]
        self.label = None
        if label is not None or labels:
            self.label = _pick(features, label, labels, argument="label")
        feature = None if self.label is None else features[self.label]
        names = getattr(feature, "names", None)
        self.class_names = None if names is None else tuple(names)
        self.num_classes = len(self.class_names or ())

    def of(self, dataset: Any) -> Any:
        """``dataset`` with these columns alone, its images undecoded."""
        from datasets import Image

        columns = [self.image] if self.label is None else [self.image, self.label]
        return dataset.select_columns(columns).cast_column(self.image, Image(decode=False))

    def name(self, row: dict[str, Any], position: str) -> str:
        """The path that the data set has for the row's image, if any, and ``position``."""
        cell = row[self.image] or {}
        return f"{cell.get('path') or ''}{position}"

    def identity(self, row: dict[str, Any]) -> tuple[bytes, str]:
        """What tells the row from others: the image's bytes, or else its file name; the label."""
        cell = row[self.image] or {}
        label = None if self.label is None else row[self.label]
        path = (cell.get("path") or "").rpartition("/")[2]
        return cell.get("bytes") or path.encode(), str(label)

    def decode(self, row: dict[str, Any], position: str, max_side: int) -> tuple[Tensor, int]:
        """The row's image, uint8 [3, h, w], and its label, -1 where there is none."""
        cell = row[self.image] or {}
        label = None if self.label is None else row[self.label]
        name = self.name(row, position)
        if cell.get("bytes") is not None:
            image = decode_image(cell["bytes"], name=name, max_side=max_side)
        elif "://" in (cell.get("path") or ""):
            image = decode_image(_download(cell["path"], name), name=name, max_side=max_side)
        elif cell.get("path"):
            image = read_image(cell["path"], max_side=max_side)
        else:
            raise UnreadableImage(name, "the data set has no image here (null)")
        return image, -1 if label is None else int(label)


def _download(url: str, name: str) -> bytes:
    import fsspec  # comes with datasets

    try:
        with fsspec.open(url, "rb") as file:
            content: bytes = file.read()
    except OSError as error:
        raise UnreadableImage(name, f"{type(error).__name__}: {error}") from error
    return content


def _pick(
    features: "Features", name: str | None, candidates: list[str], argument: str = "image"
) -> str:
    if name is not None:
        if name not in features:
            raise ValueError(
                f"{argument}={name!r} is no column of the data set; it has {sorted(features)}"
            )
        return name
    if len(candidates) != 1:
        found = f"several columns may be it: {candidates}" if candidates else "no column is it"
        raise ValueError(
            f"name the {argument} column with {argument}=...: {found}; the data set has "
            f"{ {name: type(feature).__name__ for name, feature in features.items()} }"
        )
    return candidates[0]
