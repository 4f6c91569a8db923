"""The guide holds: its Python runs, its commands parse, its links lead somewhere."""

import argparse
import contextlib
import dataclasses
import doctest
import importlib
import io
import re
import runpy
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import matplotlib
import pytest
import torch
import tyro
from markdown import Markdown
from mkdocs.config import load_config
from mkdocs.structure.files import get_files, set_exclusions
from PIL import Image

from docs.gallery import run as gallery
from docs.site import docstrings, figures, flags, maths, source_pages
from docs.site.docstrings import as_markdown
from docs.site.settings_page import markdown
from sslkit import backbones
from sslkit.recipes.franca.presets import PRESETS
from sslkit.training.help_text import documentation
from tests.pages import ROOT, Block, anchors, blocks, commands, name_of, pages, prose

PAGES = pages()
WITH_PYTHON = [
    page
    for page in PAGES
    if {block.language for block in blocks(page.read_text())} & {"python", "pycon"}
]
LANGUAGES = {"python", "pycon", "bash", "text", "yaml", "json", "toml"}
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
# Commands that the repository does not define.
FOREIGN = {"pip", "cd", "export", "git", "srun", "scontrol", "curl", "tar", "apt", "docker", "ls"}


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to be in, without a network, with default threads and random numbers."""

    def refused(*args: object) -> None:
        raise OSError(f"a page of the guide needs no network, but asks for {args[1]}")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    matplotlib.use("agg")
    torch.manual_seed(0)
    return tmp_path


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name_of)
def test_python_of_a_page_runs_from_top_to_bottom(page: Path, stranger: Path) -> None:
    if "\nfrom birder" in page.read_text():
        pytest.importorskip("birder", reason="pip install 'sslkit[peers]', Python 3.11")
    namespace: dict[str, object] = {"__name__": "page"}
    for block in blocks(page.read_text()):
        where = f"{name_of(page)}:{block.line}"
        if block.language == "python":
            printed = run(block, namespace, where)
            if block.output is not None:
                same = doctest.OutputChecker().check_output(block.output, printed, FLAGS)
                assert same, f"{where} prints\n{printed}\nand the page says\n{block.output}"
        elif block.language == "pycon":
            example = doctest.DocTestParser().get_doctest(block.text, namespace, where, where, 0)
            runner, report = doctest.DocTestRunner(optionflags=FLAGS), io.StringIO()
            runner.run(example, out=report.write, clear_globs=False)
            assert not runner.failures, f"{where}\n{report.getvalue()}"
            namespace.update(example.globs)


def run(block: Block, namespace: dict[str, object], where: str) -> str:
    """What a block prints; an error shows the page's own line."""
    padding = "\n" * (block.line - 1)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(padding + block.text, where, "exec"), namespace)
    return printed.getvalue()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_blocks_have_a_language_that_is_checked(page: Path) -> None:
    for block in blocks(page.read_text()):
        assert block.language in LANGUAGES, f"{name_of(page)}:{block.line}"


class Parsed(BaseException):
    """The command line is understood; the command itself is not run."""


