"""The shape of the package: public names, the arrows between modules, what an import costs."""

import ast
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import sslkit

PACKAGE = Path(sslkit.__file__).parent
ROOT = PACKAGE.parent

# A part is a top-level module or subpackage of sslkit. What is not named here is a component.
HOUSE = {
    "training",
    "evaluation",
    "data",
    "backbones",
    "extract",
    "duplicates",
    "export",
    "testing",
}
TOP = {"recipes", "commands", "__main__"}  # stand on all of these, and on the public names
BASE = {
    "assignments",
    "devices",
    "factored_logits",
    "files",
    "kept_types",
    "ops",
    "progress",
    "slices",
    "torch_files",
    "torch_pickles",
    "unit_rows",
}
PARTS = {
    path.stem
    for path in PACKAGE.iterdir()
    if path.suffix == ".py" or (path / "__init__.py").is_file()
} - {"__init__"}
COMPONENTS = PARTS - HOUSE - BASE - TOP
# Components do not import each other, but for the one that puts others together.
COMPOSED = {"targets": {"centering", "sinkhorn", "sinkhorn_queue"}}

# The `sslkit` command stands above all parts: it brings parts, data and models together, and
# nothing imports it.
COMMANDS = sorted([PACKAGE / "__main__.py", *PACKAGE.glob("commands/*.py")])
SOURCES = sorted(set(PACKAGE.rglob("*.py")) - {PACKAGE / "__init__.py", *COMMANDS})
EXAMPLES = sorted(ROOT.glob("examples/*.py"))
BENCHMARKS = sorted(ROOT.glob("benchmarks/**/*.py"))

PUBLIC_NAMES = {
    "sslkit": [
        "Assignments",
        "CyclicMaskGenerator",
        "DINOLoss",
        "EMACentering",
        "EMATeacher",
        "FactoredLogits",
        "GramLoss",
        "KoLeoLoss",
        "MatryoshkaProjector",
        "RASAProjector",
        "SIGReg",
        "SinkhornKnopp",
        "SinkhornQueue",
        "Targets",
        "gram_loss",
        "iBOTLoss",
        "sinkhorn_many",
        "sum_over_levels",
    ],
    "sslkit.backbones": ["Tokens", "create", "load"],
    "sslkit.ops": ["packed_attention", "sinkhorn_bias", "soft_cross_entropy"],
}


def relative_name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imported_modules(path: Path, nodes: Iterator[ast.AST]) -> Iterator[str]:
    """Full names of the modules that these statements of the file import.

    ``from sslkit import x`` counts as ``sslkit.x``, which is a part, or a public name taken through
    the front door. The version alone may be taken from there.
    """
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *filter(None, [node.module])])
            if module == "sslkit":
                names = (alias.name for alias in node.names if alias.name != "__version__")
                yield from (f"sslkit.{name}" for name in names)
            else:
                yield module


def all_imports(path: Path) -> set[str]:
    return set(imported_modules(path, ast.walk(ast.parse(path.read_text()))))


@cache
def top_level_imports(path: Path) -> set[str]:
    """What importing the file imports: no function bodies, no ``if TYPE_CHECKING``."""

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        for child in ast.iter_child_nodes(node):
            is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            is_typing = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            if not is_function and not is_typing:
                yield child
                yield from walk(child)

    return set(imported_modules(path, walk(ast.parse(path.read_text()))))


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported_parts(path: Path) -> set[str]:
    modules = (name.split(".") for name in all_imports(path))
    return {[*names, "the front door"][1] for names in modules if names[0] == "sslkit"}


@pytest.mark.parametrize("path", SOURCES, ids=relative_name)
def test_arrows_point_one_way(path):
    part = part_of(path)
    if part in TOP:
        allowed = PARTS | set(PUBLIC_NAMES["sslkit"])
    elif part in HOUSE:
        allowed = PARTS - TOP
    elif part in COMPONENTS:
        allowed = BASE | {part} | COMPOSED.get(part, set())
    else:
        below = {
            "files": set(),
            "kept_types": set(),
            "progress": set(),
            "torch_files": {"torch_pickles"},
            "devices": set(),
            "slices": {"devices"},
            "unit_rows": set(),
            "factored_logits": set(),
            "assignments": {"factored_logits", "slices"},
        }
        allowed = below.get(part, BASE)
    assert imported_parts(path) <= allowed


def test_no_circle_between_parts():
    graph: dict[str, set[str]] = {part: set() for part in PARTS}
    for path in SOURCES:
        graph[part_of(path)] |= imported_parts(path) - {part_of(path)}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


FILES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


