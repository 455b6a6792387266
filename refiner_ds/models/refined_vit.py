"""Refined-ViT: the released layout, the paper's, and the plain twin of both.

    picture ─ stem ─ mix-token ─ class token, positions ─ blocks ─ norm ─┬─ head (class token)
                                                                         └─ aux_head (every patch)

Released layout: even blocks make maps, odd blocks refine the one handed on. Paper: every block refines its own.
Axes: B batch, H heads, E maps that multiply values, N tokens (class token first), P patches, D width, C classes,
h×w the patch grid.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, cast

import torch
from timm.layers import calculate_drop_path_rates, resample_abs_pos_embed
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from refiner_ds.attention import recompute_aware
from refiner_ds.models.attention import (
    AttentionOptions,
    MapAttention,
    PlainAttention,
    RefinedAttention,
    SharedAttention,
)
from refiner_ds.models.blocks import Block, ScaledMlp
from refiner_ds.models.checkpointing import UNITS, Checkpoint, non_reentrant
from refiner_ds.models.cos_reg import neighbour_similarity
from refiner_ds.models.fuse import fuse_block, fuse_stem
from refiner_ds.models.mixing import NO_BOX, Box, draw_mix_box, swap_in_box
from refiner_ds.models.options import check_options
from refiner_ds.models.stem import ConvStem, grid_of

__all__ = ["RefinedViT"]


class RefinedViT(nn.Module):
    """Vision transformer with refined attention (arXiv 2106.03714).

    Args:
        img_size, patch_size, in_chans, stem_chs: the picture in pixels, the patch, its channels, and the stem's.
        num_classes: outputs of both heads; 0 takes the heads away.
        embed_dim, depth, num_heads, mlp_ratio, qkv_bias: the transformer.
        layout: "released" (blocks alternate, residual maps, gain 2, scaled MLP) or "paper" (a plain pre-norm ViT
            whose every block refines its own map).
        refiner: "bottleneck" (released), "linear" (paper) or "none" (the plain twin, by fused attention).
        expansion_ratio, kernel_size, constraint: expanded maps a head, kernel of local attention, and "none",
            "spatial" or "row+col".
        expand, reduce: off, they leave out expansion (local attention alone) or reduction (every expanded map then
            multiplies its head's values and the output projection is that much wider); linear refiner only.
        mix_token: mix patches in training.
        cos_reg: weight of the penalty on the similarity of neighbouring maps (released: 0.1); see ``cos_reg_loss``.
        init_values: start of the MLP's learned scale, ``None`` for no scale; "layout" is 1e-5 when released.
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
        mix_token: bool = False,
        cos_reg: float = 0.0,
        init_values: float | None | Literal["layout"] = "layout",
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        check_options(embed_dim, num_heads, depth, layout, refiner, expand, reduce)
        self.num_classes, self.patch_size, self.in_chans = num_classes, patch_size, in_chans
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.patch_grid = grid_of(img_size, patch_size)
        self.mix_token, self.cos_reg = mix_token, cos_reg
        self.layout, self.refiner = layout, refiner
        self._checkpoint: Checkpoint | None = None
        self._blocks_a_checkpoint = 0
        self._cos_reg_loss: Tensor | None = None
        self._fused = False

        self.patch_embed = ConvStem(patch_size, in_chans, stem_chs, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
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
        self.blocks = nn.ModuleList(
            Block(
                _attention_kind(layout, refiner, index)(options),
                ScaledMlp(embed_dim, hidden, proj_drop_rate, scale),
                embed_dim,
                drop_path,
                gain,
            )
            for index, drop_path in enumerate(cast(list[float], calculate_drop_path_rates(drop_path_rate, depth)))
        )
        self.feature_info = [
            {"module": f"blocks.{index}", "num_chs": embed_dim, "reduction": patch_size} for index in range(depth)
        ]
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self.aux_head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self.init_weights()

    def init_weights(self) -> None:
        """Truncated normal (std 0.02) for linear weights and tokens, zero biases; convolutions stay PyTorch's."""
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.apply(_init_linear)

    # -- forward ----------------------------------------------------------------------------------------------------

    def forward(self, x_B3HW: Tensor, mix_box: Box | None = None) -> Tensor | tuple[Tensor, Tensor, Box]:
        """Logits; in training also those of every patch, and the box that was mixed.

        Args:
            x_B3HW: pictures.
            mix_box: (y0, x0, y1, x1) in patch cells, for training; ``None`` draws one if ``mix_token`` is on.
        Returns:
            In training class logits [B, C], patch logits [B, P, C] (flipped back inside the box) and the box;
            in evaluation head + ½·max over patches of aux_head, [B, C].
        Raises:
            ValueError: the picture's size is not the model's.
        """
        if not self.training:
            return self.forward_head(self.forward_features(x_B3HW))
        if mix_box is None:
            mix_box = draw_mix_box(self.patch_grid) if self.mix_token else NO_BOX
        x_BND = self.head_drop(self.forward_features(x_B3HW, mix_box))
        aux_BPC = self.aux_head(x_BND[:, 1:])
        aux_BhwC = aux_BPC.unflatten(1, self.patch_grid)
        return self.head(x_BND[:, 0]), swap_in_box(aux_BhwC, mix_box, grid_axis=1).flatten(1, 2), mix_box

    def forward_features(self, x_B3HW: Tensor, mix_box: Box = NO_BOX) -> Tensor:
        """The tokens behind the final norm, [B, N, D]."""
        x_BND = self._embed(x_B3HW, mix_box)
        keep_maps = bool(self.cos_reg) and self.training
        x_BND, maps = self._run_blocks(x_BND, keep_maps)
        self._cos_reg_loss = self.cos_reg * neighbour_similarity(maps) if keep_maps else None
        return self.norm(x_BND)

    def forward_head(self, x_BND: Tensor, pre_logits: bool = False) -> Tensor:
        """Evaluation logits [B, C] of the tokens; with ``pre_logits`` the class token [B, D]."""
        x_BND = self.head_drop(x_BND)
        if pre_logits or not self.num_classes:
            return x_BND[:, 0]
        return self.head(x_BND[:, 0]) + 0.5 * self.aux_head(x_BND[:, 1:]).amax(1)

    def cos_reg_loss(self) -> Tensor:
        """The penalty of the last training forward, a scalar to be added to the loss: weight · mean cosine similarity.

        It is handed over once, so that the model never holds on to a graph.

        Raises:
            ValueError: ``cos_reg`` is 0, or no training forward has run since the last call.
        """
        penalty, self._cos_reg_loss = self._cos_reg_loss, None
        if penalty is None:
            raise ValueError("there is no cos-reg penalty: create the model with cos_reg=0.1 and run it in training")
        return penalty

    def _embed(self, x_B3HW: Tensor, mix_box: Box) -> Tensor:
        height, width = (cells * self.patch_size for cells in self.patch_grid)
        if tuple(x_B3HW.shape[2:]) != (height, width):
            got = "x".join(str(side) for side in x_B3HW.shape[2:])
            raise ValueError(f"pictures are {got}, but the model was made for {height}x{width}; see set_input_size")
        patches_BDhw = self.patch_embed(x_B3HW.to(self.patch_embed.conv1.weight.dtype))
        patches_BPD = swap_in_box(patches_BDhw, mix_box, grid_axis=2).flatten(2).mT
        x_BND = torch.cat((self.cls_token.expand(x_B3HW.shape[0], -1, -1).to(patches_BPD.dtype), patches_BPD), 1)
        return self.pos_drop(x_BND + self.pos_embed)

    def _run_blocks(self, x_BND: Tensor, keep_maps: bool = False) -> tuple[Tensor, list[Tensor]]:
        """The stream behind all blocks, and with ``keep_maps`` the maps that multiplied the values."""
        recompute = self._blocks_a_checkpoint if self.training and torch.is_grad_enabled() else 0
        stride = recompute or 1
        stream: tuple[Tensor, ...] = (x_BND,)
        maps: list[Tensor] = []
        for first in range(0, len(self.blocks), stride):
            stage = partial(_run_stage, self.blocks[first : first + stride], keep_maps)
            if recompute and self._checkpoint is not None:
                out = self._checkpoint(recompute_aware(stage), *stream)
                out = out if isinstance(out, tuple) else (out,)
            else:
                out = stage(*stream)
            kept = min(stride, len(self.blocks) - first) if keep_maps else 0
            stream, maps = out[: len(out) - kept], maps + list(out[len(out) - kept :])
        return stream[0], maps

    @torch.no_grad()
    def attention_maps(self, x_B3HW: Tensor) -> list[Tensor]:
        """The maps that multiply the values in each block, as in evaluation: a list of [B, E, N, N], fp32.

        E is the number of heads, unless the refiner does not reduce.
        """
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            return [map_BENN.float() for map_BENN in self._run_blocks(self._embed(x_B3HW, NO_BOX), True)[1]]
        finally:
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
        take, last = feature_take_indices(len(self.blocks), indices)
        x_BND = self._embed(x, NO_BOX)
        taken, residual_BHNN = [], None
        for index, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            x_BND, residual_BHNN, _ = block(x_BND, residual_BHNN)
            if index in take:
                taken.append(self.norm(x_BND) if norm else x_BND)
        prefixes = [tokens_BND[:, :1] for tokens_BND in taken]
        outputs = [tokens_BND[:, 1:] for tokens_BND in taken]
        if output_fmt == "NCHW":
            outputs = [patches_BPD.mT.unflatten(2, self.patch_grid).contiguous() for patches_BPD in outputs]
        intermediates = list(zip(outputs, prefixes, strict=True)) if return_prefix_tokens else outputs
        return intermediates if intermediates_only else (self.norm(x_BND), intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Take away the blocks behind the last one asked for, and the heads; returns the indices kept."""
        take, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()  # type: ignore[assignment]
        if prune_head:
            self.reset_classifier(0)
        return take

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New heads for ``num_classes`` classes; 0 takes them away.

        Raises:
            ValueError: ``global_pool`` is not the class token's.
        """
        if global_pool not in (None, "token"):
            raise ValueError(f"global_pool is {global_pool!r}; these models read the class token: use 'token'")
        self.num_classes = num_classes
        for name in ("head", "aux_head"):
            layer = nn.Linear(self.embed_dim, num_classes) if num_classes else nn.Identity()
            setattr(self, name, layer.apply(_init_linear).to(self.cls_token.device, self.cls_token.dtype))

    def get_classifier(self) -> nn.Module:
        """The class token's head."""
        return self.head

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Take pictures of another size from now on: the position embedding is resized, its class entry kept.

        Raises:
            ValueError: the size is not a multiple of the patch size.
        """
        grid, before = grid_of(img_size, self.patch_size), self.patch_grid
        resized = resample_abs_pos_embed(self.pos_embed.detach(), list(grid), list(before), num_prefix_tokens=1)
        self.pos_embed = nn.Parameter(resized.contiguous())
        self.patch_grid = grid
        for attn in self._attentions():
            attn.grid = grid

    def set_grad_checkpointing(
        self,
        enable: bool = True,
        unit: Literal["pair", "block", "refiner"] = "pair",
        checkpoint: Checkpoint | None = None,
    ) -> None:
        """Recompute activations in backward instead of keeping them; results stay the same to the bit.

        Args:
            enable: on or off.
            unit: what is recomputed as one: two blocks, one, or only the refiner of each.
            checkpoint: called as ``checkpoint(function, *tensors)``, for example
                ``deepspeed.checkpointing.checkpoint``; ``None`` is torch's, non-reentrant.
        Raises:
            ValueError: the unit is unknown.
        """
        if unit not in UNITS:
            raise ValueError(f"unit is {unit!r}; it must be one of {', '.join(UNITS)}")
        function = (checkpoint or non_reentrant) if enable else None
        self._checkpoint = function
        self._blocks_a_checkpoint = UNITS[unit] if enable else 0
        for attn in self._attentions():
            if isinstance(attn, RefinedAttention | SharedAttention):
                attn.checkpoint = function if unit == "refiner" else None

    def _attentions(self) -> list[Any]:
        return [block.attn for block in self.blocks]

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
        """
        self.eval()
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
        return super().train(mode)


def _attention_kind(layout: str, refiner: str, index: int) -> Callable[[AttentionOptions], nn.Module]:
    if refiner == "none":
        return PlainAttention
    if layout == "paper":
        return RefinedAttention
    return SharedAttention if index % 2 else MapAttention


def _run_stage(blocks: nn.ModuleList, keep_maps: bool, *stream: Tensor) -> tuple[Tensor, ...]:
    """Some blocks on (x) or (x, residual map): the same again, and behind them the maps used, if they are kept."""
    x_BND, residual_BHNN = stream if len(stream) == 2 else (stream[0], None)
    used: list[Tensor] = []
    for block in blocks:
        x_BND, residual_BHNN, used_BENN = block(x_BND, residual_BHNN, keep_maps)
        used += [used_BENN] if keep_maps else []
    return (x_BND, *(() if residual_BHNN is None else (residual_BHNN,)), *used)


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
