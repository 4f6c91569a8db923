"""The adapters of other libraries run, and `docs/conformance.md` says what they do not hold."""

import importlib

import pytest

from sslkit.testing.conformance import cases

pytestmark = pytest.mark.slow

FAILURES = {
    "lightly": {"lightly sinkhorn of large logits: is finite over its range"},
    "birder": {
        "birder sinkhorn of large logits: is finite over its range",
        "birder capi sinkhorn: equals the published loop",
    },
    "timm": {
        "timm ema v2: shared weights are moved once",
        "timm ema v3: shared weights are moved once",
    },
    "torchmetrics": set(),
    "transformers": set(),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("library", FAILURES)
def test_failures_are_those_of_the_page(library: str) -> None:
    pytest.importorskip(library)
    adapters = importlib.import_module(f"benchmarks.conformance.{library}")
    found = {str(case) for case in cases(adapters) if not case.run().holds}
    assert found == FAILURES[library]
