"""ViTEncoder: a Vision Transformer of timm as a masked, multi-crop token encoder."""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from einops import rearrange
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sslkit.backbones.blocks import PackedBlock, PackedEvaBlock, run_block
from sslkit.backbones.embedding import embed, positions_of, split
from sslkit.backbones.positions import (
    PosInterpolation,
    check_pos_interpolation,
    resample_positions,
)
from sslkit.backbones.rope import rotations
from sslkit.backbones.supported import require_supported
from sslkit.backbones.token_network import token_network
from sslkit.backbones.tokens import Tokens
from sslkit.ops.packing import Runs, equal_runs

_PACKED = (PackedBlock, PackedEvaBlock)
Grids = list[tuple[int, int, int]]


class ViTEncoder(nn.Module):
    """A token encoder around a timm ``VisionTransformer`` or ``Eva``.

    ``vit`` itself stays as it is. The encoder's ``vit`` is a network of its own that shares the
    parameters: training the encoder trains ``vit``, and moving or casting the encoder moves these
    parameters. Pass ``copy.deepcopy(vit)`` for separate weights. The encoder's network differs from
    ``vit`` in three ways: head and attention pooling are gone; blocks that
    :func:`~sslkit.backbones.blocks.can_pack` accepts are rebuilt as
    :class:`~sslkit.backbones.blocks.PackedBlock` or ``PackedEvaBlock`` with the same parameter
    names; a norm that timm puts after the pooling (``fc_norm``) is moved in front of it, to
    ``norm``, so that every token comes out normalised.

    Other blocks of a ``VisionTransformer`` (parallel, post-norm, differential attention, attention
    dropout, ...) run as they are, one resolution at a time: the same result with less sharing.
    ``packed_blocks`` says which. The encoder is in training mode if ``vit`` is.

    Users of DINOv2 find its methods :meth:`forward_features` and :meth:`get_intermediate_layers`.

    Learned position embeddings are resampled from the grid of ``img_size`` to the grid of each
    image by :func:`~sslkit.backbones.positions.resample_positions`. Rotary ones, of DINOv3 and
    other ``Eva`` networks, are computed for the grid of each image; where the network was built
    with ``rope_shift_coords``, ``rope_jitter_coords`` or ``rope_rescale_coords``, each batch of a
    training pass has its coordinates moved and scaled at random, by the device's global
    generator. The learned ``mask_token`` [D] (zeros at first, as in DINOv2 and DINOv3) replaces
    the embeddings of masked patches before learned positions are added. The convolutions of a
    :class:`~sslkit.backbones.stem.ConvStem` see zeros in the place of masked patches.

    Args:
        vit: the network; see the errors for what cannot be wrapped.
        activation_checkpointing: in training, keep only the input of each block and recompute the
            rest in the backward pass: same gradients, less memory, one more forward pass of time.
        pos_interpolation: how positions are resampled: ``"antialias"`` (timm's rule),
            ``"bicubic"`` or ``"dinov2"`` (the rule of DINOv2 and Franca).
        rope_periods: to which type the periods of rotary positions are rounded. Those in DINOv3's
            own files are bfloat16; timm's and transformers' DINOv3 compute them in float32.
        settings: keyword arguments of :func:`sslkit.backbones.create` that rebuild this network;
            ``create`` fills them in. Without them the encoder cannot be saved.

    Raises:
        TypeError: ``vit`` is not a timm VisionTransformer or Eva, or a subclass or patch embedding
            with a forward pass of its own; or it is an Eva with post-norm blocks, gated or
            grouped-query attention, attention dropout, or learned or three-dimensional rotary
            positions.
        ValueError: ``vit`` drops patches (``patch_drop_rate``), which leaves no patch grid; or it
            is an Eva that keeps rotary positions of one grid (``dynamic_img_size=False``); or
            ``pos_interpolation`` or ``rope_periods`` is unknown.

    >>> vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2)
    >>> encoder = ViTEncoder(vit)
    >>> tokens = encoder(torch.randn(2, 3, 24, 40))
    >>> tokens.cls.shape, tokens.registers.shape, tokens.patches.shape
    (torch.Size([2, 16]), torch.Size([2, 0, 16]), torch.Size([2, 3, 5, 16]))
    """

    def __init__(
        self,
        vit: VisionTransformer | Eva,
        *,
        activation_checkpointing: bool = False,
        pos_interpolation: PosInterpolation = "antialias",
        rope_periods: Literal["float32", "bfloat16"] = "float32",
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        require_supported(vit)
        check_pos_interpolation(pos_interpolation)
        if rope_periods not in ("float32", "bfloat16"):
            raise ValueError(f"rope_periods must be 'float32' or 'bfloat16', got {rope_periods!r}")
        if rope_periods == "bfloat16" and not hasattr(getattr(vit, "rope", None), "periods"):
            raise ValueError("rope_periods is for DINOv3's rotary positions, which vit has not")
        self.vit = token_network(vit)
        self.mask_token = nn.Parameter(vit.patch_embed.proj.weight.new_zeros(vit.embed_dim))
        self.activation_checkpointing = activation_checkpointing
        self.pos_interpolation = pos_interpolation
        self.rope_periods = rope_periods
        self._round_periods_()
        self._settings = None if settings is None else dict(settings)
        self.train(vit.training)

    @property
    def embed_dim(self) -> int:
        """D, the width of every token."""
        return self.vit.embed_dim

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.vit.blocks)

    @property
    def num_heads(self) -> int:
        """Attention heads of a block."""
        heads = (getattr(module, "num_heads", None) for module in self.vit.blocks.modules())
        return next(h for h in heads if h is not None)

    @property
    def in_chans(self) -> int:
        """Channels of an image."""
        return self.vit.patch_embed.proj.in_channels

    @property
    def patch_size(self) -> tuple[int, int]:
        """Height and width of a patch in pixels."""
        ph, pw = self.vit.patch_embed.patch_size
        return ph, pw

    @property
    def img_size(self) -> tuple[int, int]:
        """Height and width of the images that the network was made for."""
        h, w = self.vit.patch_embed.img_size
        return h, w

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches of an image of ``img_size``."""
        H, W = self.vit.patch_embed.grid_size
        return H, W

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before the patches: the class token, then the registers."""
        return self.vit.num_prefix_tokens

    @property
    def packed_blocks(self) -> tuple[bool, ...]:
        """For each block, whether it takes crops of all resolutions in one call."""
        return tuple(isinstance(block, _PACKED) for block in self.vit.blocks)

    @property
    def settings(self) -> dict[str, Any] | None:
        """Arguments of ``create`` that rebuild this network; None if it came another way."""
        if self._settings is None:
            return None
        return {
            **self._settings,
            "img_size": self.img_size,
            "activation_checkpointing": self.activation_checkpointing,
            "pos_interpolation": self.pos_interpolation,
            "rope_periods": self.rope_periods,
        }

    def forward(self, images: Tensor, masks: Tensor | None = None) -> Tokens:
        """Encode images of one resolution.

        Args:
            images: ``[B, C, h, w]``, floating point, h and w multiples of the patch size.
            masks: bool ``[B, H, W]``, True where the mask token replaces the patch; None for none.

        Returns:
            :class:`Tokens` ``(cls [B, D], registers [B, R, D], patches [B, H, W, D])``.

        Raises:
            ValueError: the shape of ``images`` does not fit the network, or ``masks`` the images.
            TypeError: ``images`` is not floating point.
        """
        return self.forward_many([images], [masks])[0]

    def forward_many(
        self, images: Sequence[Tensor], masks: Sequence[Tensor | None] | None = None
    ) -> list[Tokens]:
        """Encode several batches of images, each of its own resolution, in one pass.

        All tokens are packed, batch after batch, to ``[T, D]``. In evaluation the result equals
        separate calls of :meth:`forward`. Neighbours of equal resolution share an attention call.

        Args:
            images: batches ``[B_i, C, h_i, w_i]``.
            masks: one bool ``[B_i, H_i, W_i]`` or None for each batch; None for no mask at all.

        Returns:
            One :class:`Tokens` for each batch, in order.

        Raises:
            ValueError: ``images`` is empty, ``masks`` is not as long, or as in :meth:`forward`.
            TypeError: a batch is not floating point.
        """
        x, _, grids = self._encode(images, masks)
        return self._unpack(self.vit.norm(x), grids)

    def intermediate(self, images: Tensor, n: int) -> list[Tokens]:
        """Tokens of the last ``n`` blocks, shallow to deep, each after the final norm.

        ``intermediate(images, n)[-1]`` equals ``forward(images)``.
        """
        _, layers, grids = self._encode([images], None, keep=self._blocks(n))
        return [self._unpack(self.vit.norm(x), grids)[0] for x in layers]

    def forward_features(self, images: Tensor, masks: Tensor | None = None) -> dict[str, Any]:
        """DINOv2's method of this name: the tokens of images of one resolution, as a dictionary.

        :meth:`forward` gives the same tokens with their patch grid.

        Args:
            images: ``[B, C, h, w]``.
            masks: bool ``[B, N]`` in row-major order, as in DINOv2, or ``[B, H, W]``; True where
                the mask token replaces the patch.

        Returns:
            ``"x_norm_clstoken"`` ``[B, D]``, ``"x_norm_regtokens"`` ``[B, R, D]`` and
            ``"x_norm_patchtokens"`` ``[B, N, D]`` after the final norm; ``"x_prenorm"``, all tokens
            ``[B, 1 + R + N, D]`` before it; ``"masks"`` as given. For a network without a class
            token, ``"x_norm_clstoken"`` is the mean of the patches.

        >>> vit = VisionTransformer(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2)
        >>> features = ViTEncoder(vit).forward_features(torch.randn(2, 3, 24, 40))
        >>> features["x_norm_patchtokens"].shape, features["x_prenorm"].shape
        (torch.Size([2, 15, 16]), torch.Size([2, 16, 16]))
        """
        grid_masks = masks
        if masks is not None and masks.ndim == 2:
            H, W = self._check(images, None, "images")
            if masks.shape[1] != H * W:
                raise ValueError(
                    f"masks must be bool [B, N] with N = {H} * {W} patches, or [B, {H}, {W}], got "
                    f"{list(masks.shape)}"
                )
            grid_masks = rearrange(masks, "b (h w) -> b h w", h=H, w=W)
        x, _, grids = self._encode([images], [grid_masks])
        (tokens,) = self._unpack(self.vit.norm(x), grids)
        (x_prenorm,) = self._crops(x, grids)
        return {
            "x_norm_clstoken": tokens.cls,
            "x_norm_regtokens": tokens.registers,
            "x_norm_patchtokens": rearrange(tokens.patches, "b h w d -> b (h w) d"),
            "x_prenorm": x_prenorm,
            "masks": masks,
        }

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple[Any, ...]:
        """DINOv2's method of this name: patch tokens after several blocks, shallow to deep.

        Args:
            x: images ``[B, C, h, w]``.
            n: the last n blocks, or the indices of the blocks, from 0.
            reshape: give maps ``[B, D, H, W]`` instead of ``[B, N, D]``.
            return_class_token: give pairs ``(patches, class token [B, D])``. For a network without
                a class token, the second is the mean of the patches.
            norm: apply the final norm to each.

        Raises:
            ValueError: there is no such block, or a block is asked for twice.
        """
        _, layers, grids = self._encode([x], None, keep=self._blocks(n))
        pattern = "b h w d -> b d h w" if reshape else "b h w d -> b (h w) d"
        pairs = []
        for layer in layers:
            (tokens,) = self._unpack(self.vit.norm(layer) if norm else layer, grids)
            pairs.append((rearrange(tokens.patches, pattern).contiguous(), tokens.cls))
        return tuple(pairs) if return_class_token else tuple(patches for patches, _ in pairs)

    def queries_keys_values(self, images: Tensor, block: int = -1) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of a block, for attention maps and object discovery.

        Args:
            images: ``[B, C, h, w]``.
            block: its index, from 0; negative counts from the end.

        Returns:
            ``q``, ``k`` and ``v``, each ``[B, heads, T, head_dim]``, T = ``num_prefix_tokens`` +
            H * W, after the q and k norms and rotary positions and before the scale: the attention
            of the block is ``softmax(q @ k.mT * head_dim ** -0.5) @ v``.

        Raises:
            IndexError: there is no such block.
            TypeError: the block is not a packed one, so that what its queries are is not known.
        """
        if not -self.depth <= block < self.depth:
            raise IndexError(f"block must be in [{-self.depth}, {self.depth - 1}], got {block}")
        chosen = self.vit.blocks[block]
        if not isinstance(chosen, _PACKED):
            raise TypeError(
                f"queries_keys_values: block {block} is a {type(chosen).__name__}; they are known "
                "for timm's standard Block with its standard Attention, and for its EvaBlock"
            )
        x, runs, grids = self._pack([images], None)
        rope = self._rotations(grids)
        for earlier in self.vit.blocks[:block]:
            x = self._run(earlier, x, runs, rope)
        qkv = chosen.attn.project(chosen.norm1(x), rope)
        q, k, v = rearrange(qkv, "(b t) three h d -> three b h t d", b=len(images))
        return q, k, v

    def set_img_size_(
        self, img_size: int | tuple[int, int], *, pos_interpolation: PosInterpolation | None = None
    ) -> None:
        """Resample the stored position embedding to the grid of ``img_size``, in place.

        Not needed to encode images of another size, which resamples on the fly; it makes the new
        grid the one that is trained and saved. ``vit.pos_embed`` becomes a new parameter, so build
        the optimizer afterwards. A network without learned positions, such as DINOv3, changes in
        its settings alone.

        Args:
            img_size: ``(height, width)`` or one number, multiples of the patch size.
            pos_interpolation: the rule for this call only. By default it is the encoder's own rule,
                so that images of the new size have the same tokens before and after. The released
                Franca trains with ``"dinov2"`` and prepares its 518-pixel stage with
                ``"antialias"`` (scripts/modify_ckpt_highres.py).

        Raises:
            ValueError: the size is not a multiple of the patch size, or the rule is unknown.
        """
        rule = self.pos_interpolation if pos_interpolation is None else pos_interpolation
        check_pos_interpolation(rule)
        h, w = (img_size, img_size) if isinstance(img_size, int) else img_size
        H, W = self._grid(h, w, "img_size")
        vit = self.vit
        if vit.pos_embed is not None:
            resample = partial(resample_positions, method=rule)
            prefix, patches = positions_of(vit, vit.pos_embed, (H, W), resample)
            resampled = torch.cat([prefix, patches], dim=1).detach().clone()
            vit.pos_embed = nn.Parameter(resampled, requires_grad=vit.pos_embed.requires_grad)
        vit.patch_embed.set_input_size(img_size=(h, w))

    def _grid(self, h: int, w: int, name: str) -> tuple[int, int]:
        ph, pw = self.patch_size
        if h % ph or w % pw or h < ph or w < pw:
            raise ValueError(
                f"{name}: height and width must be positive multiples of the patch size "
                f"{ph} x {pw}, got {h} x {w}; resize or crop to {max(h // ph, 1) * ph} x "
                f"{max(w // pw, 1) * pw}"
            )
        return h // ph, w // pw

    def _resample(self, positions: Tensor, grid: tuple[int, int]) -> Tensor:
        return resample_positions(positions, grid, self.pos_interpolation)

    def _check(self, images: Tensor, masks: Tensor | None, name: str) -> tuple[int, int]:
        if images.ndim != 4 or images.shape[1] != self.in_chans:
            raise ValueError(
                f"{name} must be [B, {self.in_chans}, h, w], got {list(images.shape)}; the number "
                "of channels is in_chans of create()"
            )
        if not images.is_floating_point():
            raise TypeError(f"{name} must be floating point (normalised), got {images.dtype}")
        H, W = self._grid(images.shape[2], images.shape[3], name)
        if masks is not None:
            expected = [len(images), H, W]
            if masks.dtype != torch.bool or list(masks.shape) != expected:
                raise ValueError(
                    f"{name.replace('images', 'masks')} must be bool {expected}, the patch grid of "
                    f"{name} {list(images.shape)}, got {masks.dtype} {list(masks.shape)}"
                )
        return H, W

    def _blocks(self, n: int | Sequence[int]) -> Sequence[int]:
        """Indices of the last ``n`` blocks, or ``n`` itself if it holds indices."""
        if isinstance(n, int):
            if not 1 <= n <= self.depth:
                raise ValueError(f"n must be between 1 and the {self.depth} blocks, got {n}")
            return range(self.depth - n, self.depth)
        if not n or len(set(n)) < len(n) or not 0 <= min(n) <= max(n) < self.depth:
            raise ValueError(
                f"n must be a number of blocks or different indices between 0 and {self.depth - 1},"
                f" got {list(n)}"
            )
        return n

    def _encode(
        self,
        images: Sequence[Tensor],
        masks: Sequence[Tensor | None] | None,
        *,
        keep: Collection[int] = (),
    ) -> tuple[Tensor, list[Tensor], Grids]:
        """Packed tokens ``[T, D]`` after the last block, those after the blocks ``keep``, grids.

        All before the final norm.
        """
        x, runs, grids = self._pack(images, masks)
        rope = self._rotations(grids)
        kept = []
        for i, block in enumerate(self.vit.blocks):
            x = self._run(block, x, runs, rope)
            if i in keep:
                kept.append(x)
        return x, kept, grids

    def _pack(
        self, images: Sequence[Tensor], masks: Sequence[Tensor | None] | None
    ) -> tuple[Tensor, Runs, Grids]:
        """All tokens ``[T, D]``, their runs of equal crops, and each batch's ``(B, H, W)``."""
        if not images:
            raise ValueError("forward_many: images is empty; give at least one batch of images")
        masks = [None] * len(images) if masks is None else masks
        if len(masks) != len(images):
            raise ValueError(
                f"masks must hold one mask or None for each of the {len(images)} batches in "
                f"images, got {len(masks)}"
            )
        packed, grids, lengths, counts = [], [], [], []
        for i, (batch, mask) in enumerate(zip(images, masks, strict=True)):
            grid = self._check(batch, mask, "images" if len(images) == 1 else f"images[{i}]")
            x = embed(self.vit, batch, grid, self._resample, mask_token=self.mask_token, masks=mask)
            B, length, _ = x.shape
            packed.append(rearrange(x, "b n d -> (b n) d"))
            lengths.append(length)
            counts.append(B)
            grids.append((B, *grid))
        x = packed[0] if len(packed) == 1 else torch.cat(packed)
        return x, equal_runs(lengths, counts), grids

    def _rotations(self, grids: Sequence[tuple[int, int, int]]) -> Tensor | None:
        """Rotary positions of the packed tokens, ``[T, 2 * head_dim]``; None where there are none.

        Once for all blocks, also for those that a checkpoint runs again.
        """
        rope = getattr(self.vit, "rope", None)
        if rope is None:
            return None
        return rotations(rope, grids, num_prefix_tokens=self.num_prefix_tokens)

    def _round_periods_(self) -> None:
        rope = getattr(self.vit, "rope", None)
        if rope is not None and self.rope_periods == "bfloat16":
            rope.periods.copy_(rope.periods.bfloat16())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ViTEncoder":
        """``to``, ``half``, ...: timm computes the periods anew after some of these."""
        super()._apply(fn, recurse)
        self._round_periods_()
        return self

    def _run(self, block: nn.Module, x: Tensor, runs: Runs, rope: Tensor | None) -> Tensor:
        if self.activation_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(run_block, block, x, runs, rope, use_reentrant=False)
        return run_block(block, x, runs, rope)

    def _crops(self, x: Tensor, grids: Grids) -> list[Tensor]:
        """Packed tokens ``[T, D]`` as one ``[B, P + N, D]`` for each batch."""
        lengths = [self.num_prefix_tokens + H * W for _, H, W in grids]
        parts = x.split([B * n for (B, _, _), n in zip(grids, lengths, strict=True)])
        return [
            rearrange(part, "(b n) d -> b n d", n=n) for part, n in zip(parts, lengths, strict=True)
        ]

    def _unpack(self, x: Tensor, grids: Grids) -> list[Tokens]:
        """Packed tokens ``[T, D]`` as one :class:`Tokens` for each batch."""
        return [
            split(self.vit, part, (H, W))
            for part, (_, H, W) in zip(self._crops(x, grids), grids, strict=True)
        ]