@pytest.fixture
def only_parsing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever parses a command line gets no further."""

    def stopped_after(parse: Callable[..., object]) -> Callable[..., object]:
        def parse_and_stop(*args: object, **kwargs: object) -> object:
            parsed = parse(*args, **kwargs)
            if kwargs.get("return_unknown_args"):  # a first look at some of the words
                return parsed
            raise Parsed

        return parse_and_stop

    for owner, name in ((tyro, "cli"), (argparse.ArgumentParser, "parse_args")):
        monkeypatch.setattr(owner, name, stopped_after(getattr(owner, name)))


SHELL = [
    pytest.param(words, id=f"{name_of(page)}:{block.line} {' '.join(words)[:60]}")
    for page in PAGES
    for block in blocks(page.read_text())
    if block.language == "bash"
    for words in commands(block.text)
]


@pytest.mark.parametrize("words", SHELL)
def test_commands_of_the_pages_are_understood(
    words: list[str], stranger: Path, only_parsing: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    if words[0] == "make":
        assert {word for word in words[1:] if "=" not in word} <= targets
    elif words[:2] == ["pip", "install"]:
        extras = re.findall(r"^([\w-]+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
        for asked in re.findall(r"\[([\w,]+)\]", " ".join(words)):
            assert set(asked.split(",")) <= set(extras)
    elif words[0] in {"python", "torchrun", "sslkit"} or "torchrun" in words:
        words = ["-m", *words] if words[0] == "sslkit" else words
        scripts = (i for i, word in enumerate(words) if word.endswith(".py"))
        script = None if words[0] == "-m" else next(scripts, None)
        start = script if script is not None else words.index("-m") if "-m" in words else None
        if start is None:  # a here-document or -c
            return
        target, arguments = words[start], words[start + 1 :]
        if target == "-m":
            target, *arguments = arguments
        monkeypatch.setattr(sys, "argv", [target, *arguments])
        monkeypatch.syspath_prepend(str(ROOT))
        for weights in (word for word in words if re.fullmatch(r"[\w/]+\.safetensors", word)):
            backbones.save(backbones.create("sslkit_vit_micro"), stranger / weights)
        with contextlib.suppress(Parsed):
            understood(target)
    else:
        assert words[0] in FOREIGN


def understood(target: str) -> None:
    """Run a script or module up to the point where it has read its command line."""
    try:
        if target.endswith(".py"):
            assert (ROOT / target).is_file(), f"{target} is not in the repository"
            text = (ROOT / target).read_text()
            if "parse_args" in text or "run_recipe" in text:
                runpy.run_path(str(ROOT / target), run_name="__main__")
        else:
            runpy.run_module(target, run_name="__main__")
    except SystemExit as exit_:
        if exit_.code:
            pytest.fail(f"{target}: {exit_.code}")


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CHANGELOG.md"], ids=name_of)
def test_links_of_pages_outside_of_the_site(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text())):
        path, _, anchor = link.partition("#")
        if re.match(r"\w+:", path):
            continue
        target = page.parent / path if path else page
        assert target.exists(), f"{link} leads nowhere"
        if anchor:
            assert anchor in anchors(target.read_text()), f"{link}: no such heading"


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text()))
    written = {page.relative_to(ROOT / "docs").as_posix() for page in (ROOT / "docs").rglob("*.md")}
    assert written <= listed


def test_every_public_name_is_in_the_reference() -> None:
    shown = set()
    for page in (ROOT / "docs" / "reference").glob("*.md"):
        for name in re.findall(r"^::: ([\w.]+)$", page.read_text(), re.MULTILINE):
            module, _, last = name.rpartition(".")
            found = getattr(importlib.import_module(module), last, None)
            if found is None or isinstance(found, ModuleType):  # a module: what it defines
                source = importlib.import_module(name)
                shown |= {f"{name}.{n}" for n in vars(source) if not n.startswith("_")}
            else:
                shown.add(f"{getattr(found, '__module__', module)}.{last}")
                shown.add(name)
    parts = ["backbones", "data", "duplicates", "export", "extract", "ops", "rasa", "training"]
    for package in ("sslkit", *(f"sslkit.{part}" for part in parts)):
        module = importlib.import_module(package)
        for name in module.__all__:
            home = getattr(getattr(module, name), "__module__", package)
            assert {f"{home}.{name}", f"{package}.{name}"} & shown, f"{package}.{name}"


def test_settings_page_has_every_setting_with_the_value_of_each_preset() -> None:
    page = markdown()
    for flag in ("--seed", "--model.num-prototypes", "--masks.shift", "--evaluation.online-every"):
        assert f"| `{flag}` |" in page
    row = next(line for line in page.splitlines() if line.startswith("| `--crops.global-size`"))
    demo = PRESETS["demo"].crops.global_size
    assert "`224`" in row
    assert f"`{demo}` demo" in row
    assert page.count("| `--") == count_leaves(PRESETS["vitb14_in21k"])
    # A setting has its description in the last column, of a line in --help.
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| `--")]
    texts = {row[0]: row[-1].removesuffix("|").strip() for row in rows}
    assert not [flag for flag, text in texts.items() if not text.endswith(".")]
    assert max(map(len, texts.values())) <= 90


def count_leaves(settings: object) -> int:
    values = vars(settings).values()
    return sum(count_leaves(v) if dataclasses.is_dataclass(v) else 1 for v in values)


def test_the_style_sheet_is_part_of_the_site() -> None:
    config = load_config(str(ROOT / "mkdocs.yml"))
    files = get_files(config)
    set_exclusions(files, config)
    for path in config.extra_css:
        file = files.get_file_from_path(path)
        assert file is not None, path
        assert file.inclusion.is_included(), f"{path}: see exclude_docs of mkdocs.yml"


@pytest.mark.parametrize(("size", "wide"), [((300, 100), True), ((100, 100), False)])
def test_wide_figures_are_marked(size: tuple[int, int], wide: bool) -> None:
    content = io.BytesIO()
    Image.new("RGB", size).save(content, "PNG")
    found = {"parts/rasa/a.png": SimpleNamespace(content_bytes=content.getvalue())}
    html = figures.on_page_content(
        '<p><img alt="A" src="rasa/a.png"><img src="https://b.org/c.png"></p>',
        page=SimpleNamespace(file=SimpleNamespace(src_uri="parts/page.md")),
        files=SimpleNamespace(get_file_from_path=found.get),
    )
    assert html.count('class="wide"') == wide
    assert html.startswith('<p><img class="wide" alt="A"') == wide


def test_flags_in_code_are_kept_whole() -> None:
    page = flags.on_page_content("<p>a -- b <code>x --num-images 3</code> <pre>c--d</pre>")
    whole = '<span class="flag">--num-images</span>'
    assert page == f"<p>a -- b <code>x {whole} 3</code> <pre>c--d</pre>"


@dataclasses.dataclass
class Described:
    """Doc."""

    x: int = 1
    """What
    x is."""
    y: int = 2


@dataclasses.dataclass
class DescribedFurther(Described):
    z: int = 3
    """What z is."""


def test_descriptions_are_the_strings_below_the_fields() -> None:
    assert documentation(Described) == {"x": "What x is."}
    assert documentation(DescribedFurther) == {"x": "What x is.", "z": "What z is."}


@pytest.mark.parametrize("module", [docstrings, gallery], ids=lambda module: module.__name__)
def test_doctests_of_what_makes_the_site(module: ModuleType) -> None:
    found = doctest.testmod(module)
    assert found.attempted > 0
    assert not found.failed


def test_doctests_of_docstrings_become_code_blocks() -> None:
    text = "Adds.\n\nExample:\n    >>> 1 + 1\n    2\n\nSee :func:`~sslkit.ops.x`::\n\n    y"
    assert as_markdown(text).splitlines() == [
        *("Adds.", "", "Example:", "    ```pycon", "    >>> 1 + 1", "    2", "    ```", ""),
        *("See `x`:", "", "    y"),
    ]


def test_names_that_share_a_text_are_all_shown() -> None:
    assert as_markdown("    mean, std, C: of it.") == "    mean: and `std`, `C`: of it."


def test_equations_become_mathml() -> None:
    extensions = ["pymdownx.arithmatex"]
    generic = {"pymdownx.arithmatex": {"generic": True}}
    text = "For $a < b$ and `$c$`:\n\n$$\n\\sum_k q_k\n$$\n"
    page = maths.on_page_content(
        Markdown(extensions=extensions, extension_configs=generic).convert(text)
    )
    assert page.count("<math") == page.count("</math>") == 2
    assert page.count('display="block"') == 1
    assert "<code>$c$</code>" in page
    assert "arithmatex" not in page
    assert "<mo>&#x0003C;</mo>" in page


SCRIPT = """# %% [markdown]
# # A title
# and text.

