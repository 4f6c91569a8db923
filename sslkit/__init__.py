"""Composable self-supervised-learning parts for PyTorch.

Each public name is imported from its own module on first use, so that ``import sslkit`` costs
next to nothing and pulls in neither Triton, timm nor torchvision.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Assignments": "assignments",
    "CyclicMaskGenerator": "masking",
    "DINOLoss": "losses",
    "EMACentering": "centering",
    "EMATeacher": "teacher",
    "FactoredLogits": "factored_logits",
    "GramLoss": "gram",
    "KoLeoLoss": "losses",
    "MatryoshkaProjector": "matryoshka",
    "RASAProjector": "rasa",
    "SIGReg": "sigreg",
    "SinkhornKnopp": "sinkhorn",
    "SinkhornQueue": "sinkhorn_queue",
    "Targets": "targets",
    "gram_loss": "gram",
    "iBOTLoss": "losses",
    "sinkhorn_many": "sinkhorn",
    "sum_over_levels": "losses",
}

__all__ = [
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
]

if TYPE_CHECKING:
    from sslkit.assignments import Assignments
    from sslkit.centering import EMACentering
    from sslkit.factored_logits import FactoredLogits
    from sslkit.gram import GramLoss, gram_loss
    from sslkit.losses import DINOLoss, KoLeoLoss, iBOTLoss, sum_over_levels
    from sslkit.masking import CyclicMaskGenerator
    from sslkit.matryoshka import MatryoshkaProjector
    from sslkit.rasa import RASAProjector
    from sslkit.sigreg import SIGReg
    from sslkit.sinkhorn import SinkhornKnopp, sinkhorn_many
    from sslkit.sinkhorn_queue import SinkhornQueue
    from sslkit.targets import Targets
    from sslkit.teacher import EMATeacher


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sslkit' has no attribute {name!r}; it has {__all__}")
    return getattr(import_module(f"sslkit.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
