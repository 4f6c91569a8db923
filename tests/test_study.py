"""The study: which runs are due, what their rows say, and pages and figures from rows alone."""

import itertools
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from scipy import stats

from benchmarks.study import figures, page, runs, scoring, summary, training
from benchmarks.study.__main__ import main
from benchmarks.study.settings import ARMS, GROUPS, SCALES, WHOLE, Scale, groups_of
from benchmarks.study.training import Data, RunFailed
from tests.oracles.sinkhorn import sinkhorn_in_log_domain
from tests.recipe import recipe, smoke

LAPTOP = SCALES["laptop"]
DATA = Data("report", "choose", "dense")
SIZES = ("8", "16", "32", "64", "128")


class Stubs:
    """Training that makes an empty encoder and scoring that makes numbers up; both are counted."""

    def __init__(self) -> None:
        self.trained: list[tuple[str, int]] = []
        self.scored: list[str] = []
        self.now = 0.0
        self.failing: dict[str, Exception] = {}

    def train(self, arm, scale, seed, data, output):
        self.now += 60
        name = next(name for name, one in ARMS.items() if one is arm)
        if name in self.failing:
            raise self.failing[name]
        self.trained.append((name, seed))
        output.mkdir(parents=True)
        (output / "pretrain.safetensors").touch()
        (output / "pretrain" / "checkpoints").mkdir(parents=True)

    def score(self, arm, scale, seed, data, output, *, validation):
        self.now += 10
        name = next(name for name, one in ARMS.items() if one is arm)
        assert (output / "pretrain.safetensors").exists() or name in ("fresh", "pixels")
        self.scored.append(name)
        return made_up(name, seed)

    def clock(self):
        return self.now

    def run(self, planned, folder: Path, scale: Scale = LAPTOP, **options) -> bool:
        return runs.run(
            list(planned),
            scale,
            DATA,
            folder / "work",
            folder / "rows.jsonl",
            train=self.train,
            score=self.score,
            clock=self.clock,
            say=lambda _: None,
            **options,
        )


def made_up(name: str, seed: int, offset: float = 0.0) -> tuple[dict, dict]:
    """Scores that depend on arm and seed: later arms are better, seeds differ by a little."""
    base = 0.2 + 0.005 * list(ARMS).index(name) + 0.0007 * seed + offset
    curve = {size: base - 0.01 * (7 - int(math.log2(int(size)))) for size in SIZES}
    scores = {
        "knn": curve["128"],
        "knn_by_size": curve,
        "linear": base + 0.0513,
        "in_context": base - 0.0911,
        "position_r2": 0.4 + base,
    }
    steps = [
        {
            "planes": planes,
            "position_r2": 0.61 / (planes + 1) + base / 9,
            "in_context": base - 0.1 + 0.001 * planes,
            "entropy": 0.9 + 0.01 * planes,
            "entropy_shuffled": 0.97,
        }
        for planes in LAPTOP.rasa_iterations
    ]
    balanced = [
        {
            "head": head,
            "temperature": 0.04,
            "factor": 1,
            "largest": 17.25 + base,
            "textbook": None,
            "textbook_minus_max": 2e-3,
            "ours": 3e-7,
        }
        for head in ("dino", "ibot")
    ]
    seen = {
        "in_context_by_size": {size: value - 0.09 for size, value in curve.items()},
        "exposure": [[0.21, 0.33], [0.34, 0.47 + base / 10]],
        "position": steps,
        "stability": balanced,
        "planes_removed": 3 + seed,
    }
    return scores, seen


def all_rows(folder: Path, groups=tuple(GROUPS), seeds=(0, 1, 2)) -> list[dict]:
    Stubs().run(runs.planned(groups, seeds), folder)
    return runs.read(folder / "rows.jsonl")


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
    file = tmp_path / "rows.jsonl"
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
    assert [row["arm"] for row in runs.read(tmp_path / "rows.jsonl")] == [WHOLE, "random"]
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
    assert len(runs.read(tmp_path / "rows.jsonl")) == 2
    assert not stubs.run(planned, tmp_path, budget=350)
    assert len(runs.read(tmp_path / "rows.jsonl")) == 7
    assert stubs.run(planned, tmp_path, budget=70)
    assert stubs.now == 8 * 70


