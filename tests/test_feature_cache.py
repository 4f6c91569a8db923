"""A cache of features: what any of its stores has is not computed again."""

import pytest
import torch

from sslkit import backbones
from sslkit.evaluation.feature_cache import cached_features
from sslkit.evaluation.features import extract
from sslkit.evaluation.views import PaddedView
from tests.test_feature_store import Pictures, assert_same


@pytest.fixture(scope="module")
def encoder():
    return backbones.create("sslkit_vit_micro", img_size=(8, 12))


def cached(folder, encoder, source, *want, **changes):
    settings = {"identity": {}, "transform": PaddedView((4, 4)), "batch_size": 2} | changes
    return cached_features(folder, encoder, source, want=want, **settings)


def test_unreadable_images_are_told_each_time(tmp_path, encoder):
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"1 of 7 images .* 2.jpg"):
            assert len(cached(tmp_path, encoder, Pictures(), "cls")) == 6
    with pytest.raises(ValueError, match="is empty"):
        cached(tmp_path / "none", encoder, [], "cls")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"none of the 2 images can be read; .*0.jpg"):
            cached(tmp_path / "none", encoder, Pictures(2, broken=(0, 1)), "cls")


def test_progress_counts_what_was_there(tmp_path, encoder):
    told = []
    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path, encoder, Pictures(broken=(), stop_at=4), "cls", progress=told.append)
    assert told == [0, 2, 4]
    for expected in ([0, 2, 4, 4, 6, 7], [0, 2, 4, 4, 6, 7, 7]):
        cached(tmp_path, encoder, Pictures(broken=()), "cls", progress=told.append)
        assert told == expected


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ((("layer_cls", "mean_patch"), {"num_layers": 2}), (("cls", "mean_patch"), {})),
        ((("layer_cls",), {"num_layers": 2}), (("layer_cls",), {"num_layers": 1})),
        ((("layer_patches", "layer_cls"), {"num_layers": 2}), (("patches", "cls"), {})),
        ((("cls", "keys"), {"block": 0}), (("keys",), {"block": 0})),
        ((("cls", "keys"), {"block": 0}), (("cls",), {"block": 1})),
    ],
)
def test_a_store_of_more_serves(tmp_path, encoder, first, then):
    cached(tmp_path, encoder, Pictures(broken=()), *first[0], **first[1])
    source = Pictures(broken=())
    found = cached(tmp_path, encoder, source, *then[0], **then[1])
    assert source.read == []
    assert len(list(tmp_path.iterdir())) == 1
    expected = extract(
        encoder,
        Pictures(broken=()),
        transform=PaddedView((4, 4)),
        batch_size=2,
        want=then[0],
        dtype=torch.float16,
        **then[1],
    )
    assert found.tokens.keys() == expected.tokens.keys()
    for name, x in expected.tokens.items():
        torch.testing.assert_close(found.tokens[name], x, atol=2e-3, rtol=2e-3)
    if "patches" in then[0]:
        assert [x.shape for x in found.spatial("patches")] == [
            x.shape for x in expected.spatial("patches")
        ]


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ((("cls",), {}), (("cls", "mean_patch"), {})),
        ((("layer_cls",), {"num_layers": 1}), (("layer_cls",), {"num_layers": 2})),
        ((("keys",), {"block": 0}), (("keys",), {"block": 1})),
        ((("cls",), {}), (("layer_cls",), {"num_layers": 1})),
    ],
)
def test_a_store_of_less_does_not(tmp_path, encoder, first, then):
    cached(tmp_path, encoder, Pictures(broken=()), *first[0], **first[1])
    source = Pictures(broken=())
    found = cached(tmp_path, encoder, source, *then[0], **then[1])
    assert source.read == list(range(7))
    assert set(found.tokens) == set(then[0])
    assert len(list(tmp_path.iterdir())) == 2


def test_an_unfinished_store_of_more_does_not_serve(tmp_path, encoder):
    expected = cached(tmp_path / "other", encoder, Pictures(broken=()), "cls")
    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path / "all", encoder, Pictures(broken=(), stop_at=4), "cls", "keys")
    found = cached(tmp_path / "all", encoder, Pictures(broken=()), "cls")
    assert_same(found, expected)


def test_features_of_something_else_are_refused(tmp_path, encoder):
    source = Pictures(broken=())
    cached(tmp_path, encoder, source, "cls", identity={"weights": "a"})
    with pytest.raises(ValueError, match=r"something else: weights: 'a' there, 'b' asked for"):
        cached(tmp_path, encoder, source, "cls", identity={"weights": "b"})
    (tmp_path / "cls" / "meta.json").write_text('{"of": {"want": ["../victim"], "block": 0}}')
    with pytest.raises(ValueError, match=r"meta.json is damaged .*remove"):
        cached(tmp_path, encoder, source, "cls")
