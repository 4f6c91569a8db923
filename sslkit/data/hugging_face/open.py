"""Opens the data sets that ``hf:NAME`` and ``hf-stream:NAME`` name."""

from typing import Any

from sslkit.data.decode import MAX_SIDE
from sslkit.data.hugging_face.images import HuggingFaceImages
from sslkit.data.hugging_face.stream import HuggingFaceStream
from sslkit.data.splits import Split, own_test_split


def open_hugging_face(
    spec: str, *, split: Split = "train", max_side: int = MAX_SIDE
) -> tuple[HuggingFaceImages, bool]:
    """The images of ``hf:NAME[:CONFIG]``, and whether they are a split of their own.

    ``split="test"`` is the first that exists of the splits ``val``, ``valid``, ``validation`` and
    ``test``; a data set without any gives its training split for both.

    Raises:
        FileNotFoundError: ``datasets`` cannot load it, with its reason.
        ValueError: there is no split ``train``, and several others.
    """
    splits = _load(spec, streaming=False)
    train, test = _split_names(splits, spec)
    chosen = train if split == "train" or test is None else test
    return HuggingFaceImages(splits[chosen], max_side=max_side), test is not None


def open_stream(
    spec: str, *, num_test: int = 2000, max_lanes: int = 64, max_side: int = MAX_SIDE
) -> HuggingFaceStream:
    """The training stream of ``hf-stream:NAME[:CONFIG]``.

    ``NAME`` is a data set of the Hugging Face Hub or a local folder that
    ``datasets.load_dataset`` takes. Without a test split of its own, ``num_test`` samples are held
    out, those that ``open_source(spec, split="test")`` gives.

    Raises:
        FileNotFoundError, ValueError: see :func:`open_hugging_face`.
    """
    splits = _load(spec, streaming=True)
    train, test = _split_names(splits, spec)
    held_out = num_test if test is None else 0
    return HuggingFaceStream(
        splits[train], max_lanes=max_lanes, held_out=held_out, max_side=max_side
    )


def open_stream_test(
    spec: str, *, num_test: int = 2000, max_lanes: int = 64, max_side: int = MAX_SIDE
) -> HuggingFaceImages:
    """``num_test`` test images that go with :func:`open_stream`, read into memory, undecoded.

    They come from the data set's test split, or else are what the training stream leaves out.
    """
    splits = _load(spec, streaming=True)
    train, test = _split_names(splits, spec)
    stream = HuggingFaceStream(
        splits[test or train], max_lanes=max_lanes, held_out=num_test, max_side=max_side
    )
    return stream.held_out_images()


def _load(spec: str, *, streaming: bool) -> Any:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            f"to read {spec!r}, install Hugging Face datasets: pip install 'sslkit[streaming]'"
        ) from error
    name, _, config = spec.partition(":")[2].partition(":")
    try:
        return load_dataset(name, config or None, streaming=streaming)
    except OSError as error:
        raise FileNotFoundError(
            f"Hugging Face datasets cannot load {spec!r} ({name!r} is neither a local folder it "
            f"can read nor a data set of the Hub it can reach): {error}"
        ) from error


def _split_names(splits: Any, spec: str) -> tuple[str, str | None]:
    names = list(splits)
    if "train" not in names and len(names) != 1:
        raise ValueError(f"{spec!r} has no split 'train'; it has {names}")
    train = "train" if "train" in names else names[0]
    return train, own_test_split(names)
