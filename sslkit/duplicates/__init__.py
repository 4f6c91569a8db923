"""Near-duplicate images, found by the similarity of their features. Nothing is ever deleted.

``sslkit duplicates --features features.npy --output O`` is the command.
"""

from sslkit.duplicates.search import Duplicates, find_duplicates, keep_one

__all__ = ["Duplicates", "find_duplicates", "keep_one"]
