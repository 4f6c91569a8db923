"""The study's page and figures: from rows alone, and what they say of them."""

import doctest
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from benchmarks.study import figures, page, runs, summary, tables, training
from benchmarks.study.__main__ import main
from benchmarks.study.settings import ARMS, GROUPS, SCALES, WHOLE
from tests.study import SIZES, all_rows, made_up

# ------------------------------------------------------------------------------ figures, summary


def test_spreads_and_intervals_are_those_of_scipy():
    values = (0.31, 0.29, 0.35, 0.30)
    spread = summary.Spread(values)
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert spread.mean == pytest.approx(np.mean(values))
    assert spread.sd == pytest.approx(np.std(values, ddof=1))
    assert spread.halfwidth == pytest.approx((high - low) / 2, rel=1e-3)
    assert spread.interval == pytest.approx((low, high), rel=1e-3)
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


def test_seeds_that_came_later_are_told_and_have_their_command(tmp_path):
    rows = all_rows(tmp_path, ["pieces", "masks"], (0, 1, 2))
    more = [{**row, "seed": row["seed"] + 3} for row in rows if row["group"] == "pieces"]
    said = "\n".join(page.lines({"laptop": rows + more}, "study"))
    assert said.count("Seeds 3, 4, 5 were added when the first 3 had been seen") == 1
    assert "run --scale laptop --only pieces --seeds 3 4 5\n" in said
    assert "were added" not in "\n".join(page.lines({"laptop": rows}, "study"))


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
    text = page.write({"laptop": rows}, tmp_path / "study.md").read_text()
    for name, group in GROUPS.items():
        assert f"## {group.question}" in text
        if name in figures.FIGURES:
            assert f"(study/laptop/{name}.png)" in text
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
            step["entropy"] = 0.5 + shift / 99
            step["entropy_shuffled"] = 0.6 + shift / 77
    texts = ["\n".join(page.lines({"laptop": each}, "study")) for each in (rows, other)]
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
    text = "\n".join(page.lines({"laptop": rows}, "study"))
    assert "Not run yet: `python -m benchmarks.study run --scale laptop --only targets`." in text
    assert "Missing: centering, Sinkhorn, 1 iteration, Sinkhorn, 10 iterations." in text
    # Made-up scores rise from arm to arm, by the same in every seed.
    assert "- \\+ nested heads, against + CyclicMask: higher: k-NN, linear," in text
    section = text.split("\n## Does each piece help?")[1].split("\n## ")[0]
    claimed = re.findall(r"^\| (.+): (.+) higher \| (.+) \| (.+) \|$", section, re.MULTILINE)
    assert [(against.split(",")[0], score) for against, score, *_ in claimed] == [
        (arm, score)
        for arm in ("+ CyclicMask", "+ nested heads", "+ RASA")
        for score in ("linear", "in-context mIoU")
    ]
    assert all((cell, here) == ("**+0.5 [+0.5, +0.5]**", "shows") for *_, cell, here in claimed[:4])
    assert "does not show" not in section
    assert "Why not all of it" not in section
    for row in rows:
        if row["arm"] == "rasa":
            row["scores"]["in_context"] -= 0.05
    text = "\n".join(page.lines({"laptop": rows}, "study"))
    section = text.split("\n## Does each piece help?")[1].split("\n## ")[0]
    assert "against + nested heads: in-context mIoU higher | **-" in section
    assert section.count("**the opposite shows**") == 1
    assert "Why not all of it: these runs see 7,200 images" in section


def test_the_page_says_what_is_below_fresh_weights(tmp_path):
    rows = all_rows(tmp_path, ["floor", "norm"])
    assert "below fresh weights" not in "\n".join(page.lines({"laptop": rows}, "study"))
    for row in rows:
        if row["arm"] == "unbounded":
            row["scores"]["linear"] -= 0.2
    text = "\n".join(page.lines({"laptop": rows}, "study"))
    assert "- no norm: below fresh weights in linear." in text