def test_a_run_that_gives_up_is_a_result_and_is_not_repeated(tmp_path):
    planned = list(runs.planned(["norm"], (0, 1)))
    stubs = Stubs()
    stubs.failing = {"unbounded": RunFailed("exit status 1: error: the loss is not finite")}
    assert stubs.run(planned, tmp_path)
    rows = runs.read(tmp_path / "rows.jsonl")
    assert [r["failed"] for r in rows if r["arm"] == "unbounded"] == [
        "exit status 1: error: the loss is not finite"
    ] * 2
    stubs.failing = {}
    assert stubs.run(planned, tmp_path)
    assert ("unbounded", 0) not in stubs.trained
    text = "\n".join(page.lines(rows, "study"))
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
        parsed = recipe.parse(words[2:])
        if scale is LAPTOP:
            recipe.check(parsed, world_size=1)
        return parsed

    whole = settings(WHOLE)
    names = {name for group in groups_of(scale.name).values() for name in group.arms}
    for name in names - {WHOLE}:
        if ARMS[name].trained:
            arm = settings(name)
            changed = {key: new for key, _, new in recipe.differences(whole, arm)}
            assert changed == runs.differing(ARMS[name], scale)
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
    recipe.main(smoke(output, *words))
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
    other = recipe.FrancaNetwork(recipe.read_settings(trained).model, 32)
    checkpoints, path = recipe.last_checkpoint("pretrain", recipe.read_settings(trained))
    checkpoints.load_(path, {"teacher": other.state_dict()}, partial=True)
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
    masks = {"ratio": [0.1, 0.65], "kind": kind, "shift": shift}
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


# ------------------------------------------------------------------------------ figures, summary


def test_spreads_and_intervals_are_those_of_scipy():
    values = (0.31, 0.29, 0.35, 0.30)
    spread = summary.Spread(values)
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert spread.mean == pytest.approx(np.mean(values))
    assert spread.sd == pytest.approx(np.std(values, ddof=1))
    assert spread.halfwidth == pytest.approx((high - low) / 2, rel=1e-3)
    assert summary.Spread((0.3,)).halfwidth == math.inf


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ((1.0, 1.1, 0.9), "higher"),
        ((-1.0, -1.1, -0.9), "lower"),
        ((1.0, 2.0, 3.0), "higher in every seed"),
        ((-1.0, -2.0, -3.0), "lower in every seed"),
        ((-0.1, 1.0, 3.0), "no difference shown"),
        ((5.0,), "one seed: no spread"),
        ((0.0, 0.0, 0.0), "no difference shown"),
    ],
)
def test_verdicts(values, verdict):
    assert summary.Difference(values).verdict == verdict


def test_differences_are_paired_by_seed(tmp_path):
    rows = all_rows(tmp_path, ["masks"], (0, 1, 2))
    rows = [r for r in rows if not (r["arm"] == "block" and r["seed"] == 1)]
    found = summary.difference(rows, "block", WHOLE, "knn")
    assert len(found.values) == 2
    assert found.mean == pytest.approx(100 * 0.005 * (list(ARMS).index("block") - 4), abs=1e-6)
    assert found.sd == pytest.approx(0, abs=1e-9)


def test_figures_are_drawn_of_what_is_there(tmp_path):
    rows = all_rows(tmp_path)
    paths = list(figures.write(rows, tmp_path / "figures"))
    assert [path.stem for path in paths] == list(figures.FIGURES)
    assert all(Image.open(path).width > 1000 for path in paths)
    few = [row for row in rows if row["arm"] in (WHOLE, "linear", "block", "fresh")]
    drawn = [path.stem for path in figures.write(few, tmp_path / "few")]
    assert drawn == ["masks", "nesting"]


# ----------------------------------------------------------------------------------------- page


def cells_of(text: str) -> list[str]:
    """The cells of all tables but their heads and first columns."""
    lines = [line for line in text.splitlines() if line.startswith("| ") and "---" not in line]
    return [cell.strip() for line in lines for cell in line.split("|")[2:-1]]


def test_the_page_has_every_question_and_its_numbers(tmp_path):
    rows = all_rows(tmp_path)
    text = page.write(rows, tmp_path / "study.md").read_text()
    for name, group in GROUPS.items():
        assert f"## {group.question}" in text
        if name in figures.FIGURES:
            assert f"(study/{name}.png)" in text
    values = [100 * made_up("one_head", seed)[0]["knn"] for seed in (0, 1, 2)]
    written = f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"
    assert f"| + CyclicMask | {written} |" in text
    assert "Not run yet" not in text
    assert "**not finite**" in text


