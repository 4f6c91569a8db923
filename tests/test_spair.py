"""SPair-71k in miniature."""

import json

import pytest
import torch

from sslkit.data.annotated import Paired, SPair
from sslkit.data.decode import UnreadableImage
from tests import on_disk


def test_a_pair(tmp_path):
    root = on_disk.write_spair(tmp_path)
    source = SPair(root, split="trn")
    assert isinstance(source, Paired)
    assert len(source) == 1
    pair = source.pair(0)
    assert pair.source_image.shape == (3, 6, 8)
    assert pair.target_image.shape == (3, 5, 4)
    assert pair.source_keypoints.tolist() == [[2, 1], [5, 3], [7, 4]]
    assert pair.target_keypoints.tolist() == [[0, 1], [1, 4], [3, 2]]
    assert pair.target_box.tolist() == [0, 1, 3, 5]
    for tensor in (pair.source_keypoints, pair.target_keypoints, pair.target_box):
        assert tensor.dtype == torch.float32
    assert (pair.category, pair.viewpoint_difference) == ("aeroplane", 2)
    assert pair.source_name == str(root / "JPEGImages" / "aeroplane" / "2008_002719.jpg")
    assert pair.target_name == str(root / "JPEGImages" / "aeroplane" / "2008_004100.jpg")
    assert source.name(0).endswith("trn/000001-2008_002719-2008_004100:aeroplane.json")


def test_splits_and_the_parent_folder(tmp_path):
    on_disk.write_spair(tmp_path)
    pair = SPair(tmp_path).pair(0)
    assert pair.source_keypoints.tolist() == [[0, 1], [1, 4], [3, 2]]
    assert pair.target_box.tolist() == [1, 1, 7, 5]
    assert pair.viewpoint_difference == 0


def test_shrunk_images(tmp_path):
    pair = SPair(on_disk.write_spair(tmp_path), split="trn", max_side=4).pair(0)
    assert pair.source_image.shape == (3, 3, 4)
    assert pair.target_image.shape[1] == 4
    assert pair.source_keypoints.tolist() == [[1, 0.5], [2.5, 1.5], [3.5, 2]]
    height, width = pair.target_image.shape[1:]
    expected = torch.tensor([0, 1, 3, 5]) * torch.tensor([width / 4, height / 5]).repeat(2)
    assert torch.allclose(pair.target_box, expected)
    points = torch.tensor([[0, 1], [1, 4], [3, 2]]) * torch.tensor([width / 4, height / 5])
    assert torch.allclose(pair.target_keypoints, points)


def test_errors(tmp_path):
    root = on_disk.write_spair(tmp_path)
    source = SPair(root, split="trn")
    path = root / "PairAnnotation" / "trn" / f"{on_disk.SPAIR_PAIR['filename']}.json"
    for change, message in [
        ({"trg_kps": [[0, 1]]}, r"3 source and 1 target key points"),
        (
            {"trg_bndbox": [1, 2, 3]},
            r"aeroplane.json, .*box 0 is \[1, 2, 3\]; expected four",
        ),
        ({"src_kps": "none"}, r"aeroplane.json is not an annotation of SPair-71k"),
        ({"src_kps": [[0, 1], [2, float("nan")], [1, 1]]}, r"aeroplane.json .*of finite numbers"),
        ({"trg_kps": [[0, 1], [2, 3, 4], [1, 1]]}, r"aeroplane.json .*pairs \(x, y\)"),
        ({"trg_bndbox": [3, 1, 0, 5]}, r"4100.jpg: box 0 .*; expected x0 <= x1"),
        ({"trg_bndbox": [0, 1, 30, 5]}, r"4100.jpg: box 0 .*outside the image of 4 x 5"),
        ({"trg_bndbox": [0, 1, float("inf"), 5]}, r"box 0 .*four finite numbers"),
        ({"viewpoint_variation": float("inf")}, r"aeroplane.json is not .*inf"),
        ({"viewpoint_variation": 7}, r"aeroplane.json is not .*from 0 to 2"),
        ({"category": "../.."}, r"'../..' is not the name of a file"),
        ({"trg_imname": 3}, r"3 is not the name of a file"),
    ]:
        path.write_text(json.dumps(on_disk.SPAIR_PAIR | change))
        with pytest.raises(ValueError, match=message):
            source.pair(0)
    fields = {key: value for key, value in on_disk.SPAIR_PAIR.items() if key != "trg_imname"}
    path.write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=r"KeyError: 'trg_imname'"):
        source.pair(0)
    path.write_text(json.dumps(on_disk.SPAIR_PAIR))
    (root / "JPEGImages" / "aeroplane" / "2008_004100.jpg").unlink()
    with pytest.raises(UnreadableImage, match=r"4100.jpg"):
        source.pair(0)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"no pair .*aeroplane.json; 1 of 1"):
        SPair(root, split="trn")
    with pytest.raises(FileNotFoundError, match=r"(?s)lacks Layout/large/val.txt, .*NUMBER-NAME"):
        SPair(root, split="val")