def test_an_empty_page_says_how_to_begin(tmp_path):
    text = page.write({}, tmp_path / "study.md").read_text()
    assert "Nothing has been run yet: `python -m benchmarks.study run`." in text


def test_the_commands_write_what_they_say(tmp_path, capsys):
    all_rows(tmp_path)
    places = ["--results", str(tmp_path), "--docs", str(tmp_path / "docs")]
    assert main(["figures", *places]) == main(["page", *places]) == 0
    assert (tmp_path / "docs" / "study.md").exists()
    for name in figures.FIGURES:
        assert (tmp_path / "docs" / "study" / "laptop" / f"{name}.png").exists()
    with pytest.raises(SystemExit):
        main(["run", "--only", "nonsense"])
    assert "invalid choice: 'nonsense'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="--only choice: not for --scale gpu"):
        main(["run", "--only", "choice", "--scale", "gpu", "--data", "x", *places[:2]])
    with pytest.raises(SystemExit, match="--scale gpu: --data names a folder of labelled images"):
        main(["run", "--scale", "gpu", *places[:2]])


def test_a_second_scale_stands_beside_the_first_where_it_has_rows(tmp_path):
    """It was asked about the pieces alone, which answers three questions and draws no floor."""
    all_rows(tmp_path, scale=SCALES["overnight"], groups=["pieces"])
    all_rows(tmp_path, groups=["floor", "pieces", "queue"])
    results = runs.read_all(tmp_path)
    assert list(results) == ["laptop", "overnight"]
    text = "\n".join(page.lines(results, "study"))
    sections = dict(re.findall(r"^## (.+?)\n(.+?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    for name in ("pieces", "sizes", "position"):
        both = re.findall(
            r"### At the scale `(\w+)`\n\n!\[.*\((.+)\)", sections[GROUPS[name].question]
        )
        assert both == [(scale, f"study/{scale}/{name}.png") for scale in results]
    assert "###" not in sections[GROUPS["queue"].question]
    assert "Not run yet: `python -m benchmarks.study run --scale laptop" in text
    assert "- Scale `overnight`: 1,000 steps of 48 images, 48,000 images in all." in text
    assert "run --scale overnight --only pieces --budget 60" in sections["How it was made"]
    drawn = [path.stem for path in figures.write(results["overnight"], tmp_path / "figures")]
    assert drawn == ["pieces", "sizes", "position"]
    alone = "\n".join(page.lines({"overnight": results["overnight"]}, "study"))
    assert "Which settings" not in alone  # asked at the laptop's scale only
    assert "###" not in alone


def test_every_embedding_size_is_marked_without_fresh_weights(tmp_path):
    rows = all_rows(tmp_path, ["sizes"])
    for axes in figures.sizes(rows).axes:
        assert tuple(label.get_text() for label in axes.get_xticklabels()) == SIZES


def test_a_trained_arm_is_compared_with_both_floors_and_a_norm_with_its_own_head():
    assert GROUPS["floor"].pairs() == [("pixels", "fresh"), (WHOLE, "fresh"), (WHOLE, "pixels")]
    assert GROUPS["norm"].pairs()[-1] == ("shallow_unbounded", "shallow")
    assert GROUPS["pieces"].pairs()[-1] == ("rasa", WHOLE)


@pytest.mark.parametrize("module", [tables, training], ids=lambda module: module.__name__)
def test_doctests(module):
    found = doctest.testmod(module)
    assert found.attempted > 0
    assert not found.failed


PAGE = Path(__file__).parents[1] / "docs" / "study.md"


def test_the_page_in_docs_is_that_of_the_recorded_rows():
    text = PAGE.read_text()
    assert text == "\n".join(page.lines(runs.read_all(runs.RESULTS), "study")).rstrip() + "\n"
    shown = set(re.findall(r"\((study/.+?\.png)\)", text))
    drawn = PAGE.with_suffix("").rglob("*.png")
    assert {path.relative_to(PAGE.parent).as_posix() for path in drawn} == shown
