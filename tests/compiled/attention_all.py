"""Every configuration of packed attention; `tests.compiled.attention` has a quarter of them."""

from tests.compiled.attention import EVERY_CONFIGURATION as CONFIGURATIONS

__all__ = ["CONFIGURATIONS"]