def test_every_measured_number_on_the_page_is_of_the_rows(tmp_path):
    """Other rows, other numbers: no cell and no verdict is written by hand."""
    rows = all_rows(tmp_path)
    other = json.loads(json.dumps(rows))
    place = {}
    for row in other:
        shift = 0.1237 + 0.031 * place.setdefault((row["arm"], row["seed"]), len(place))
        row["scores"], seen = made_up(row["arm"], row["seed"], shift)
        row |= seen | {"exposure": [[0.11, 0.77], [0.5, 0.6]], "planes_removed": 7}
        for one in row["stability"]:
            one |= {"largest": 99.5 + shift, "textbook": 0.25, "textbook_minus_max": None}
            one["ours"] = 4e-5
        for step in row["position"]:
            step |= {"planes": step["planes"] + 1, "entropy": 0.5 + shift / 99}
            step["entropy_shuffled"] = 0.6 + shift / 77
    texts = ["\n".join(page.lines(each, "study")) for each in (rows, other)]
    pairs = list(zip(*map(cells_of, texts), strict=True))
    assert len(pairs) > 300
    counts = {*SIZES, "3"}  # embedding sizes and numbers of seeds, which both have
    unchanged = {a for a, b in pairs if a == b and re.search(r"\d", a)} - counts
    assert all("D/16" in cell for cell in unchanged)  # heads of columns
    # Outside the tables, the only numbers that change are in sentences made from rows.
    assert "after 3, 4, 5 planes" in texts[0]
    assert "after 7, 7, 7 planes" in texts[1]


def test_the_page_says_what_is_missing_and_what_a_claim_came_to(tmp_path):
    rows = all_rows(tmp_path, ["pieces"], (0, 1, 2))
    text = "\n".join(page.lines(rows, "study"))
    assert "Not run yet: `python -m benchmarks.study run --only targets`." in text
    assert "Missing: centering, Sinkhorn, 1 iteration, Sinkhorn, 10 iterations." in text
    # Made-up scores rise from arm to arm, by the same in every seed.
    assert "- \\+ nested heads, against + CyclicMask: higher: k-NN, linear," in text
    assert "Shows here: linear of + CyclicMask; in-context mIoU of + CyclicMask; linear" in text
    section = text.split("## Does each piece help?")[1].split("## ")[0]
    assert "Does not show" not in section
    assert "Why:" not in section
    for row in rows:
        if row["arm"] == "rasa":
            row["scores"]["in_context"] -= 0.05
    text = "\n".join(page.lines(rows, "study"))
    section = text.split("## Does each piece help?")[1].split("## ")[0]
    assert "The opposite shows here: in-context mIoU of + RASA." in section
    assert "Why:" in section


def test_the_page_says_what_is_below_fresh_weights(tmp_path):
    rows = all_rows(tmp_path, ["floor", "norm"])
    assert "below fresh weights" not in "\n".join(page.lines(rows, "study"))
    for row in rows:
        if row["arm"] == "unbounded":
            row["scores"]["linear"] -= 0.2
    text = "\n".join(page.lines(rows, "study"))
    assert "- no norm: below fresh weights in linear." in text


def test_an_empty_page_says_how_to_begin(tmp_path):
    text = page.write([], tmp_path / "study.md").read_text()
    assert "Nothing has been run yet: `python -m benchmarks.study run`." in text


def test_the_commands_write_what_they_say(tmp_path, capsys):
    all_rows(tmp_path)
    (tmp_path / "rows.jsonl").rename(tmp_path / "laptop.jsonl")
    places = ["--results", str(tmp_path), "--docs", str(tmp_path / "docs")]
    assert main(["figures", *places]) == main(["page", *places]) == 0
    assert (tmp_path / "docs" / "study.md").exists()
    for name in figures.FIGURES:
        assert (tmp_path / "docs" / "study" / f"{name}.png").exists()
    with pytest.raises(SystemExit):
        main(["run", "--only", "nonsense"])
    assert "invalid choice: 'nonsense'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="--only choice: not for --scale gpu"):
        main(["run", "--only", "choice", "--scale", "gpu", "--data", "x", *places[:2]])
    with pytest.raises(SystemExit, match="--scale gpu: --data names a folder of labelled images"):
        main(["run", "--scale", "gpu", *places[:2]])


RESULTS = sorted(runs.RESULTS.glob("*.jsonl"))
PAGE = Path(__file__).parents[1] / "docs" / "study.md"


@pytest.mark.skipif(not PAGE.exists(), reason="docs/study.md has not been rendered")
def test_the_page_in_docs_is_that_of_the_recorded_rows():
    rows = runs.read(runs.RESULTS / "laptop.jsonl")
    assert PAGE.read_text() == "\n".join(page.lines(rows, "study")).rstrip() + "\n"
    pictures = set(re.findall(r"\(study/(\w+)\.png\)", PAGE.read_text()))
    assert {path.stem for path in PAGE.with_suffix("").glob("*.png")} == pictures
