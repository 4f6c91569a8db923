"""OpenOOD's lists."""

import pytest
import torch
from PIL import Image

from sslkit.data.annotated import ImageList, find_ood_lists
from sslkit.data.annotated.openood import find_list_root
from tests import on_disk


def test_a_list(tmp_path):
    on_disk.write_openood(tmp_path)
    path = tmp_path / "benchmark_imglist" / "cifar10" / "test_cifar10.txt"
    source = ImageList(path, tmp_path / "images_classic")
    assert (len(source), source.num_classes, source.class_names) == (2, 9, None)
    image, label = source[1]
    assert (image.shape, image.dtype, label) == ((3, 4, 4), torch.uint8, 8)
    assert source.name(0) == str(tmp_path / "images_classic" / "cifar10" / "test" / "0000.png")
    assert ImageList(path, tmp_path / "images_classic", num_classes=10).num_classes == 10
    with pytest.raises(ValueError, match=r"test_cifar10.txt has class 8, but num_classes=8"):
        ImageList(path, tmp_path / "images_classic", num_classes=8)


def test_lists_of_a_benchmark(tmp_path):
    on_disk.write_openood(tmp_path / "data")
    for data in (tmp_path, tmp_path / "data"):
        lists = find_ood_lists(data, "cifar10")
        assert list(lists.near) == ["cifar100", "tin"]
        assert list(lists.far) == ["mnist", "svhn", "texture", "places365"]
        assert [ImageList(*each).label(0) for each in (lists.train, lists.test)] == [0, 3]
        for each in (*lists.near.values(), *lists.far.values()):
            source = ImageList(*each)
            assert (source.num_classes, source[0][1]) == (0, -1)


def write_lists(root, dataset, others):
    for name in (f"train_{dataset}", f"test_{dataset}", *(f"test_{other}" for other in others)):
        on_disk.write_text(root / "benchmark_imglist" / dataset / f"{name}.txt", "a 1\n")
    for folder in ("images_classic", "images_largescale"):
        (root / folder).mkdir(exist_ok=True)


def test_cifar100(tmp_path):
    near, far = ["cifar10", "tin"], ["mnist", "svhn", "texture", "places365"]
    write_lists(tmp_path, "cifar100", near + far)
    lists = find_ood_lists(tmp_path, "cifar100")
    assert (list(lists.near), list(lists.far)) == (near, far)


def test_the_large_benchmarks(tmp_path):
    others = ["ssb_hard", "ninco", "inaturalist", "textures", "openimage_o"]
    for dataset in ("imagenet", "imagenet200"):
        write_lists(tmp_path, dataset, others)
    for dataset in ("imagenet", "imagenet200"):
        lists = find_ood_lists(tmp_path, dataset)
        assert list(lists.near) == ["ssb_hard", "ninco"]
        assert list(lists.far) == ["inaturalist", "textures", "openimage_o"]
        assert lists.far["textures"].root.name == "images_classic"
        for each in (lists.train, lists.test, *lists.near.values(), lists.far["inaturalist"]):
            assert each.root.name == "images_largescale"
            assert each.list_file.parent.name == dataset


def test_missing_lists_are_named(tmp_path):
    on_disk.write_openood(tmp_path)
    (tmp_path / "benchmark_imglist" / "cifar10" / "test_tin.txt").unlink()
    (tmp_path / "benchmark_imglist" / "cifar10" / "test_svhn.txt").unlink()
    with pytest.raises(FileNotFoundError) as error:
        find_ood_lists(tmp_path, "cifar10")
    text = str(error.value)
    assert "benchmark_imglist/cifar10/test_tin.txt, benchmark_imglist/cifar10/test_svhn" in text
    assert "benchmark_imglist/DATASET/{train,val,test}_DATASET.txt" in text
    assert "found in it: benchmark_imglist/, images_classic/, images_largescale/" in text
    with pytest.raises(FileNotFoundError, match=r"lacks .*train_cifar100.txt"):
        find_ood_lists(tmp_path, "cifar100")
    with pytest.raises(ValueError, match=r"one of cifar10, .*imagenet, got 'mnist'"):
        find_ood_lists(tmp_path, "mnist")


def test_where_the_images_are(tmp_path):
    on_disk.write_openood(tmp_path)
    folder = tmp_path / "benchmark_imglist" / "cifar10"
    assert find_list_root(folder / "test_tin.txt") == tmp_path / "images_classic"
    beside = tmp_path / "images_classic" / "cifar10" / "list.txt"
    beside.write_text("train/0000.png 1\n")
    assert find_list_root(beside) == tmp_path / "images_classic" / "cifar10"
    beside.write_text("nowhere.png 1\n")
    with pytest.raises(FileNotFoundError, match=r"begins with nowhere.png, .*imglist:LIST@FOLDER"):
        find_list_root(beside)
    with pytest.raises(FileNotFoundError, match=r"begins with nowhere.png, which is not in"):
        ImageList(beside, tmp_path)


@pytest.mark.parametrize("line", ["a.png", "a.png cat", "a.png 1.5", "a.png -2", " 3"])
def test_lines_that_are_no_image_and_class(tmp_path, line):
    path = tmp_path / "list.txt"
    path.write_text(f"b.png 1\n\n{line}\n")
    with pytest.raises(ValueError, match=r"list.txt:3 should be a path, a space and a class"):
        ImageList(path, tmp_path)


def test_no_list(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no list .*list.txt"):
        ImageList(tmp_path / "list.txt", tmp_path)
    (tmp_path / "list.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"list.txt is empty"):
        ImageList(tmp_path / "list.txt", tmp_path)


def test_paths_with_spaces(tmp_path):
    on_disk.write_image(tmp_path / "a cat.png", (3, 4))
    (tmp_path / "list.txt").write_text("a cat.png 2\n")
    source = ImageList(tmp_path / "list.txt", tmp_path)
    assert source[0][0].shape == (3, 3, 4)


@pytest.mark.parametrize("name", ["/PRIVATE/a.png", "a/../../private/a.png", "..\\private\\a.png"])
def test_a_list_names_images_of_its_folder(tmp_path, name):
    (tmp_path / "set").mkdir()
    (tmp_path / "private").mkdir()
    Image.new("RGB", (2, 2)).save(tmp_path / "private" / "a.png")
    Image.new("RGB", (2, 2)).save(tmp_path / "set" / "b.png")
    named = name.replace("/PRIVATE", str(tmp_path / "private"))
    (tmp_path / "set" / "list.txt").write_text(f"b.png 0\n{named} 1\n")
    with pytest.raises(ValueError, match="leads out of the folder"):
        ImageList(tmp_path / "set" / "list.txt", tmp_path / "set")
