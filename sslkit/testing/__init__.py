"""Properties and float64 references that anybody's self-supervised code can be held to.

An adapter, such as `Sinkhorn` or `DINO`, says how somebody's code is called and which conventions
it follows. `check` and the functions ``check_...`` hold it to its properties; `cases` makes a test
of each; `sslkit conform` prints a table. ``sslkit.testing.references`` holds the float64 loops.

Each public name is imported from its own module on first use: the references need no hypothesis.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOME = {
    "AUROC": "auroc",
    "DINO": "dino",
    "EMA": "ema",
    "IBOT": "ibot",
    "KNN": "knn",
    "RASA": "rasa",
    "Case": "conformance",
    "Centering": "centering",
    "Confusion": "confusion",
    "Encoder": "encoder",
    "Finding": "conformance",
    "Gram": "gram",
    "Head": "head",
    "KoLeo": "koleo",
    "LayerDecay": "layer_decay",
    "Loss": "loss",
    "Masks": "masks",
    "NotHeld": "conformance",
    "SIGReg": "sigreg",
    "Schedule": "schedule",
    "Sinkhorn": "sinkhorn",
    "adapters": "conformance",
    "cases": "conformance",
    "check": "conformance",
    "check_auroc": "auroc",
    "check_centering": "centering",
    "check_confusion": "confusion",
    "check_dino_loss": "dino",
    "check_ema": "ema",
    "check_encoder": "encoder",
    "check_gram": "gram",
    "check_head": "head",
    "check_ibot_loss": "ibot",
    "check_knn": "knn",
    "check_koleo": "koleo",
    "check_layer_decay": "layer_decay",
    "check_loss": "loss",
    "check_masks": "masks",
    "check_rasa": "rasa",
    "check_schedule": "schedule",
    "check_sigreg": "sigreg",
    "check_sinkhorn": "sinkhorn",
}

__all__ = [
    "AUROC",
    "DINO",
    "EMA",
    "IBOT",
    "KNN",
    "RASA",
    "Case",
    "Centering",
    "Confusion",
    "Encoder",
    "Finding",
    "Gram",
    "Head",
    "KoLeo",
    "LayerDecay",
    "Loss",
    "Masks",
    "NotHeld",
    "SIGReg",
    "Schedule",
    "Sinkhorn",
    "adapters",
    "cases",
    "check",
    "check_auroc",
    "check_centering",
    "check_confusion",
    "check_dino_loss",
    "check_ema",
    "check_encoder",
    "check_gram",
    "check_head",
    "check_ibot_loss",
    "check_knn",
    "check_koleo",
    "check_layer_decay",
    "check_loss",
    "check_masks",
    "check_rasa",
    "check_schedule",
    "check_sigreg",
    "check_sinkhorn",
]

if TYPE_CHECKING:
    from sslkit.testing.auroc import AUROC, check_auroc
    from sslkit.testing.centering import Centering, check_centering
    from sslkit.testing.conformance import Case, Finding, NotHeld, adapters, cases, check
    from sslkit.testing.confusion import Confusion, check_confusion
    from sslkit.testing.dino import DINO, check_dino_loss
    from sslkit.testing.ema import EMA, check_ema
    from sslkit.testing.encoder import Encoder, check_encoder
    from sslkit.testing.gram import Gram, check_gram
    from sslkit.testing.head import Head, check_head
    from sslkit.testing.ibot import IBOT, check_ibot_loss
    from sslkit.testing.knn import KNN, check_knn
    from sslkit.testing.koleo import KoLeo, check_koleo
    from sslkit.testing.layer_decay import LayerDecay, check_layer_decay
    from sslkit.testing.loss import Loss, check_loss
    from sslkit.testing.masks import Masks, check_masks
    from sslkit.testing.rasa import RASA, check_rasa
    from sslkit.testing.schedule import Schedule, check_schedule
    from sslkit.testing.sigreg import SIGReg, check_sigreg
    from sslkit.testing.sinkhorn import Sinkhorn, check_sinkhorn


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sslkit.testing' has no attribute {name!r}; it has {__all__}")
    try:
        return getattr(import_module(f"sslkit.testing.{_HOME[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name != "hypothesis":
            raise
        raise ModuleNotFoundError(
            "sslkit.testing needs hypothesis, which is not installed: "
            "pip install 'sslkit[testing]'",
            name=error.name,
        ) from error


def __dir__() -> list[str]:
    return [*globals(), *__all__]
