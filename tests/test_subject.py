"""A subject hands out features, views and masks, and knows what it cannot."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from sslkit import RASAProjector, backbones
from sslkit.data.annotated.annotated_source import KeypointPair
from sslkit.data.image_array import ImageArray
from sslkit.data.scenes import Scenes
from sslkit.evaluation.encoders import as_encoder
from sslkit.evaluation.knn import knn_accuracy
from sslkit.evaluation.protocols import (
    correspondence,
    depth,
    in_context,
    knn,
    linear_probe,
    matryoshka,
    position,
)
from sslkit.evaluation.subject import Subject, labelled
from sslkit.evaluation.tokens import Unsuitable


@pytest.fixture(scope="module")
def subject():
    return Subject(
        "micro",
        backbones.create("sslkit_vit_micro", img_size=16),
        {"train": Scenes(24, size=(20, 32)), "test": Scenes(9, size=(20, 32), seed=1)},
        {"weights": "random", "data": "scenes"},
        global_size=16,
        dense_size=(16, 24),
        batch_size=4,
    )


def test_views(subject):
    assert subject.view("global")(subject.test[0][0]).shape == (3, 16, 16)
    assert subject.view("global").resize == 18  # 16 * 256 / 224
    assert subject.view("dense")(subject.test[0][0]).shape == (3, 16, 24)
    assert subject.view("padded")(torch.zeros(3, 17, 30, dtype=torch.uint8)).shape == (3, 20, 32)
    assert [x.shape for x in subject.images("test", [0, 3], "padded")] == [(3, 20, 32)] * 2


def test_masks_lie_under_the_dense_views(subject):
    features = subject.features("test", "patches", view="dense")
    assert features.patches.shape == (9, 4, 6, 32)
    masks = subject.masks("test", features)
    view = subject.view("dense")
    assert torch.equal(masks[3], view.mask(subject.test.mask(3)).long())
    with pytest.raises(Unsuitable, match=r"train data \(list\) has no mask.*voc:PATH"):
        replace(subject, sources={"train": [subject.test[0]]}).masks("train", features)


def test_the_disk_changes_nothing_but_rounding(subject, tmp_path):
    on_disk = replace(subject, cache=tmp_path)
    expected = subject.features("test", "cls", "keys")
    for _ in range(2):
        found = on_disk.features("test", "cls", "keys")
        torch.testing.assert_close(found.cls.float(), expected.cls, atol=2e-3, rtol=2e-3)
    on_disk.features("test", "cls", "keys", view="dense")
    replace(on_disk, identity={"weights": "others"}).features("test", "cls", "keys")
    assert len(list(tmp_path.iterdir())) == 3  # nothing is taken for something else


def test_limits_are_spread_evenly(subject):
    limited = replace(subject, limits={"train": 5})
    assert limited.features("train", "cls").indices.tolist() == [0, 4, 9, 14, 19]
    assert len(limited.features("test", "cls")) == 9
    assert limited.limited("train", 2).indices("train") == [0, 12]
    assert limited.limited("train", 9).indices("train") == limited.indices("train")


@pytest.mark.parametrize("cache", [False, True])
def test_rasa_and_nesting_are_of_final_tokens(subject, tmp_path, cache):
    rasa = RASAProjector(32, num_iterations=2)
    rasa.basis.copy_(torch.linalg.qr(torch.randn(32, 4))[0].T)
    cut = replace(subject, rasa=rasa, nesting=8, cache=tmp_path if cache else None)
    found = cut.features("test", "cls", "patches", "layer_cls", num_layers=2)
    plain = subject.features("test", "cls", "patches", "layer_cls", num_layers=2)
    close = {"atol": 4e-3, "rtol": 4e-3} if cache else {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(found.cls.float(), rasa(plain.cls)[:, :8], **close)
    torch.testing.assert_close(found.patches.float(), rasa(plain.patches)[..., :8], **close)
    torch.testing.assert_close(found["layer_cls"].float(), plain["layer_cls"], **close)
    for name in ("", "scene"):
        one = cut.image_features(cut.test[1][0], name, cut.view("global"), "cls", "keys")
        torch.testing.assert_close(one.cls.float(), rasa(plain.cls)[1:2, :8], **close)
        assert one["keys"].shape == (1, 4, 4, 32)
    with pytest.raises(ValueError, match="nesting 33 must be between 1 and the 32 features"):
        replace(subject, nesting=33).features("test", "cls")


PROTOCOLS = {
    knn: knn.Options(ks=(1,)),
    linear_probe: linear_probe.Options(num_steps=2, num_blocks=(1, 2)),
    in_context: in_context.Options(),
    position: position.Options(hidden_dim=0),
    depth: depth.Options(num_layers=2, epochs=1),
    correspondence: correspondence.Options(image_size=32),
    matryoshka: matryoshka.Options(sizes=(8, 32)),
}


class Pairs(Scenes):
    """Scenes with depth; each is a pair with itself."""

    def depth(self, index):
        return 3 - 2 * (self.mask(index) > 0).float()

    def pair(self, index):
        image, points = self[index][0], torch.tensor([[3.0, 4.0], [20.0, 11.0]])
        box = torch.tensor([0.0, 0.0, 20.0, 20.0])
        names = {"source_name": self.name(index), "target_name": self.name(index)}
        return KeypointPair(image, image, points, points, box, "scene", 0, **names)


@pytest.mark.filterwarnings("ignore:.*_masks have no pixel")
def test_rasa_and_nesting_encode_no_image_again(subject, tmp_path):
    """And equal what the encoder gives that RASA is folded into.

    To the rounding of float32, two orders of the same products, in memory (1e-5); and to that of
    float16 on the disk, which the stored tokens have and the projected ones once more: 2 units of
    2^-11 of a token's largest value, about 4.
    """
    encoder = copy.deepcopy(subject.encoder)
    sources = {"train": Pairs(24, size=(20, 32)), "test": Pairs(9, size=(20, 32), seed=1)}
    plain = replace(subject, encoder=encoder, sources=sources, cache=tmp_path)
    passes = []
    for block in encoder.vit.blocks[:1]:
        block.register_forward_hook(lambda *_: passes.append(1))
    for protocol, options in PROTOCOLS.items():
        protocol.evaluate(plain, options)
    assert passes
    passes.clear()
    rasa = RASAProjector(32, num_iterations=2)
    rasa.basis.copy_(torch.linalg.qr(torch.randn(32, 4))[0].T)
    for changes in ({"rasa": rasa}, {"nesting": 8}, {"rasa": rasa, "nesting": 16}):
        changed = replace(plain, name="another name", **changes)
        for protocol, options in PROTOCOLS.items():
            if protocol is matryoshka:
                options = replace(options, sizes=(8,))
            protocol.evaluate(changed, options)
    assert passes == []
    folded = copy.deepcopy(subject.encoder)
    folded.vit = rasa.fold_into_vit(folded.vit)
    want = ("cls", "mean_patch", "patches")
    for cache, tolerance in ((None, 1e-5), (tmp_path, 4e-3)):
        found = replace(plain, rasa=rasa, cache=cache).features("test", *want)
        expected = replace(plain, encoder=folded, cache=None).features("test", *want)
        for name in want:
            torch.testing.assert_close(found[name].float(), expected[name], atol=tolerance, rtol=0)


def test_what_is_missing_is_named(subject):
    with pytest.raises(ValueError, match=r"no 'near' data here, only \['test', 'train'\]"):
        subject.features("near", "cls")
    assert len(subject.with_source("near", subject.test).features("near", "cls")) == 9
    function = as_encoder(lambda x: (x.mean((2, 3)), x.movedim(1, -1)))
    with pytest.raises(Unsuitable, match="has no patch_size"):
        replace(subject, encoder=function).view("padded")
    features = subject.features("test", "cls")
    assert labelled(features, "test") is features
    with pytest.raises(Unsuitable, match="test data has no image with a label"):
        labelled(replace(features, labels=torch.full_like(features.labels, -1)), "test")
    with pytest.raises(ValueError, match=r"labels of the test data hold -9\d"):
        labelled(replace(features, labels=features.labels - 99), "test")


def test_layers_that_can_be_asked_for(subject):
    assert [subject.num_layers(n) for n in (1, 2, 4)] == [1, 2, 2]
    assert replace(subject, nesting=8).num_layers(2) == 1
    function = as_encoder(lambda x: (x.mean((2, 3)), x.movedim(1, -1)))
    assert replace(subject, encoder=function).num_layers(4) == 1


def test_generators_depend_on_the_seed_and_the_words(subject):
    draws = [
        torch.rand(1, generator=s.generator(*words)).item()
        for s in (subject, replace(subject, seed=1))
        for words in ((), (1,), (1, 2))
    ]
    assert len(set(draws)) == 6
    assert torch.rand(1, generator=subject.generator(1)).item() == draws[1]


def test_knn_of_a_subject(subject):
    outcome = knn.evaluate(subject, knn.Options(ks=(1, 20, 100)))
    assert list(outcome.scores) == ["k=20", "k=1", "k=24"]
    train, test = (subject.features(name, "cls") for name in ("train", "test"))
    expected = knn_accuracy(train.cls, train.labels, test.cls, test.labels, ks=(1, 20, 24))
    assert {name: s.value for name, s in outcome.scores.items()} == {
        f"k={k}": pytest.approx(value) for k, value in expected.items()
    }
    by_patches = knn.evaluate(subject, knn.Options(token="mean_patch", ks=(1,)))
    train, test = (subject.features(name, "patches") for name in ("train", "test"))
    means = [x.patches.mean((1, 2)) for x in (train, test)]
    expected = knn_accuracy(means[0], train.labels, means[1], test.labels, ks=(1,))
    assert by_patches.scores["k=1"].value == pytest.approx(expected[1])
    assert {score.num_items for score in outcome.scores.values()} == {9}


def test_a_bar_shows_how_much_is_done(subject, capsys):
    for progress in (False, True):
        with replace(subject, progress=progress).bar("fits", 3) as reach:
            reach(1)
            reach(3)
        shown = capsys.readouterr().err
        assert ("micro: fits" in shown and "3/3" in shown) == progress


def test_features_of_other_images_are_not_those_of_the_cache(subject, tmp_path):
    """The same place and number of images, but other names: computed anew."""
    images = np.random.default_rng(0).integers(0, 256, (6, 40, 40, 3), dtype=np.uint8)
    found = []
    for order in (range(6), reversed(range(6))):
        source = ImageArray(images[list(order)])
        one = replace(subject, cache=tmp_path).with_source("test", source)
        found.append(one.features("test", "cls").cls)
    assert torch.equal(found[0], found[1].flip(0))
    assert not torch.equal(found[0], found[1])
