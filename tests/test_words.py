"""Docstrings begin with the noun or verb that a thing is; no function is a bare participle."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [p for part in ("sslkit", "examples", "benchmarks") for p in (ROOT / part).rglob("*.py")]
BEGINNING = re.compile(r"(Of|That of|Those|As of|Whether or not|Being|Having)\b")
PARTICIPLE = re.compile(r"[a-z]+ing")
NOUNS = {
    *("centering", "heading", "listing", "overclustering"),
    *("padding", "rounding", "training", "warning"),
}


def documented(tree: ast.Module) -> Iterator[str]:
    """Docstrings of modules, classes, functions and attributes."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            continue
        if text := ast.get_docstring(node):
            yield text
        for before, after in zip(node.body, node.body[1:], strict=False):
            match before, after:
                case ast.Assign() | ast.AnnAssign(), ast.Expr(ast.Constant(str() as text)):
                    yield text


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_words(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert [text for text in documented(tree) if BEGINNING.match(text)] == []
    names = [n.name for n in ast.walk(tree) if isinstance(n, ast.ClassDef | ast.FunctionDef)]
    assert [n for n in names if PARTICIPLE.fullmatch(n) and n not in NOUNS] == []


def test_a_participle_is_found() -> None:
    tree = ast.parse('x = 1\n"""Of every run."""\n')
    assert [bool(BEGINNING.match(text)) for text in documented(tree)] == [True]
    assert PARTICIPLE.fullmatch("agreeing")
    assert not PARTICIPLE.fullmatch("string_of")
