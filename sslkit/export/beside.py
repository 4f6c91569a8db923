"""What a run wrote beside the weights that it made."""

import json
from pathlib import Path

from sslkit.backbones.encoder_file import HEADER_KEY
from sslkit.backbones.packaged import PREFIX, packaged_file
from sslkit.backbones.weight_files import read_header
from sslkit.files import read_json_object


def read_run(weights: str) -> dict[str, str]:
    """What the run that wrote the weights said beside them.

    The text in the file's header, and the recipe's ``settings.json`` in the same folder where the
    header has no settings (an encoder with RASA).
    """
    path = packaged_file(weights) if weights.startswith(PREFIX) else Path(weights)
    if path.is_dir():
        path = path / "model.safetensors"
    if path.suffix != ".safetensors" or not path.is_file():
        return {}
    header = read_header(path)
    if HEADER_KEY not in header:
        return {}
    metadata = {key: value for key, value in header.items() if key != HEADER_KEY}
    settings = path.parent / "settings.json"
    if "stage" in metadata and "settings" not in metadata and settings.is_file():
        if settings.is_symlink():  # what it leads to would be published with the weights
            raise ValueError(f"{settings} is a link; replace it by the file")
        metadata["settings"] = json.dumps(read_json_object(settings, "restore or remove it"))
    return metadata
