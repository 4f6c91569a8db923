"""The report page: complete, readable as Markdown, written as a whole."""

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from matplotlib.figure import Figure

import sslkit
from sslkit import __version__
from sslkit.evaluation import figures
from sslkit.evaluation.markdown_report import format_table, typed_command, write_report

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
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
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
        ("command", r"python recipe.py --data 'my images'"),
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


@pytest.mark.parametrize(
    ("typed", "environment", "expected"),
    [
        (
            ["{cwd}/examples/r.py", "--output", "{cwd}/runs/a"],
            {},
            "python examples/r.py --output runs/a",
        ),
        (["{sslkit}/examples/r.py", "--resume"], {}, "python examples/r.py --resume"),
        (
            ["/opt/r.py", "--data=/srv/me/set:image:label"],
            {},
            "python .../r.py --data=.../set:image:label",
        ),
        (
            ["r.py", "--weights", "A=/srv/a.pt", "hf:o/n"],
            {},
            "python r.py --weights A=.../a.pt hf:o/n",
        ),
        (
            ["r.py", "--data", "https://a.org/x/y.tar"],
            {},
            "python r.py --data https://a.org/x/y.tar",
        ),
        (
            ["r.py", "--steps", "3"],
            {"TORCHELASTIC_RUN_ID": "x", "GROUP_WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "8"},
            "torchrun --nnodes=2 --nproc-per-node=8 r.py --steps 3",
        ),
    ],
)
def test_the_command_is_told_without_paths_of_the_machine(
    tmp_path, monkeypatch, typed, environment, expected
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    places = {"cwd": tmp_path, "sslkit": Path(sslkit.__file__).parents[1]}
    monkeypatch.setattr("sys.argv", [word.format(**places) for word in typed])
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert typed_command() == expected


@pytest.mark.parametrize("module", [None, "sslkit.__main__"])
@pytest.mark.parametrize("torchrun", [False, True])
def test_the_sslkit_command_is_told_as_it_is_typed(module, torchrun, monkeypatch):
    spec = module and SimpleNamespace(name=module)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    monkeypatch.setattr("sys.argv", ["/srv/venv/bin/sslkit", "evaluate", "knn"])
    if torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    launcher = "torchrun --nnodes=1 --nproc-per-node=1 -m " if torchrun else ""
    assert typed_command() == f"{launcher}sslkit evaluate knn"


def test_python_m_and_paths_in_settings(tmp_path, monkeypatch):
    spec = SimpleNamespace(name="mine.evaluation.__main__")
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    monkeypatch.setattr("sys.argv", ["/srv/venv/mine/evaluation/__main__.py", "knn"])
    settings = {"output": Path("/srv/me/run"), "rasa": (Path("/srv/r.pt"),), "data": "/srv/images"}
    page = write(tmp_path, title="Franca on /srv/images", settings=settings).read_text()
    assert re.search("^command +python -m mine.evaluation knn$", page, re.MULTILINE)
    assert "# Franca on .../images\n" in page
    assert "/srv" not in page


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
