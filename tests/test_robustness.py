"""Index maps of ImageNet's variants and ReaL labels, against timm's lists and evaluator."""

import json
from importlib import resources

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from timm.data import ImageNetInfo
from timm.data.real_labels import RealLabelsImagenet

from sslkit import backbones
from sslkit.data.sources import open_source
from sslkit.evaluation.protocols.robustness import Options, evaluate
from sslkit.evaluation.robustness import (
    folder_classes,
    read_real_labels,
    real_accuracy,
    real_correct,
    real_labels_of,
    subset_accuracy,
    subset_classes,
    subset_correct,
    subset_predictions,
    wnids,
)
from sslkit.evaluation.subject import Subject
from tests.noise import noise, seeded


@pytest.mark.parametrize("name", ["imagenet-a", "imagenet-r"])
def test_subsets_are_timms_index_lists(name):
    file = resources.files("timm") / "data" / "_info" / f"{name.replace('-', '_')}_indices.txt"
    expected = [int(line) for line in file.read_text().split()]
    found = subset_classes(name)
    assert (found.dtype, len(found)) == (torch.int64, 200)
    assert found.tolist() == sorted(expected)
    assert [wnids()[i] for i in found] == list(wnids(name))


def test_the_other_variants_have_all_classes():
    for name in ("imagenet", "imagenet-v2", "imagenet-sketch", "imagenet-real"):
        assert torch.equal(subset_classes(name), torch.arange(1000))
    assert list(wnids()) == ImageNetInfo().label_names()
    assert wnids()[207] == "n02099601"  # golden retriever


def test_both_subsets_share_some_classes():
    """A guard against one list standing for the other."""
    both = set(subset_classes("imagenet-a").tolist()) & set(subset_classes("imagenet-r").tolist())
    assert 0 < len(both) < 200


def test_folders_by_wordnet_id_and_by_number():
    folders = sorted(wnids("imagenet-r"))
    assert folder_classes(folders).tolist() == subset_classes("imagenet-r").tolist()
    numbers = sorted(str(i) for i in range(1000))  # "0", "1", "10", "100", ...
    found = folder_classes(numbers)
    assert found[:4].tolist() == [0, 1, 10, 100]
    assert found.sort().values.tolist() == list(range(1000))


@given(seed=st.integers(0, 99), size=st.integers(1, 9))
def test_subset_accuracy_is_that_of_the_loop(seed, size):
    classes = torch.randperm(10, generator=seeded(seed))[:size].sort().values
    logits = noise(20, 10, seed=seed)
    labels = classes[torch.randint(size, (20,), generator=seeded(seed))]
    right = 0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        right += max(classes.tolist(), key=lambda c, row=row: row[c]) == label
    assert subset_accuracy(logits, labels, classes) == pytest.approx(right / 20)
    # Classes outside the subset cannot take a vote away, whatever their logits.
    outside = torch.ones(10).index_fill_(0, classes, 0) * 1e6
    assert torch.equal(
        subset_correct(logits + outside, labels, classes), subset_correct(logits, labels, classes)
    )
    assert set(subset_predictions(logits, classes).tolist()) <= set(classes.tolist())


def test_real_accuracy_is_timms():
    labels = read_real_labels()
    files = [f"val/ILSVRC2012_val_{i + 1:08d}.JPEG" for i in range(50_000)]
    top = torch.randint(1000, (50_000,), generator=seeded())
    for i, classes in enumerate(labels):
        if classes and i % 3:
            top[i] = classes[i % len(classes)]
    judge = RealLabelsImagenet(files, topk=(1,))
    logits = torch.nn.functional.one_hot(top, 1000).half()
    judge.add_result(logits)
    assert real_accuracy(logits, labels) == pytest.approx(judge.get_accuracy(1) / 100)
    correct, counts = real_correct(logits, labels)
    assert int(counts.sum()) == sum(map(bool, labels)) < 50_000
    assert not correct[~counts].any()


def test_images_without_a_real_label_do_not_count():
    assert real_accuracy(torch.eye(4), [(0,), (), (1, 3), ()]) == 0.5


