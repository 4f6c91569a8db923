"""The joint linear probe against heads trained alone: in Python loops, and by torch.optim."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sslkit import backbones
from sslkit.data.labels import MAX_CLASSES
from sslkit.data.scenes import Scenes
from sslkit.evaluation import linear_head
from sslkit.evaluation import linear_probe as probe_module
from sslkit.evaluation.confusion import class_labels, confusion_of_classes
from sslkit.evaluation.encoders import as_encoder
from sslkit.evaluation.linear_probe import LEARNING_RATES, LinearInput, linear_probe
from sslkit.evaluation.protocols.linear_probe import Options, evaluate
from sslkit.evaluation.scores import bootstrap
from sslkit.evaluation.subject import Subject
from sslkit.testing.references import classification as oracle
from tests.noise import noise, seeded


def planted(count, *, num_classes=5, blocks=4, dim=8, spread=1.0, seed=0):
    """Class tokens with a direction a class, and mean patches, with noise: (cls, patch, labels)."""
    labels = torch.randint(num_classes, (count,), generator=seeded(seed + 100))
    cls = noise(num_classes, blocks, dim)[labels] + spread * noise(count, blocks, dim, seed=seed)
    patch = noise(num_classes, dim, seed=7)[labels] + spread * noise(count, dim, seed=seed + 1)
    return cls, patch, labels


QUICK = {"num_steps": 40, "batch_size": 16}


def test_the_grid_is_dinov2s():
    assert len(LEARNING_RATES) == 13
    assert LEARNING_RATES[:4] == (1e-5, 2e-5, 5e-5, 1e-4)
    assert LEARNING_RATES[-2:] == (5e-2, 0.1)
    result = linear_probe(*planted(20), *planted(8, seed=1), generator=seeded(), **QUICK)
    assert len(result.accuracies) == 2 * 2 * 13
    inputs = list(dict.fromkeys(str(one) for one, _ in result.accuracies))
    assert inputs == ["1 block", "1 block + mean patch", "4 blocks", "4 blocks + mean patch"]


@pytest.mark.parametrize(("n", "patch"), [(1, False), (3, True), (4, False)])
def test_inputs_are_the_last_blocks_and_the_mean_patch(n, patch):
    cls, mean_patch, _ = planted(3)
    found = LinearInput(n, patch)(cls.half(), mean_patch.half())
    parts = [*cls[:, 4 - n :].unbind(1), *([mean_patch] if patch else [])]
    torch.testing.assert_close(found, torch.cat(parts, 1).half().float())


def batches_of(count, batch_size, num_steps, generator):
    """Permutations one after another, cut into batches."""
    order = []
    while len(order) < num_steps * batch_size:
        order += torch.randperm(count, generator=generator).tolist()
    return [order[i * batch_size : (i + 1) * batch_size] for i in range(num_steps)]


@pytest.mark.parametrize("one", [LinearInput(1, False), LinearInput(2, True)], ids=str)
@pytest.mark.parametrize("rate", [0.5, 2.0])
def test_a_head_is_that_of_the_loop(one, rate):
    cls, patch, labels = planted(11, num_classes=3, blocks=2, dim=2)
    result = linear_probe(
        cls,
        patch,
        labels,
        cls,
        patch,
        labels,
        generator=seeded(3),
        num_blocks=(one.num_blocks,),
        mean_patch=(one.mean_patch,),
        learning_rates=(rate,),
        num_steps=9,
        batch_size=4,  # 36 items: three passes and a bit, over the ends of passes
    )
    generator, x = seeded(3), one(cls, patch)
    start = 0.01 * torch.randn(3, x.shape[1], generator=generator)
    batches = [
        (x[rows].tolist(), labels[rows].tolist()) for rows in batches_of(11, 4, 9, generator)
    ]
    weight, bias = oracle.sgd_head(start.tolist(), batches, learning_rate=rate * 4 / 256)
    torch.testing.assert_close(result.best.weight, torch.tensor(weight), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(result.best.bias, torch.tensor(bias), atol=1e-6, rtol=1e-5)


def test_all_heads_are_what_torch_optim_trains():
    train, test = planted(50, spread=2.0), planted(400, spread=2.0, seed=1)
    rates = (1e-3, 0.1, 10.0)
    settings = {"learning_rates": rates, "num_steps": 30, "batch_size": 16}
    result = linear_probe(*train, *test, generator=seeded(), num_blocks=(1, 3), **settings)
    generator = seeded()
    heads = {}
    for one in (LinearInput(n, patch) for n in (1, 3) for patch in (False, True)):
        width = 8 * (one.num_blocks + one.mean_patch)
        starts = 0.01 * torch.randn(3 * 5, width, generator=generator)
        for i, rate in enumerate(rates):
            linear = nn.Linear(width, 5)
            linear.weight.data = starts[5 * i : 5 * i + 5].clone()
            nn.init.zeros_(linear.bias)
            heads[one, rate] = linear
    groups = [{"params": h.parameters(), "lr": rate * 16 / 256} for (_, rate), h in heads.items()]
    optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30, eta_min=0)
    for rows in batches_of(50, 16, 30, generator):
        losses = [
            nn.functional.cross_entropy(h(one(train[0][rows], train[1][rows])), train[2][rows])
            for (one, _), h in heads.items()
        ]
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
        schedule.step()
    for key, head in heads.items():
        expected = (head(key[0](*test[:2])).argmax(1) == test[2]).double().mean().item()
        assert result.accuracies[key] == pytest.approx(expected, abs=1.5 / 400)
    best = heads[result.best.inputs, result.best.learning_rate]
    torch.testing.assert_close(result.best.weight, best.weight.data, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(result.best.bias, best.bias.data, atol=2e-5, rtol=1e-4)


@given(
    seed=st.integers(0, 99),
    num_classes=st.integers(1, 4),
    blocks=st.integers(1, 3),
    dim=st.integers(1, 5),
    count=st.integers(1, 9),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    dtype=st.sampled_from([torch.float16, torch.float32, torch.float64]),
)
def test_any_shape(seed, num_classes, blocks, dim, count, scale, dtype):
    cls, patch, labels = planted(count, num_classes=num_classes, blocks=blocks, dim=dim, seed=seed)
    data = (scale * cls).to(dtype), (scale * patch).to(dtype), labels
    result = linear_probe(
        *data,
        *data,
        generator=seeded(seed),
        num_blocks=(1, blocks),
        learning_rates=(1e-2, 1.0),
        num_classes=num_classes,
        num_steps=4,
        batch_size=3,
    )
    assert result.accuracy == max(result.accuracies.values())
    assert result.correct.double().mean().item() == pytest.approx(result.accuracy)
    logits = result.best.logits(*data[:2])
    assert torch.equal(result.best.classes, labels.unique())
    assert logits.shape == (count, len(result.best.classes))
    assert torch.equal(result.predictions, result.best.classes[logits.argmax(1)])


def test_of_equal_heads_the_first_is_the_best():
    data = planted(12, spread=0.0)
    result = linear_probe(*data, *data, generator=seeded(), learning_rates=(0.5, 1.0, 2.0), **QUICK)
    assert result.accuracy == 1
    assert (result.best.inputs, result.best.learning_rate) == (LinearInput(1, False), 0.5)


def test_the_patch_is_used_where_only_it_tells_the_classes():
    _, patch, labels = planted(300, spread=0.3)
    nothing = noise(300, 4, 8, seed=5)
    rows = slice(0, 200), slice(200, 300)
    train, test = ((nothing[r], patch[r], labels[r]) for r in rows)
    result = linear_probe(*train, *test, generator=seeded(), num_steps=200, batch_size=64)
    assert result.best.inputs.mean_patch
    assert result.accuracy > 0.95
    without = max(a for (one, _), a in result.accuracies.items() if not one.mean_patch)
    assert without < 0.4


def test_memory_mapped_half_precision(tmp_path):
    cls, patch, labels = planted(60)
    files = []
    for name, x in (("cls", cls), ("patch", patch)):
        x.half().numpy().tofile(tmp_path / name)
        files.append(torch.from_numpy(np.memmap(tmp_path / name, np.float16, "c", shape=x.shape)))
    mapped = linear_probe(*files, labels, *files, labels, generator=seeded(), **QUICK)
    data = cls.half().float(), patch.half().float(), labels
    held = linear_probe(*data, *data, generator=seeded(), **QUICK)
    assert torch.equal(mapped.best.weight, held.best.weight)
    assert mapped.accuracies == held.accuracies


def test_many_test_items_go_in_parts(monkeypatch):
    train, test = planted(30), planted(50, seed=1)
    whole = linear_probe(*train, *test, generator=seeded(), **QUICK)
    for module in (linear_head, probe_module):
        monkeypatch.setattr(module, "ITEMS_AT_ONCE", 7)
    parts = linear_probe(*train, *test, generator=seeded(), **QUICK)
    assert whole.accuracies == parts.accuracies
    logits = parts.best.logits(*test[:2])
    torch.testing.assert_close(whole.best.logits(*test[:2]), logits, atol=1e-5, rtol=1e-5)
    assert parts.best.logits(test[0][:0], test[1][:0]).shape == (0, 5)


def test_the_seed_decides_and_progress_counts():
    data, steps = planted(30), []
    settings = {**QUICK, "progress": steps.append}
    first = linear_probe(*data, *data, generator=seeded(1), **settings)
    assert steps == list(range(1, 41))
    for seed, same in ((1, True), (2, False)):
        again = linear_probe(*data, *data, generator=seeded(seed), **QUICK)
        assert torch.equal(first.best.weight, again.best.weight) == same


def test_an_unknown_class_counts_as_wrong():
    cls, patch, labels = planted(12, spread=0.0)
    other = labels.clone()
    other[:3] = 99
    result = linear_probe(
        cls, patch, labels, cls, patch, other, generator=seeded(), learning_rates=(1.0,), **QUICK
    )
    assert result.accuracy == pytest.approx(0.75)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_cls": noise(6, 8)}, r"train_cls must be .*\[N, n, D\].* got \[6, 8\]"),
        ({"test_cls": noise(0, 4, 8)}, "test_cls is empty"),
        ({"train_labels": torch.zeros(5).long()}, r"train_labels must be \[6\].* got \[5\]"),
        ({"train_labels": torch.tensor([0, 1, -2, 0, 0, 0])}, "train_labels hold -2"),
        ({"train_mean_patch": noise(6, 7)}, r"train_mean_patch must be \[6, 8\].* got \[6, 7\]"),
        ({"test_mean_patch": None}, "mean_patch is needed by an input with mean_patch=True"),
        ({"num_blocks": (1, 5)}, "num_blocks=5 class tokens, but the features hold those of 4"),
        ({"num_blocks": ()}, "num_blocks, mean_patch and learning_rates must each hold a value"),
        ({"num_steps": 0}, "num_steps and batch_size must be at least 1, got 0 and 16"),
        ({"num_classes": 2}, "train_labels holds 4, but num_classes=2"),
        ({"train_cls": noise(6, 4, 8) / 0}, "weights are not finite: the training features hold"),
    ],
)
def test_refused(changes, message):
    names = ("cls", "mean_patch", "labels")
    arguments = {f"train_{k}": x for k, x in zip(names, planted(6), strict=True)}
    arguments["train_labels"] = torch.tensor([0, 1, 2, 3, 4, 0])
    arguments |= {f"test_{k}": x for k, x in zip(names, planted(4), strict=True)}
    with pytest.raises(ValueError, match=message):
        linear_probe(**{**arguments, "generator": seeded(), **QUICK, **changes})


@pytest.fixture(scope="module")
def subject():
    return Subject(
        "micro",
        backbones.create("sslkit_vit_micro", img_size=16),
        {"train": Scenes(40, size=(20, 32)), "test": Scenes(16, size=(20, 32), seed=1)},
        {"weights": "random", "data": "scenes"},
        global_size=16,
        batch_size=8,
    )


OPTIONS = Options(num_steps=20, batch_size=16, num_blocks=(1, 2), learning_rates=(1e-2, 0.1))


def test_a_subject(subject):
    outcome = evaluate(subject, OPTIONS)
    (score,) = outcome.scores.values()
    assert len(outcome.details["accuracies"]) == 2 * 2 * 2
    assert score.value == max(outcome.details["accuracies"].values())
    assert score.num_items == 16
    assert bootstrap(score, num_resamples=5, generator=seeded()) is not None
    assert list(outcome.figures) == ["linear_confusion"]
    again = evaluate(subject, OPTIONS)
    assert again.details == outcome.details


def test_a_subject_of_final_tokens_alone(subject):
    def colours(images):
        patches = nn.functional.avg_pool2d(images, 4).movedim(1, -1)
        return patches.mean((1, 2)), patches

    for one in (replace(subject, nesting=8), replace(subject, encoder=as_encoder(colours))):
        details = evaluate(one, OPTIONS).details
        assert len(details["accuracies"]) == 2 * 2  # of one block


def test_memory_depends_on_the_classes_that_occur_and_not_on_their_numbers():
    """100,000 classes with the default grid would take 15 GB, and their confusions 80 GB."""
    cls, patch, labels = planted(12, spread=0.0)
    far = labels * 9_999 + 59_999
    kept = linear_probe(cls, patch, labels, cls, patch, labels, generator=seeded(), **QUICK)
    found = linear_probe(
        cls, patch, far, cls, patch, far, generator=seeded(), num_classes=MAX_CLASSES, **QUICK
    )
    assert torch.equal(found.best.weight, kept.best.weight)
    assert found.best.classes.tolist() == far.unique().tolist()
    assert torch.equal(found.predictions, kept.predictions * 9_999 + 59_999)
    classes, counts = confusion_of_classes(far, found.predictions)
    assert counts.shape == (len(classes), len(classes))
    assert counts.diagonal().sum() == found.correct.sum()
    assert class_labels(classes[:1], ("a", "b")) == ["59999"]
    assert class_labels(torch.tensor([1, 2]), ("a", "b")) == ["b", "2"]
