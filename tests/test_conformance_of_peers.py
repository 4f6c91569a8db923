"""The adapters of other libraries run, and `docs/conformance.md` says what they do not hold."""

import importlib

import pytest

from sslkit.testing.conformance import cases

pytestmark = pytest.mark.slow

FAILURES = {
    "birder": {
        "birder sinkhorn of large logits: is finite over its range",
        "birder capi sinkhorn: equals the published loop",
        "birder dino v2 loss: autocast does not make it less exact",
        "birder dino v1 centre: no rows leave the centre",
    },
    "lightly": {
        "lightly sinkhorn of large logits: is finite over its range",
        "lightly center: no rows leave the centre",
    },
    "pytorch": set(),
    "sklearn": set(),
    "textbook": {"textbook sinkhorn of large logits: is finite over its range"},
    "timm": {
        "timm ema v2: shared weights are moved once",
        "timm ema v3: shared weights are moved once",
    },
    "torchmetrics": {
        "torchmetrics auroc of logits: is the share of pairs",
        "torchmetrics auroc of logits: only the ranking counts",
        "torchmetrics auroc of logits: many items are counted exactly",
    },
    "transformers": set(),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("library", FAILURES)
def test_failures_are_those_of_the_page(library: str) -> None:
    if library in ("birder", "lightly"):
        pytest.importorskip(library)
    adapters = importlib.import_module(f"benchmarks.conformance.{library}")
    found = {str(case) for case in cases(adapters) if not case.run().holds}
    assert found == FAILURES[library]
