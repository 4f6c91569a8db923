"""Which body of an operation runs, and how one finds out."""

import importlib.metadata
import importlib.util
from collections.abc import Iterator

import pytest
import torch
from torch.utils._pytree import tree_leaves

from sslkit.ops import c_kernels, column_logsumexp, column_mass, sinkhorn_bias, soft_cross_entropy
from sslkit.ops.dispatch import is_interpreted, record_bodies, resolve, triton_problem

CALLS = {
    "column_logsumexp": lambda **kw: column_logsumexp(torch.zeros(2, 3), 1.0, **kw),
    "column_mass": lambda **kw: column_mass(torch.zeros(2, 3), 1.0, torch.zeros(3), **kw),
    "sinkhorn_bias": lambda **kw: sinkhorn_bias(torch.zeros(2, 3), 1.0, **kw),
    "soft_cross_entropy": lambda **kw: soft_cross_entropy(
        torch.zeros(2, 3), 1.0, torch.zeros(2, 3), **kw
    ),
}


@pytest.fixture
def fresh_triton_problem() -> Iterator[None]:
    """`triton_problem` looks once a process; look again before and after the test."""
    triton_problem.cache_clear()
    yield
    triton_problem.cache_clear()


@pytest.mark.parametrize("name", CALLS)
def test_dispatch(name):
    chosen = "torch" if c_kernels.problem() else "c"
    with record_bodies() as ran:
        auto, explicit = (tree_leaves(CALLS[name](impl=impl)) for impl in ("auto", chosen))
    assert ran
    assert {body for _, body in ran} == {chosen}
    for x, y in zip(auto, explicit, strict=True):
        assert torch.equal(x, y)
    with record_bodies() as ran:
        CALLS[name](impl="torch")
    assert {body for _, body in ran} == {"torch"}
    with pytest.raises(
        ValueError, match=r"impl must be one of.*'auto', 'torch', 'c', 'triton'.*'cuda'"
    ):
        CALLS[name](impl="cuda")


@pytest.mark.skipif(not is_interpreted(), reason="on a GPU machine nothing is interpreted")
@pytest.mark.parametrize("name", CALLS)
def test_dispatch_to_triton(name):
    pytest.importorskip("triton")
    with record_bodies() as ran:
        CALLS[name](impl="triton")
    assert {body for _, body in ran} == {"triton"}


@pytest.mark.parametrize("name", CALLS)
def test_triton_needs_a_gpu(name, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match=r"the input is on cpu.*CUDA device; use impl='auto'"):
        CALLS[name](impl="triton")


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.usefixtures("fresh_triton_problem")
def test_triton_missing(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="impl='triton' cannot run: Triton is not installed"):
        CALLS[name](impl="triton")


@pytest.mark.parametrize(
    ("version", "problem"),
    [
        ("3.4.0", "Triton 3.4.0 is too old (needed: 3.5 or newer)"),
        ("2.3.1", "Triton 2.3.1 is too old (needed: 3.5 or newer)"),
        ("3.5.0", None),
        ("3.10.1+git1a2b3c", None),
        ("4.0", None),
    ],
)
@pytest.mark.usefixtures("fresh_triton_problem")
def test_triton_too_old(version, problem, monkeypatch):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton, "__version__", version)
    assert triton_problem() == problem


@pytest.mark.usefixtures("fresh_triton_problem")
def test_triton_in_a_package_of_another_name(monkeypatch):
    """As on Windows and for AMD: no metadata is found under its own name."""
    pytest.importorskip("triton")

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert triton_problem() is None


def test_resolve():
    wide = torch.zeros(2, dtype=torch.float64)
    assert resolve("auto", "op", wide) == resolve("torch", "op", wide) == "torch"
    with pytest.raises(RuntimeError, match=r"op: impl='triton' cannot run: .*float64; use"):
        resolve("triton", "op", wide)
    if is_interpreted():
        with pytest.raises(RuntimeError, match="cannot run: K is odd; use"):
            resolve("triton", "op", torch.zeros(2), unsupported="K is odd")


def test_recordings_nest():
    x = torch.zeros(2)
    with record_bodies() as outer:
        resolve("torch", "first", x)
        with record_bodies() as inner:
            resolve("torch", "second", x)
        resolve("torch", "third", x)
    resolve("torch", "fourth", x)
    assert [op for op, _ in outer] == ["first", "second", "third"]
    assert [op for op, _ in inner] == ["second"]
