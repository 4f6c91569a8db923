"""The study: which runs are due, what the recipe is told, and what an encoder is scored."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

from benchmarks.study import page, runs, scoring, training
from benchmarks.study.settings import ARMS, GROUPS, SCALES, WHOLE, groups_of
from benchmarks.study.training import Data, RunFailed
from sslkit.recipes.franca.recipe import FrancaNetwork
from sslkit.testing.references.sinkhorn import sinkhorn_in_log_domain
from sslkit.training.checkpoint import Checkpoints
from sslkit.training.settings import differences
from tests.recipe import check, main, parse, smoke, stored_settings
from tests.study import LAPTOP, Stubs, all_rows, made_up

# ---------------------------------------------------------------------------------------- runs


def test_an_arm_is_trained_once_for_all_questions_and_scored_once_a_split(tmp_path):
    stubs = Stubs()
    assert stubs.run(runs.planned(GROUPS, (0, 1)), tmp_path)
    assert len(set(stubs.trained)) == len(stubs.trained)
    learned = {name for name, arm in ARMS.items() if arm.trained}
    assert set(stubs.trained) == {(name, seed) for name in learned for seed in (0, 1)}
    # The whole method is scored for the choice of settings and for the report; RASA trains nothing.
    assert stubs.scored.count(WHOLE) == 4
    assert stubs.scored.count("rasa") == 2


def test_all_arms_of_a_seed_come_before_the_next_seed():
    planned = list(runs.planned(["masks"], (0, 1)))
    assert [run.seed for run in planned] == [0] * 4 + [1] * 4


def test_rows_say_what_was_run(tmp_path):
    rows = {(r["arm"], r["seed"], r["split"]): r for r in all_rows(tmp_path)}
    row = rows["one_head_block", 1, "test"]
    assert row["group"] == "pieces"
    assert row["changes"] == {
        "model.nesting_dims": [128],
        "masks.kind": "block",
        "masks.shift": False,
    }
    assert row["images"] == row["steps"] * row["batch_size"] == 7200
    assert row["scores"]["knn"] == made_up("one_head_block", 1)[0]["knn"]
    assert {"torch", "timm", "python"} <= set(row["versions"])
    assert row["hardware"]
    assert row["commit"]
    assert (row["train_seconds"], row["score_seconds"]) == (60, 10)
    assert rows[WHOLE, 0, "test"]["changes"] == {}
    assert rows["fresh", 0, "test"]["images"] == 0
    # Equal budgets: whoever is trained sees the same number of images.
    assert {r["images"] for r in rows.values()} == {0, 7200}
    assert rows["small_batch", 0, "test"]["batch_size"] == 8


def test_a_second_call_does_only_what_has_no_row(tmp_path):
    planned = list(runs.planned(["pieces", "masks"], (0, 1)))
    first = Stubs()
    first.run(planned, tmp_path)
    file = tmp_path / "laptop.jsonl"
    again = Stubs()
    assert again.run(planned, tmp_path)
    assert (again.trained, again.scored) == ([], [])

    kept = [line for line in file.read_text().splitlines() if '"random"' not in line]
    file.write_text("\n".join(kept) + "\n")
    again.run(planned, tmp_path)
    assert again.scored == ["random", "random"]
    assert again.trained == []  # their encoders are there still
    assert len(runs.read(file)) == len(planned)


def test_an_interrupted_call_keeps_its_rows_and_scores_what_was_trained(tmp_path):
    planned = list(runs.planned(["masks"], (0,)))
    stubs = Stubs()
    stubs.failing = {"block": KeyboardInterrupt()}
    with pytest.raises(KeyboardInterrupt):
        stubs.run(planned, tmp_path)
    assert [row["arm"] for row in runs.read(tmp_path / "laptop.jsonl")] == [WHOLE, "random"]
    stubs.failing = {}
    assert stubs.run(planned, tmp_path)
    assert [name for name, _ in stubs.trained] == [WHOLE, "random", "block", "inverse_block"]


def test_checkpoints_go_once_the_test_split_is_scored_and_not_before(tmp_path):
    checkpoints = tmp_path / "work" / "laptop" / f"{WHOLE}-s0" / "pretrain" / "checkpoints"
    stubs = Stubs()
    stubs.run(runs.planned(["choice"], (0,)), tmp_path)
    assert checkpoints.exists()
    stubs.run(runs.planned(["masks"], (0,)), tmp_path)
    assert not checkpoints.exists()


def test_a_budget_ends_between_runs_and_leaves_time_for_the_longest(tmp_path):
    planned = list(runs.planned(["masks"], (0, 1)))
    stubs = Stubs()
    # A run takes 70 s: after two, 60 of 200 s are left, which the longest so far would not fit in.
    assert not stubs.run(planned, tmp_path, budget=200)
    assert len(runs.read(tmp_path / "laptop.jsonl")) == 2
    assert not stubs.run(planned, tmp_path, budget=350)
    assert len(runs.read(tmp_path / "laptop.jsonl")) == 7
    assert stubs.run(planned, tmp_path, budget=70)
    assert stubs.now == 8 * 70


def test_a_run_that_gives_up_is_a_result_and_is_not_repeated(tmp_path):
    planned = list(runs.planned(["norm"], (0, 1)))
    stubs = Stubs()
    stubs.failing = {"unbounded": RunFailed("exit status 1: error: the loss is not finite")}
    assert stubs.run(planned, tmp_path)
    rows = runs.read(tmp_path / "laptop.jsonl")
    assert [r["failed"] for r in rows if r["arm"] == "unbounded"] == [
        "exit status 1: error: the loss is not finite"
    ] * 2
    stubs.failing = {}
    assert stubs.run(planned, tmp_path)
    assert ("unbounded", 0) not in stubs.trained
    text = "\n".join(page.lines({"laptop": rows}, "study"))
    assert "no norm, seed 1: training gave up: exit status 1" in text


def test_several_processes_share_the_work(tmp_path):
    """What another one has begun is passed over, and its row is seen once it is there."""
    planned = list(runs.planned(["masks"], (0,)))
    stubs, other = Stubs(), Stubs()
    lock = tmp_path / "work" / "laptop" / "block-s0.lock"
    lock.parent.mkdir(parents=True)
    with FileLock(lock):
        assert not stubs.run(planned, tmp_path)
    assert [name for name, _ in stubs.trained] == [WHOLE, "random", "inverse_block"]
    original = stubs.score

    def score(arm, *rest, **options):  # while this one scores, the other does all that is left
        assert other.run(runs.planned(["masks"], (1,)), tmp_path)
        return original(arm, *rest, **options)

    stubs.score = score
    assert stubs.run([*planned, *runs.planned(["masks"], (1,))], tmp_path)
    assert [name for name, _ in stubs.trained][3:] == ["block"]
    assert len(other.trained) == 4


# ------------------------------------------------------------------------------ recipe and data


@pytest.mark.parametrize("scale", SCALES.values(), ids=lambda scale: scale.name)
def test_the_recipe_takes_every_arm_and_differs_in_nothing_else(scale, tmp_path):
    def settings(name):
        words = training.command(ARMS[name], scale, 1, "scenes", tmp_path)
        parsed = parse(words[2:])
        if scale is LAPTOP:
            check(parsed)
        return parsed

    whole = settings(WHOLE)
    names = {name for group in groups_of(scale.name).values() for name in group.arms}
    for name in names - {WHOLE}:
        if ARMS[name].trained:
            arm = settings(name)
            changed = {key: new for key, _, new in differences(whole, arm)}
            assert changed == runs.changed_settings(ARMS[name], scale)
            assert (arm.seed, arm.data, arm.stages) == (1, "scenes", ("pretrain",))
            assert arm.evaluation.online_every == 0
            assert arm.steps * arm.batch_size == whole.steps * whole.batch_size


def test_a_run_with_a_checkpoint_goes_on_from_it(tmp_path):
    assert "--resume" not in training.command(ARMS[WHOLE], LAPTOP, 0, "scenes", tmp_path)
    (tmp_path / "pretrain" / "checkpoints" / "step_00000010").mkdir(parents=True)
    assert "--resume" in training.command(ARMS[WHOLE], LAPTOP, 0, "scenes", tmp_path)


def test_a_failed_recipe_is_told_by_its_last_line(tmp_path, monkeypatch):
    script = tmp_path / "recipe.py"
    script.write_text("import sys; print('step 3'); sys.exit('error: loss is nan')")
    monkeypatch.setattr(training, "RECIPE", script)
    with pytest.raises(RunFailed, match=r"^exit status 1: error: loss is nan$"):
        training.train(ARMS[WHOLE], LAPTOP, 0, "scenes", tmp_path / "run")


def test_validation_images_are_no_training_images_and_no_test_images(tmp_path):
    generator = np.random.default_rng(0)
    folder = tmp_path / "cifar10"
    folder.mkdir()
    whole = {}
    for split, count in (("train", 2100), ("test", 30)):
        images = generator.integers(0, 256, (count, 32, 32, 3), np.uint8)
        Image.fromarray(images.reshape(-1, 32, 3)).save(folder / f"{split}.png")
        np.save(folder / f"{split}_labels.npy", np.arange(count) % 10)
        whole[split] = images
    data = training.prepare(str(folder), "dense", tmp_path / "work")
    report, choose = (np.load(path) for path in (data.report, data.choose))
    assert (report["train_images"] == whole["train"][:100]).all()
    assert (report["train_images"] == choose["train_images"]).all()
    assert (report["test_images"] == whole["test"]).all()
    assert (choose["test_images"] == whole["train"][100:]).all()
    assert (choose["test_labels"] == np.arange(100, 2100) % 10).all()
    # Anything else is taken as it is.
    assert training.prepare("voc:x", "y", tmp_path) == Data("voc:x", "voc:x", "y")


# --------------------------------------------------------------------------------------- scores


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("study") / "run"
    words = ["--steps", "2", "--stages", "pretrain", "--model.no-normalize"]
    main(smoke(output, *words))
    return output


SMALL = replace(
    LAPTOP,
    backbone="sslkit_vit_micro",
    embed_dim=32,
    global_size=32,
    dense_size=32,
    num_train=60,
    num_heldout=20,
    num_test=40,
    num_memory=20,
    num_dense=40,
    linear_steps=5,
    rasa_iterations=(0, 2),
    num_masks=300,
)


def test_scores_of_a_run_of_the_recipe(trained):
    scenes = Data("scenes", "scenes", "scenes")
    scores, seen = scoring.score(ARMS[WHOLE], SMALL, 0, scenes, trained, validation=False)
    assert list(scores["knn_by_size"]) == ["2", "4", "8", "16", "32"]
    assert scores["knn"] == scores["knn_by_size"]["32"]
    assert all(0 <= scores[name] <= 1 for name in ("knn", "linear", "in_context"))
    assert seen["in_context_by_size"]["32"] == pytest.approx(scores["in_context"])
    assert torch.tensor(seen["exposure"]).shape == (8, 8)
    before, after = seen["position"]
    assert before["position_r2"] == pytest.approx(scores["position_r2"])
    assert after["position_r2"] < before["position_r2"] - 0.01
    assert before["in_context"] == pytest.approx(scores["in_context"])
    assert {(x["head"], x["temperature"], x["factor"]) for x in seen["stability"]} == set(
        itertools.product(("dino", "ibot"), (0.04, 0.07), (1, 16, 64))
    )
    json.dumps([scores, seen])  # a row

    removed, planes = scoring.score(ARMS["rasa"], SMALL, 0, scenes, trained, validation=False)
    assert removed["position_r2"] < scores["position_r2"] - 0.01
    assert planes["planes_removed"] >= 1
    again, nothing = scoring.score(ARMS[WHOLE], SMALL, 0, scenes, trained, validation=True)
    assert set(again) == set(scores)
    assert nothing == {}


def test_heads_are_the_teachers(trained):
    teacher = scoring.Teacher(trained)
    features = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    other = FrancaNetwork(stored_settings(trained).model, 32)
    checkpoints = Checkpoints(trained / "pretrain" / "checkpoints")
    checkpoints.load_(checkpoints.latest(), {"teacher": other.state_dict()}, partial=True)
    for mine, theirs in zip(teacher.ibot_head(features), other.ibot_head(features), strict=True):
        assert torch.equal(mine, theirs)


def test_pixels_are_scored_without_a_run(tmp_path):
    scenes = Data("scenes", "scenes", "scenes")
    scores, seen = scoring.score(ARMS["pixels"], SMALL, 0, scenes, tmp_path, validation=False)
    assert list(scores["knn_by_size"]) == [str(3 * 32 * 32)]
    assert scores["position_r2"] > 0.99  # place is a feature of theirs
    assert seen == {}


@pytest.mark.parametrize(
    ("kind", "shift", "least"), [("random", False, 0.02), ("block", True, 0.02)]
)
def test_exposure_is_even_where_it_should_be(kind, shift, least):
    masks = {"mask_ratio": [0.1, 0.65], "kind": kind, "shift": shift}
    encoder = type("Encoder", (), {"grid_size": (6, 6)})
    share = np.array(scoring.exposure(masks, encoder, replace(LAPTOP, num_masks=4000), 0))
    assert np.ptp(share) < 0.06
    assert share.mean() == pytest.approx(0.375, abs=0.02)
    uneven = scoring.exposure(
        {**masks, "kind": "inverse_block", "shift": False}, encoder, LAPTOP, 0
    )
    assert np.ptp(np.array(uneven)) > 0.2


def test_the_unshifted_formula_overflows_where_ours_does_not():
    generator = torch.Generator().manual_seed(0)
    bounded = torch.rand(40, 12, generator=generator) * 2 - 1
    found = scoring.balanced(bounded, 0.04)
    assert max(found.values()) < 1e-4
    # exp(3.6 / .04) is beyond float32.
    unbounded = bounded.clone()
    unbounded[0, 0] = 3.6
    found = scoring.balanced(unbounded, 0.04)
    assert found["textbook"] is None
    assert found["ours"] < 1e-4
    assert scoring.balanced(unbounded, 0.07)["textbook"] is not None
    # Far below the largest score a whole row underflows.
    unbounded[0, 0] = 20.0
    assert scoring.balanced(unbounded, 0.04)["textbook_minus_max"] is None
    assert scoring.balanced(unbounded, 0.04)["ours"] < 1e-4


def test_the_truth_that_formulas_are_compared_with():
    logits = 3 * torch.randn(7, 5, generator=torch.Generator().manual_seed(1)).double()
    torch.testing.assert_close(
        scoring.log_sinkhorn(logits, 0.1), sinkhorn_in_log_domain(logits, 0.1, 3)
    )
