"""Features of a folder of images, or of any other data, as one file.

``sslkit extract --weights W --data D --output features.npy`` is the command.
"""

from sslkit.extract.feature_files import read_description, read_features, read_names
from sslkit.extract.parts import Extraction, extract_to_file

__all__ = ["Extraction", "extract_to_file", "read_description", "read_features", "read_names"]
