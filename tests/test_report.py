"""The report page: complete, readable as Markdown, written as a whole."""

import re

import pytest
import torch
from matplotlib.figure import Figure

from sslkit import __version__
from sslkit.evaluation import figures
from sslkit.evaluation.report import format_table, write_report

RESULTS = [("k-NN accuracy", "20.0 % -> 31.0 %"), ("position R2", "0.62 -> 0.01")]


def write(directory, **changes):
    arguments = {"title": "Franca on scenes", "results": RESULTS, "figures": {}, "settings": {}}
    return write_report(directory, **arguments | changes)


def test_table_is_aligned():
    assert format_table(RESULTS).splitlines() == [
        "k-NN accuracy  20.0 % -> 31.0 %",
        "position R2    0.62 -> 0.01",
    ]
    assert format_table([]) == ""


def test_page(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["recipe.py", "--data", "my images"])
    drawn = figures.mask_exposure(torch.rand(4, 6), torch.rand(4, 6))
    path = write(
        tmp_path / "new" / "run",
        figures={"mask_exposure": drawn, "attention_maps": Figure((2, 1))},
        settings={"seed": 3, "model": {"name": "vit", "levels": (8, 16)}, "data": "a\n```\nb"},
    )
    assert path == tmp_path / "new" / "run" / "report.md"
    page = path.read_text(encoding="utf-8")
    assert page.startswith("# Franca on scenes\n\n## Results\n\n| Score | Value |\n| :-- | :-- |\n")
    assert "| k-NN accuracy | 20.0 % -> 31.0 % |\n| position R2 | 0.62 -> 0.01 |\n\n" in page
    pictures = re.findall(r"!\[(.*)\]\(<(.*)>\)", page)
    assert [place for _, place in pictures] == [
        "figures/mask_exposure.png",
        "figures/attention_maps.png",
    ]
    for _, place in pictures:
        assert (path.parent / place).read_bytes().startswith(b"\x89PNG")
    assert pictures[0][0].startswith("Mask exposure by position. With the shift all positions")
    assert pictures[1][0] == "attention maps"
    for name, value in [
        ("command", r"python\S* recipe.py --data 'my images'"),
        ("sslkit", re.escape(__version__)),
        ("torch", re.escape(torch.__version__)),
        ("machine", r".*, \d+ threads"),
        ("seed", "3"),
        ("model.name", "vit"),
        ("model.levels", r"\(8, 16\)"),
        ("data", "a ``` b"),
    ]:
        assert re.search(f"^{re.escape(name)} +{value}$", page, re.MULTILINE), name
    assert page.endswith("```\n")
    assert len(re.findall("^```", page, re.MULTILINE)) == 4


def test_cells_cannot_break_the_table(tmp_path):
    page = write(tmp_path, title="a\nb", results=[("p(a|b)", "first\nsecond")]).read_text()
    assert page.startswith("# a b\n")
    assert r"| p(a\|b) | first second |" in page
    assert "## Pictures" not in page
    assert not (tmp_path / "figures").exists()


def test_an_earlier_report_is_replaced_but_not_by_half_a_report(tmp_path):
    class Unwilling(Figure):
        def savefig(self, *args, **kwargs):
            raise OSError("disk full")

    write(tmp_path, title="first", figures={"a": Figure((1, 1))})
    before = {p: p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()}
    with pytest.raises(OSError, match="disk full"):
        write(tmp_path, title="second", figures={"a": Unwilling((1, 1))})
    assert {p: p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()} == before
    assert write(tmp_path, title="third").read_text().startswith("# third")


@pytest.mark.parametrize("name", ["../a", "a/b", "", ".", ".."])
def test_refused_figure_names(tmp_path, name):
    with pytest.raises(ValueError, match="is not a plain file name"):
        write(tmp_path, figures={name: Figure()})
    assert not list(tmp_path.iterdir())
