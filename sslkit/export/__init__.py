"""Trained encoders for others: timm, the Hugging Face Hub, `torch.export` and ONNX.

``sslkit export`` is the command. Projection heads are kept in this library's own format.
"""

from sslkit.export.hub import HubEncoder
from sslkit.export.program import ExportableEncoder, export_program, save_onnx, save_program
from sslkit.export.timm_weights import save_for_timm

__all__ = [
    "ExportableEncoder",
    "HubEncoder",
    "export_program",
    "save_for_timm",
    "save_onnx",
    "save_program",
]