@cache
def imported_files(path: Path) -> set[str]:
    """Modules of sslkit that the file names in an import, those inside functions too.

    ``from a import b`` is of the module ``a.b`` if there is one, and of ``a`` otherwise. That
    Python also runs the ``__init__`` of every package above does not count.
    """
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = {alias.name for alias in node.names} if isinstance(node, ast.ImportFrom) else set()
        for module in imported_modules(path, iter([node])):
            inside = {f"{module}.{name}" for name in names} & FILES.keys()
            found |= inside | ({module} if len(inside) < len(names) or not names else set())
    return found & FILES.keys()


def test_no_circle_between_files():
    graph = {module: imported_files(path) - {module} for module, path in FILES.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


def reached_from(module: str) -> set[str]:
    """The module and all files that it imports, directly or through others."""
    reached, new = set(), {module}
    while new:
        reached |= new
        new = {found for name in new for found in imported_files(FILES[name])} - reached
    return reached


EVALUATION = "sslkit.evaluation"
# Neither measures, figures nor protocols: what compares models and writes pages.
COMPARES = {f"{EVALUATION}.{name}" for name in ("comparison", "markdown_report")}
FIGURES = {name for name in FILES if name.startswith(f"{EVALUATION}.figures")}
PROTOCOLS = {name for name in FILES if name.startswith(f"{EVALUATION}.protocols")}
# Measures, and what hands them features.
MEASURES = {name for name in FILES if name.startswith(EVALUATION)} - COMPARES - FIGURES - PROTOCOLS


@pytest.mark.parametrize("module", sorted(MEASURES | FIGURES))
def test_measures_are_below_figures_and_figures_below_protocols(module):
    """Whatever a measure imports imports, it needs no matplotlib."""
    reached = reached_from(module)
    assert not reached & PROTOCOLS
    if module in MEASURES:
        assert not reached & FIGURES
        imported = {name for path in map(FILES.get, reached) for name in top_level_imports(path)}
        assert "matplotlib" not in {name.split(".")[0] for name in imported}


@pytest.mark.parametrize(
    "path", [path for path in SOURCES if part_of(path) not in HOUSE | TOP], ids=relative_name
)
def test_third_party_imports_of_components_and_ops(path):
    allowed = {"sslkit", "torch", "einops", *sys.stdlib_module_names}
    allowed |= {"triton"} if part_of(path) == "ops" else {"numpy"}
    assert {name.split(".")[0] for name in top_level_imports(path)} <= allowed


@pytest.mark.parametrize("path", SOURCES + COMMANDS + EXAMPLES + BENCHMARKS, ids=relative_name)
def test_nothing_imports_an_example_or_a_command(path):
    examples = {"examples", *(example.stem for example in EXAMPLES)}
    assert not {name.split(".")[0] for name in all_imports(path)} & examples
    commands = {name for name in all_imports(path) if name.startswith("sslkit.commands")}
    assert not commands or path in COMMANDS


@pytest.mark.parametrize("module", PUBLIC_NAMES)
def test_public_names(module):
    home = importlib.import_module(module)
    assert set(PUBLIC_NAMES[module]) <= set(home.__all__) <= set(dir(home))
    assert all(callable(getattr(home, name)) for name in home.__all__)


def test_the_front_door_has_these_names_and_no_others():
    assert sorted(sslkit.__all__) == PUBLIC_NAMES["sslkit"]
    with pytest.raises(AttributeError, match=r"no attribute 'DinoLoss'; it has \[.*'DINOLoss'"):
        sslkit.DinoLoss  # noqa: B018


IMPORT_COST = """
import json, sys, time
import torch
with_torch = set(sys.modules)
start = time.perf_counter()
import sslkit
milliseconds = 1000 * (time.perf_counter() - start)
parts = [name for name in sys.modules if name.startswith("sslkit.")]
for part in {parts}:
    __import__("sslkit." + part)
heavy = {{"timm", "torchvision", "triton"}} & (set(sys.modules) - with_torch)
print(json.dumps({{"milliseconds": milliseconds, "parts": parts, "heavy": sorted(heavy)}}))
"""


def import_cost() -> dict:
    script = IMPORT_COST.format(parts=sorted(COMPONENTS | BASE))
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_import_is_cheap():
    """At most 150 ms on top of torch, in the best of three: the machine may be busy."""
    costs = []
    while len(costs) < 3 and min(costs, default=1e9) > 150:
        cost = import_cost()
        costs.append(cost["milliseconds"])
    assert min(costs) <= 150
    assert cost["parts"] == []  # ``import sslkit`` alone reads no module of it
    assert cost["heavy"] == []  # nor do all components together need these


@pytest.mark.parametrize("package", ["sslkit", "sslkit.testing", "sslkit.training"])
def test_no_module_hides_a_public_name(package):
    """Importing a module puts it into its package under its own name, before any lazy one."""
    found = importlib.import_module(package)
    folder = Path(found.__file__).parent
    assert not [name for name in found.__all__ if (folder / f"{name}.py").exists()]
