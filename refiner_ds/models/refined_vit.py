"""Refined-ViT: the released layout, the paper's, and the plain ViT with the same skeleton.

    image ─ stem ─ mix-token ─ class token, positions ─ blocks ─ norm ─┬─ head (class token)
                                                                       └─ aux_head (every patch)

Released layout: even blocks make maps, odd blocks refine the map of the block before. Paper: every block refines its
own. Axes: B batch, H heads, E maps that multiply values, N tokens (class token first), P patches, D width, C classes,
h×w the patch grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, cast

import torch
from timm.layers import calculate_drop_path_rates, resample_abs_pos_embed
from timm.models._features import feature_take_indices
from timm.models._input import update_model_input_size
from torch import Tensor, nn

from refiner_ds.models.attention import (
    AttentionOptions,
    MapAttention,
    PlainAttention,
    RefinedAttention,
    SharedAttention,
    attention_of,
)
from refiner_ds.models.blocks import UNITS, Block, BlockStack, Checkpoint
from refiner_ds.models.cos_reg import OneTimeLoss, neighbour_similarity
from refiner_ds.models.fuse import fuse_block, fuse_stem, refuse_unfoldable
from refiner_ds.models.mix_token import NO_BOX, Box, draw_mix_box, swap_in_box
from refiner_ds.models.mlp import ScaledMlp
from refiner_ds.models.options import check_box, check_count, check_options
from refiner_ds.models.patterns import matching
from refiner_ds.models.stem import ConvStem, grid_of

__all__ = ["RefinedViT"]

GRID = "pos_embed_grid"  # rows and columns of a grid that is not square, saved with the weights


class RefinedViT(nn.Module):
    """Vision transformer with refined attention (arXiv 2106.03714).

    Args:
        img_size, patch_size, in_chans, stem_chs: image and patch side in pixels, channels of the image and of the stem.
        num_classes: outputs of both heads; 0 leaves the heads out.
        global_pool: "token", the only one: the class token is read.
        embed_dim, depth, num_heads, mlp_ratio, qkv_bias: the transformer.
        layout: "released" (blocks alternate, residual maps, gain 2, scaled MLP) or "paper" (a plain pre-norm ViT
            whose every block refines its own map).
        refiner: "bottleneck" (released), "linear" (paper) or "none" (a plain ViT, by PyTorch's fused attention).
        expansion_ratio, kernel_size, constraint: expanded maps a head, kernel of local attention, and "none",
            "spatial" or "row+col".
        expand, reduce: False leaves out expansion (local attention alone) or reduction (every expanded map then
            multiplies its head's values and the output projection is that much wider); linear refiner only.
        return_dense: False leaves out the auxiliary head: the model returns class logits alone, always.
        mix_token: mix patches in training.
        cos_reg: weight of the penalty on the similarity of neighbouring blocks' maps (released: 0.1), 0 for none;
            see ``cos_reg_loss``.
        cos_reg_pairs: how many neighbouring pairs it compares, from the first block on; ``None`` for all of them.
        init_values: initial value of the MLP's learned scale, ``None`` for no scale; "layout" is 1e-5 when released.
        drop_rate, pos_drop_rate, proj_drop_rate, attn_drop_rate, drop_path_rate: dropout before the heads, on the
            embedded tokens, in projections and MLPs, on maps, and of whole branches (growing linearly with depth).
    Raises:
        ValueError: options that do not fit each other, in one sentence.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: Literal["token"] = "token",
        embed_dim: int = 384,
        depth: int = 16,
        num_heads: int = 12,
        mlp_ratio: float = 3.0,
        qkv_bias: bool = True,
        layout: Literal["released", "paper"] = "paper",
        refiner: Literal["none", "linear", "bottleneck"] = "linear",
        expansion_ratio: float = 3,
        kernel_size: int = 3,
        constraint: str = "none",
        expand: bool = True,
        reduce: bool = True,
        stem_chs: tuple[int, int, int] = (32, 64, 128),
        return_dense: bool = True,
        mix_token: bool = False,
        cos_reg: float = 0.0,
        cos_reg_pairs: int | None = None,
        init_values: float | None | Literal["layout"] = "layout",
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        check_options({name: value for name, value in locals().items() if name not in ("self", "__class__")})
        super().__init__()
        grid, patch_size = grid_of(img_size, patch_size), int(patch_size)
        self.num_classes, self.patch_size, self.in_chans, self.global_pool = num_classes, patch_size, in_chans, "token"
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.num_prefix_tokens = 1
        self.return_dense, self.mix_token = return_dense, mix_token
        self.cos_reg = cos_reg
        self.cos_reg_pairs = depth - 1 if cos_reg_pairs is None else cos_reg_pairs
        self.layout, self.refiner = layout, refiner
        self._cos_reg_loss = OneTimeLoss()
        self._fused = False
        self._frozen_norms: set[str] = set()

        self.patch_embed = ConvStem(patch_size, in_chans, stem_chs, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self._set_grid(grid)
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.patch_grid[0] * self.patch_grid[1], embed_dim))
        self.pos_drop = nn.Dropout(pos_drop_rate)
        options = AttentionOptions(
            embed_dim, num_heads, self.patch_grid, qkv_bias, refiner, expansion_ratio, kernel_size, constraint,
            expand, reduce, attn_drop_rate, proj_drop_rate,
        )  # fmt: skip
        gain: float
        scale: float | None
        gain, scale = (2.0, 1e-5) if layout == "released" else (1.0, None)
        scale = scale if isinstance(init_values, str) else init_values
        hidden = int(embed_dim * mlp_ratio)
        self.blocks = BlockStack(
            Block(
                _attention_kind(layout, refiner, index)(options),
                ScaledMlp(embed_dim, hidden, proj_drop_rate, scale),
                embed_dim,
                drop_path,
                gain,
            )
            for index, drop_path in enumerate(cast(list[float], calculate_drop_path_rates(drop_path_rate, depth)))
        )
        self.blocks.set_passes_map(cos_reg > 0)
        self.feature_info = [
            {"module": f"blocks.{index}", "num_chs": embed_dim, "reduction": patch_size} for index in range(depth)
        ]
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        if return_dense:
            self.aux_head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self.init_weights()

    def init_weights(self) -> None:
        """Truncated normal (std 0.02) for linear weights and tokens, zero biases; convolutions stay PyTorch's."""
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.apply(_init_linear)

    # -- forward ----------------------------------------------------------------------------------------------------

    def forward(
        self, x_B3HW: Tensor, mix_box: Box | Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor, Box | Tensor]:
        """Logits; in training also those of every patch, and the box that was mixed.

        Args:
            x_B3HW: images.
            mix_box: (y0, x0, y1, x1) in patch cells, for training; ``None`` draws one if ``mix_token`` is on. A tensor
                of the four is as good; a compiled step is then compiled once for all boxes.
        Returns:
            In training class logits [B, C], patch logits [B, P, C] (flipped back inside the box) and the box;
            in evaluation head + ½·max over patches of aux_head, [B, C]. Without ``return_dense`` class logits, always.
        Raises:
            ValueError: the images' size is not the model's, or the box lies outside the patch grid.
        """
        if not self.training:
            return self.forward_head(self.forward_features(x_B3HW))
        if mix_box is None:
            mix_box = draw_mix_box(self.patch_grid) if self.mix_token else NO_BOX
        elif not torch.compiler.is_compiling():  # a check of numbers that change every step would compile it every step
            mix_box = check_box(mix_box, self.patch_grid)
        box = cast(Box, tuple(mix_box.unbind())) if isinstance(mix_box, Tensor) else mix_box
        if not self.return_dense:
            if isinstance(box[0], Tensor) or box != NO_BOX:
                raise ValueError("mix_box mixes the labels of patches, which return_dense=False leaves out")
            return self.forward_head(self.forward_features(x_B3HW))
        x_BND = self.head_drop(self.forward_features(x_B3HW, box))
        aux_BPC = self.aux_head(x_BND[:, 1:])
        aux_BhwC = aux_BPC.unflatten(1, self.patch_grid)
        patch_BPC = swap_in_box(aux_BhwC, box, grid_axis=1).flatten(1, 2)
        # What is traced gives tensors alone.
        return self.head(x_BND[:, 0]), patch_BPC, torch.tensor(mix_box) if torch.jit.is_tracing() else mix_box

    def forward_features(self, x_B3HW: Tensor, mix_box: Box = NO_BOX) -> Tensor:
        """The tokens behind the final norm, [B, N, D]."""
        x_BND, maps = self.blocks(self._embed(x_B3HW, mix_box))
        penalty = None
        if self.cos_reg and self.training:
            makes_map = [attention_of(block).makes_map for block in self.blocks]
            penalty = self.cos_reg * neighbour_similarity(maps, makes_map, self.cos_reg_pairs)
        self._cos_reg_loss.put(penalty)
        return self.norm(x_BND)

    def forward_head(self, x_BND: Tensor, pre_logits: bool = False) -> Tensor:
        """Evaluation logits [B, C] of the tokens; with ``pre_logits`` the class token [B, D]."""
        x_BND = self.head_drop(x_BND)
        if pre_logits or not self.num_classes:
            return x_BND[:, 0]
        class_BC = self.head(x_BND[:, 0])
        return class_BC + 0.5 * self.aux_head(x_BND[:, 1:]).amax(1) if self.return_dense else class_BC

    def cos_reg_loss(self) -> Tensor:
        """The cos-reg penalty of the last training forward, a scalar in fp32 to be added to the loss.

        ``cos_reg`` times the mean, over the first ``cos_reg_pairs`` pairs of neighbouring blocks, of the cosine
        similarity of their maps along the heads axis; see ``cos_reg.py``. It is given out once, so that the model
        never holds on to a graph.

        Raises:
            ValueError: ``cos_reg`` is 0, or no training forward has run since the last call.
        """
        return self._cos_reg_loss.take()

    def _embed(self, x_B3HW: Tensor, mix_box: Box) -> Tensor:
        height, width = (cells * self.patch_size for cells in self.patch_grid)
        if tuple(x_B3HW.shape[1:]) != (self.in_chans, height, width):
            got = "x".join(str(side) for side in x_B3HW.shape[1:])
            raise ValueError(
                f"images are {got}, but the model takes {self.in_chans}x{height}x{width}; set_input_size changes that"
            )
        if not torch.compiler.is_compiling():
            mix_box = check_box(mix_box, self.patch_grid)
        # The stem's dtype, whatever its layers have become; quantised ones have no parameter.
        dtype = next((weight.dtype for weight in self.patch_embed.parameters()), self.cls_token.dtype)
        patches_BDhw = self.patch_embed(x_B3HW.to(dtype))
        patches_BPD = swap_in_box(patches_BDhw, mix_box, grid_axis=2).flatten(2).mT
        x_BND = torch.cat((self.cls_token.expand(x_B3HW.shape[0], -1, -1).to(patches_BPD.dtype), patches_BPD), 1)
        return self.pos_drop(x_BND + self.pos_embed)

    @torch.no_grad()
    def attention_maps(self, x_B3HW: Tensor, refined: bool = True) -> list[Tensor]:
        """The attention maps of each block, as in evaluation: a list of [B, E, N, N], fp32.

        Args:
            x_B3HW: images.
            refined: the maps that multiply the values, E of them (as many as heads, unless the refiner does not
                reduce); otherwise the ones a block refines, [B, H, N, N]. In a block without a refiner both are one.
        """
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        self.blocks.set_passes_map(True)
        try:
            x_BND, residual_BHNN, maps = self._embed(x_B3HW, NO_BOX), None, []
            for block in self.blocks:
                x_BND, residual_BHNN, map_BENN = block.forward_with_map(x_BND, residual_BHNN)
                maps.append((map_BENN if refined else cast(Tensor, residual_BHNN)).float())
            return maps
        finally:
            self.blocks.set_passes_map(self.cos_reg > 0)
            for module, training in modes:
                module.training = training

    # -- timm's conventions ------------------------------------------------------------------------------------------

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """The output of chosen blocks, [B, D, h, w] or with ``output_fmt`` "NLC" [B, P, D], as timm's models give it.

        Raises:
            ValueError: an index or format that does not exist.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt is {output_fmt!r}; it must be NCHW or NLC")
        take, last = self._block_indices(indices)
        x_BND = self._embed(x, NO_BOX)
        taken, residual_BHNN = [], None
        for index, block in enumerate(list(self.blocks)[: last + 1] if stop_early else self.blocks):
            x_BND, residual_BHNN = block(x_BND, residual_BHNN)
            if index in take:
                taken.append(self.norm(x_BND) if norm else x_BND)
        prefixes = [tokens_BND[:, :1] for tokens_BND in taken]
        outputs = [tokens_BND[:, 1:] for tokens_BND in taken]
        if output_fmt == "NCHW":
            outputs = [patches_BPD.mT.unflatten(2, self.patch_grid).contiguous() for patches_BPD in outputs]
        intermediates = list(zip(outputs, prefixes, strict=True)) if return_prefix_tokens else outputs
        return intermediates if intermediates_only else (self.norm(x_BND), intermediates)

    def _block_indices(self, indices: int | list[int] | None) -> tuple[list[int], int]:
        try:
            return feature_take_indices(len(self.blocks), indices)
        except (AssertionError, TypeError):
            depth = len(self.blocks)
            raise ValueError(
                f"indices is {indices!r}; it must be blocks from {-depth} to {depth - 1}, or how many of the last,"
                f" 1 to {depth}"
            ) from None

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the blocks behind the last one asked for, and the heads; returns the indices kept."""
        take, last = self._block_indices(indices)
        del self.blocks[last + 1 :]
        self.cos_reg_pairs = min(self.cos_reg_pairs, last)
        if prune_norm:
            self.norm = nn.Identity()  # type: ignore[assignment]
        if prune_head:
            self.reset_classifier(0)
        return take

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Fresh heads for ``num_classes`` classes; 0 removes them.

        Raises:
            ValueError: ``global_pool`` is not the class token's, or there is no such number of classes.
        """
        if global_pool not in (None, "token"):
            raise ValueError(f"global_pool is {global_pool!r}; these models read the class token: use 'token'")
        check_count("num_classes", num_classes, 0)
        self.num_classes = num_classes
        for name in ("head", "aux_head") if self.return_dense else ("head",):
            layer = nn.Linear(self.embed_dim, num_classes) if num_classes else nn.Identity()
            setattr(self, name, layer.apply(_init_linear).to(self.cls_token.device, self.cls_token.dtype))

    def get_classifier(self) -> nn.Module:
        """The class token's head."""
        return self.head

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Take images, or patches, of another size from now on; what is frozen stays frozen.

        The position embedding is resized, its class entry kept; another patch size resamples the patch embedding.

        Raises:
            ValueError: the size is not a multiple of the patch size, or patches are not square.
        """
        if isinstance(patch_size, tuple | list):
            if len(set(patch_size)) != 1:
                raise ValueError(f"patch_size is {tuple(patch_size)}; patches are square here: give one number")
            patch_size = patch_size[0]
        patch_size = self.patch_size if patch_size is None else patch_size
        if img_size is None:
            img_size = (self.patch_grid[0] * self.patch_size, self.patch_grid[1] * self.patch_size)
        grid, before = grid_of(img_size, patch_size), self.patch_grid
        if patch_size != self.patch_size:
            self.patch_embed.set_patch_size(patch_size)
            self.patch_size = patch_size
            self.feature_info = [{**block, "reduction": patch_size} for block in self.feature_info]
        if grid != before:
            resized = resample_abs_pos_embed(self.pos_embed.detach(), list(grid), list(before), num_prefix_tokens=1)
            self.pos_embed = nn.Parameter(resized.contiguous(), requires_grad=self.pos_embed.requires_grad)
        self._set_grid(grid)
        for block in self.blocks:
            attention_of(block).grid = grid
        update_model_input_size(self, (grid[0] * patch_size, grid[1] * patch_size), patch_size=patch_size)

    def _set_grid(self, grid: tuple[int, int]) -> None:
        self.patch_grid = grid
        if grid[0] == grid[1]:
            self._buffers.pop(GRID, None)  # a square one follows from its number of patches, as in released weights
        else:
            self.register_buffer(GRID, torch.tensor(grid, device=self.cls_token.device))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Positions of another grid with as many patches would be copied without a word.
        saved, positions = state_dict.get(prefix + GRID), state_dict.get(prefix + "pos_embed")
        grid = tuple(saved.tolist()) if isinstance(saved, Tensor) else _square(self.patch_grid)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if grid not in (None, self.patch_grid) and positions is not None and positions.shape == self.pos_embed.shape:
            errors: list[str] = args[-1]
            theirs, ours = ("x".join(map(str, sides)) for sides in (cast(tuple[int, ...], grid), self.patch_grid))
            errors.append(
                f"pos_embed is of a {theirs} patch grid, the model's is {ours}; load_released_weights resizes it"
            )
            self._set_grid(self.patch_grid)

    def set_grad_checkpointing(
        self,
        enable: bool = True,
        unit: Literal["pair", "block", "refiner"] = "pair",
        checkpoint: Checkpoint | None = None,
    ) -> None:
        """Recompute activations in backward instead of saving them; results stay the same to the bit.

        Args:
            enable: on or off.
            unit: what is recomputed as one: two blocks, one, or only the refiner of each.
            checkpoint: called as ``checkpoint(function, *tensors)``, for example
                ``deepspeed.checkpointing.checkpoint``; ``None`` is torch's, non-reentrant.
        Raises:
            ValueError: the unit is unknown.
        """
        if unit not in tuple(UNITS):
            raise ValueError(f"unit is {unit!r}; it must be one of {', '.join(UNITS)}")
        self.blocks.set_checkpointing(unit if enable else None, checkpoint)

    def freeze(self, patterns: Iterable[str]) -> list[str]:
        """Leave parameters untrained from now on; batch norms frozen whole use and keep their running statistics.

        Args:
            patterns: names, prefixes, or shell patterns of either: "pos_embed", "patch_embed", "blocks.[0-3]".
        Returns:
            The names of what is frozen now.
        Raises:
            ValueError: a pattern names no parameter.
        """
        frozen = matching(patterns, dict(self.named_parameters()))
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and name not in frozen)
        for name, module in self.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and f"{name}.weight" in frozen:
                self._frozen_norms.add(name)
        self.train(self.training)
        return sorted(frozen)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that optimizers should not decay (beside biases and gains)."""
        return {"pos_embed", "cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that put parameters in layers, for layer-wise learning rates."""
        return {
            "stem": r"^cls_token|pos_embed|patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def fuse(self) -> RefinedViT:
        """Fold every batch norm and layer scale into its neighbour, for inference; changes this model, in place.

        Returns:
            The model itself, in evaluation mode.
        Raises:
            ValueError: a layer that cannot be folded (an adapter, a hook); nothing has been changed.
        """
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            refuse_unfoldable(self.patch_embed, cast(Iterable[Block], self.blocks))
        except ValueError:
            for module, training in modes:
                module.training = training
            raise
        fuse_stem(self.patch_embed)
        for block in self.blocks:
            fuse_block(cast(Block, block))
        self._fused = True
        return self

    def train(self, mode: bool = True) -> RefinedViT:
        """Training or evaluation mode.

        Raises:
            ValueError: training, of a fused model.
        """
        if mode and self._fused:
            raise ValueError("a fused model has no norms left to train; create the model again and load its weights")
        super().train(mode)
        for name, module in self.named_modules() if self._frozen_norms else ():
            if name in self._frozen_norms:
                module.training = False
        return self


def _square(grid: tuple[int, int]) -> tuple[int, int] | None:
    """The square grid with as many patches, if there is one: weights without a grid are of a square one."""
    side = math.isqrt(grid[0] * grid[1])
    return (side, side) if side * side == grid[0] * grid[1] else None


def _attention_kind(layout: str, refiner: str, index: int) -> Callable[[AttentionOptions], nn.Module]:
    if refiner == "none":
        return PlainAttention
    if layout == "paper":
        return RefinedAttention
    return SharedAttention if index % 2 else MapAttention


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