# %%
from matplotlib.figure import Figure

x = 6 * 7
print(x)

# %%
figure = Figure(figsize=(1, 1))
figure.set_label("a picture")
figure
"""


def test_gallery_script_becomes_a_page(tmp_path: Path) -> None:
    script = tmp_path / "9_example.py"
    script.write_text(SCRIPT)
    page = gallery.run(script, tmp_path).read_text()
    assert page.startswith("# A title\nand text.\n\n```python\nfrom matplotlib")
    assert "```text\n42\n```" in page
    assert page.endswith("```\n\n![a picture](9_example_2.png)\n")
    assert (tmp_path / "9_example_2.png").stat().st_size > 0


def test_gallery_script_that_fails_names_its_line(tmp_path: Path) -> None:
    script = tmp_path / "9_example.py"
    script.write_text(SCRIPT.replace("6 * 7", "6 / 0"))
    with pytest.raises(ZeroDivisionError) as caught:
        gallery.run(script, tmp_path)
    assert caught.traceback[-1].lineno == 7


@pytest.mark.parametrize(
    ("page", "target", "path"),
    [
        ("index.md", "../examples/sinkhorn_in_swav.py", "examples/sinkhorn_in_swav.py"),
        ("reference/masking.md", "../../sslkit/masking.py", "sslkit/masking.py"),
        ("reference/masking.md", "../evaluation.md", None),
        ("index.md", "../../elsewhere.md", None),
    ],
)
def test_links_to_files_of_the_repository(page: str, target: str, path: str | None) -> None:
    assert source_pages.in_repository(page, target) == path