def test_real_labels_in_any_order(tmp_path):
    sets = [[i % 7, 999] if i % 5 else [] for i in range(50_000)]
    (tmp_path / "real.json").write_text(json.dumps(sets))
    read = read_real_labels(tmp_path / "real.json")
    assert read[1] == (1, 999)
    names = [
        f"val/n01440764/ILSVRC2012_val_{i:08d}{end}"
        for i, end in ((50_000, ".JPEG"), (1, ".png"), (7, "_n01440764.JPEG"))
    ]
    assert real_labels_of(names, read) == [(49_999 % 7, 999), (), (6, 999)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[1], [2", "not a ReaL file"),
        ('[["a"]]', "not a ReaL file"),
        ("[1, 2]", "not a ReaL file"),
        ("[[1], [2]]", "holds 2 label sets; ImageNet has 50000"),
        (json.dumps([[1000]] * 50_000), r"holds class 1000; ImageNet's classes are 0\.\.999"),
    ],
)
def test_refused_files(tmp_path, text, message):
    (tmp_path / "real.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_real_labels(tmp_path / "real.json")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: subset_classes("imagenet-c"), "unknown variant 'imagenet-c'; there are"),
        (lambda: folder_classes(["0", "cat", "dog"]), "'cat' is neither .* 2 of 3 folders"),
        (lambda: folder_classes(["1000"]), "'1000' is neither the WordNet id"),
        (lambda: subset_predictions(noise(3), torch.tensor([0])), r"logits must be \[B, .* \[3\]"),
        (
            lambda: subset_predictions(noise(2, 5), torch.tensor([3, 5])),
            r"the 5 columns of the logits, got 2 of them, 3\.\.5",
        ),
        (lambda: subset_predictions(noise(2, 5), torch.empty(0)), "got 0 of them"),
        (
            lambda: subset_correct(noise(2, 5), torch.tensor([1, 3]), torch.tensor([3, 4])),
            "labels hold 1, which is not a class of the subset",
        ),
        (
            lambda: subset_correct(noise(2, 5), torch.tensor([3]), torch.tensor([3])),
            r"labels must be \[2\], one for each of logits, got \[1\]",
        ),
        (
            lambda: subset_accuracy(noise(0, 5), torch.empty(0), torch.tensor([3])),
            "logits is empty",
        ),
        (lambda: real_correct(noise(2, 5), [[1]]), "2 logits but 1 label sets"),
        (lambda: real_accuracy(noise(2, 5), [[], []]), "all 2 label sets are empty"),
        (
            lambda: real_labels_of(["val/cat.jpg"], [[1]]),
            "'val/cat.jpg' is not a validation image of ImageNet",
        ),
        (lambda: real_labels_of(["ILSVRC2012_val_00000002.JPEG"], [[1]]), "not a validation image"),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Classes 0, 1 and 6; of these, ImageNet-A has 6 alone.
COLOURS = {"n01440764": (250, 30, 30), "n01443537": (30, 30, 250), "n01498041": (30, 250, 30)}


def write_images(folder, colours, count, *, first=0):
    generator = seeded(first)
    number = first
    for name, colour in colours.items():
        (folder / name).mkdir(parents=True)
        for _ in range(count):
            number += 1
            pixels = torch.tensor(colour) + torch.randint(-20, 5, (20, 24, 3), generator=generator)
            file = folder / name / f"ILSVRC2012_val_{number:08d}.png"
            Image.fromarray(pixels.clamp(0, 255).byte().numpy()).save(file)


@pytest.fixture
def subject(tmp_path):
    write_images(tmp_path / "in/train", COLOURS, 12)
    write_images(tmp_path / "in/val", COLOURS, 4, first=100)
    sources = {split: open_source(tmp_path / "in", split=split) for split in ("train", "test")}
    encoder = backbones.create("sslkit_vit_micro", img_size=16)
    return Subject("micro", encoder, sources, {}, global_size=16)


def test_a_subject(subject, tmp_path):
    red, blue, green = COLOURS.values()
    # Whatever these look like, the one class of ImageNet-A that was trained is predicted.
    write_images(tmp_path / "a", {"n01498041": red, "n01531178": blue}, 5)
    write_images(tmp_path / "v2", {"1": blue, "6": green}, 5)
    write_images(tmp_path / "sketch", {"n01440764": blue, "n01443537": blue}, 5)
    outcome = evaluate(
        subject,
        Options(
            num_steps=150,
            batch_size=32,
            num_blocks=(1, 2),
            imagenet_a=str(tmp_path / "a"),
            imagenet_v2=str(tmp_path / "v2"),
            imagenet_sketch=str(tmp_path / "sketch"),
        ),
    )
    values = {name: score.value for name, score in outcome.scores.items()}
    assert values["imagenet"] == 1
    assert values["imagenet-a"] == 0.5
    assert values["imagenet-v2"] == 1
    assert values["imagenet-sketch"] == 0.5
    real = [read_real_labels()[number] for number in range(100, 112)]
    counted = [r for r in real if r]
    assert outcome.scores["imagenet-real"].num_items == len(counted)
    truth = [0] * 4 + [1] * 4 + [6] * 4
    expected = sum(t in r for t, r in zip(truth, real, strict=True)) / len(counted)
    assert values["imagenet-real"] == pytest.approx(expected)


def test_a_subject_that_is_not_imagenet(subject, tmp_path):
    write_images(tmp_path / "pets/train", {"cat": (9, 99, 9), "dog": (99, 9, 9)}, 2)
    sources = {"train": open_source(tmp_path / "pets/train", test_fraction=0)}
    other = Subject("micro", subject.encoder, {"test": sources["train"], **sources}, {}, 16)
    with pytest.raises(ValueError, match="the folder 'cat' is neither the WordNet id"):
        evaluate(other, Options(num_steps=2, batch_size=4, num_blocks=(1,)))
