"""Encoders on the Hugging Face Hub: ``save_pretrained``, ``push_to_hub``, ``from_pretrained``.

timm needs ``huggingface_hub``, so it is there wherever this library is.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, PyTorchModelHubMixin, constants, hf_hub_download

from sslkit import backbones
from sslkit.backbones import ViTEncoder
from sslkit.backbones.encoder_file import require_settings
from sslkit.backbones.heads import Head
from sslkit.export.card import Card, Format, write_card
from sslkit.files import file_digest
from sslkit.matryoshka import MatryoshkaProjector

_FORMAT = Format(
    library="sslkit",
    usage="""from sslkit.export import HubEncoder

encoder = HubEncoder.from_pretrained("{name}")  # ORG/NAME of the Hub, or a folder
tokens = encoder(images)  # [B, C, h, w]: tokens.cls [B, D], tokens.patches [B, H, W, D]""",
    notes="`sslkit.backbones.load` reads `model.safetensors` too, and "
    "`sslkit.backbones.load_pretrained` the projection heads where it has any. "
    "Heads are kept in this format alone.",
    tags=("pytorch_model_hub_mixin", "model_hub_mixin"),
)


class HubEncoder(ViTEncoder, PyTorchModelHubMixin):
    """A `ViTEncoder` with the Hub's methods; it shares the weights of the encoder it is made of.

    ``save_pretrained(folder)`` writes

    - ``model.safetensors``: a file of `sslkit.backbones.save`, which has the encoder with its mask
      token, its heads and what rebuilds them;
    - ``config.json``: the settings once more, for readers of the Hub's pages;
    - ``README.md``: a model card, unless there is one already.

    ``push_to_hub("ORG/NAME")`` uploads the same. ``from_pretrained(folder or "ORG/NAME")`` rebuilds
    the encoder with its heads, in evaluation mode, as the Hub's other classes are; it takes
    the options of `sslkit.backbones.load`, such as ``img_size``. Every tensor has to fit.

    Args:
        encoder: built by ``sslkit.backbones.create`` or ``load``.
        heads: `MatryoshkaProjector` by name; see ``sslkit.backbones.save``.
        metadata: text to keep beside the weights; the recipe's files have ``stage``, ``step`` and
            ``settings``.
        card: what the model card says beyond that.

    Raises:
        ValueError: the encoder has no settings.

    >>> import tempfile
    >>> folder = tempfile.mkdtemp()
    >>> HubEncoder(backbones.create("sslkit_vit_micro")).save_pretrained(folder)
    >>> sorted(path.name for path in Path(folder).iterdir())
    ['README.md', 'config.json', 'model.safetensors']
    >>> HubEncoder.from_pretrained(folder).embed_dim
    32
    """

    def __init__(
        self,
        encoder: ViTEncoder,
        *,
        heads: Mapping[str, MatryoshkaProjector] | None = None,
        metadata: Mapping[str, str] | None = None,
        card: Card | None = None,
    ) -> None:
        super().__init__(
            encoder.vit,
            activation_checkpointing=encoder.activation_checkpointing,
            pos_interpolation=encoder.pos_interpolation,
            rope_periods=encoder.rope_periods,
            settings=require_settings(encoder),
        )
        self.mask_token = encoder.mask_token
        self.heads = dict(heads or {})
        self.metadata = dict(metadata or {})
        self.card = card or Card()
        self._digest: str | None = None

    def _save_pretrained(self, save_directory: Path) -> None:
        path = save_directory / constants.SAFETENSORS_SINGLE_FILE
        backbones.save(self, path, self.metadata, heads=self.heads)
        self._digest = file_digest(path)
        config = {"library_name": "sslkit", "architecture": "ViTEncoder", "settings": self.settings}
        (save_directory / constants.CONFIG_NAME).write_text(json.dumps(config, indent=2))

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        **options: Any,
    ) -> "HubEncoder":
        path = Path(model_id) / constants.SAFETENSORS_SINGLE_FILE
        if not Path(model_id).is_dir():
            path = Path(
                hf_hub_download(
                    model_id,
                    constants.SAFETENSORS_SINGLE_FILE,
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                    token=token,
                )
            )
        loaded = backbones.load_pretrained(path, **options)
        metadata = backbones.read_metadata(path)
        return cls(loaded.encoder, heads=projectors(loaded.heads), metadata=metadata).eval()

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The model card: see `sslkit.export.card.write_card`."""
        del args, kwargs
        return ModelCard(
            write_card(self.card, self, form=_FORMAT, metadata=self.metadata, digest=self._digest)
        )


def projectors(heads: Mapping[str, Head]) -> dict[str, MatryoshkaProjector]:
    """The heads of a file that are `MatryoshkaProjector`, the ones that can be written again."""
    return {name: head for name, head in heads.items() if isinstance(head, MatryoshkaProjector)}
