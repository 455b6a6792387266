"""The refiners as modules: they hold the weights under their released names and give them to ``attention.refine``.

    MapRefiner (linear)      conv_exp ─ depth_sep_conv ─ conv_pro
    DLA (bottleneck)         conv_exp ─ bn1 ─ depth_sep_conv ─ bn2 ─ conv_pro ─ bn3, and adapt_bn outside
    FoldedDLA                the bottleneck for inference, norms folded

``weights`` gives what the operator reads; where a layer is more than its weights (an adapter, a hook, a norm over
ranks; see ``direct.py``) it is ``None``, and calling the module computes the refined map layer by layer instead.
Axes: B batch, H heads, E expanded maps, N tokens.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refiner_ds.attention import (
    BatchNorm,
    BottleneckWeights,
    FoldedWeights,
    LinearWeights,
    LocalKernels,
    expanded_maps,
    kernel_shapes,
    refined_map,
)
from refiner_ds.models.direct import batch_norm_tensors, can_read

__all__ = ["DLA", "FoldedDLA", "LocalConv", "MapRefiner"]


class LocalConv(nn.Module):
    """The kernels of distributed local attention: ``weight`` on the map's plane, otherwise one a grid axis."""

    def __init__(self, maps: int, kernel_size: int, constraint: str) -> None:
        super().__init__()
        self.constraint = constraint
        self.names = []
        for name, (rows, columns) in kernel_shapes(constraint, kernel_size).items():
            self.names.append("weight" if constraint == "none" else name)
            self.register_parameter(self.names[-1], nn.Parameter(torch.empty(maps, 1, rows, columns)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the kernels as ``torch.nn.Conv2d`` draws its own."""
        for kernel in self.parameters():
            nn.init.kaiming_uniform_(kernel, a=math.sqrt(5))

    def kernels(self, grid: tuple[int, int]) -> LocalKernels:
        """The kernels as the operator takes them."""
        return LocalKernels(tuple(getattr(self, name) for name in self.names), self.constraint, grid)

    def forward(self, map_BENN: Tensor, grid: tuple[int, int]) -> Tensor:
        """Local attention on its own, [B, E, N, N] to the same."""
        return refined_map(map_BENN, LinearWeights(None, self.kernels(grid), None), 1.0)


def _all_readable(layers: list[nn.Module]) -> bool:
    return all(can_read(layer, LocalConv) or _is_product(layer) for layer in layers)


def _is_product(layer: nn.Module) -> bool:
    """Whether a layer is a product with its weight over the maps, and nothing else."""
    if not can_read(layer, nn.Conv2d):
        return False
    conv = cast(nn.Conv2d, layer)
    one_entry = {*conv.kernel_size, *conv.stride} == {1} and conv.padding in ((0, 0), "valid")
    return one_entry and conv.groups == 1 and conv.bias is None


def _conv1x1(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1, bias=False)


class MapRefiner(nn.Module):
    """The paper's linear refiner; without expansion it is distributed local attention alone."""

    def __init__(
        self, num_heads: int, expansion_ratio: float, kernel_size: int, constraint: str, expand: bool, reduce: bool
    ) -> None:
        super().__init__()
        maps = expanded_maps(num_heads, expansion_ratio) if expand else num_heads
        if maps % num_heads and not reduce:
            raise ValueError(f"without reduction expansion_ratio must be a whole number, not {expansion_ratio}")
        self.maps_out = num_heads if reduce else maps
        self.conv_exp = _conv1x1(num_heads, maps) if expand else None
        self.depth_sep_conv = LocalConv(maps, kernel_size, constraint)
        self.conv_pro = _conv1x1(maps, num_heads) if reduce and expand else None

    def weights(self, grid: tuple[int, int]) -> LinearWeights | None:
        """The weights as ``attention.refine`` takes them; ``None`` where the layers have to be called."""
        layers = [self.conv_exp, self.depth_sep_conv, self.conv_pro]
        if not _all_readable([layer for layer in layers if layer is not None]):
            return None
        expand_EH = None if self.conv_exp is None else self.conv_exp.weight.flatten(1)
        reduce_HE = None if self.conv_pro is None else self.conv_pro.weight.flatten(1)
        return LinearWeights(expand_EH, self.depth_sep_conv.kernels(grid), reduce_HE)

    def forward(self, map_BHNN: Tensor, grid: tuple[int, int]) -> Tensor:
        """The refined map, [B, H, N, N] to [B, maps_out, N, N], layer by layer."""
        map_BENN = map_BHNN if self.conv_exp is None else self.conv_exp(map_BHNN)
        map_BENN = self.depth_sep_conv(map_BENN, grid)
        return map_BENN if self.conv_pro is None else self.conv_pro(map_BENN)


class DLA(nn.Module):
    """The released refiner's inverted bottleneck. The norm behind its identity, ``adapt_bn``, is its owner's."""

    def __init__(self, num_heads: int, expansion_ratio: float, kernel_size: int, constraint: str) -> None:
        super().__init__()
        maps = expanded_maps(num_heads, expansion_ratio)
        self.maps_out = num_heads
        self.conv_exp = _conv1x1(num_heads, maps)
        self.bn1 = BatchNorm(maps)
        self.depth_sep_conv = LocalConv(maps, kernel_size, constraint)
        self.bn2 = BatchNorm(maps)
        self.conv_pro = _conv1x1(maps, num_heads)
        self.bn3 = BatchNorm(num_heads)

    def weights(self, grid: tuple[int, int], adapt_bn: nn.Module) -> BottleneckWeights | None:
        """The weights and norms as ``attention.refine`` takes them; ``None`` where the layers have to be called."""
        if not _all_readable([self.conv_exp, self.depth_sep_conv, self.conv_pro]):
            return None
        norms = [batch_norm_tensors(norm) for norm in (self.bn1, self.bn2, self.bn3, adapt_bn)]
        norm1_E, norm2_E, norm3_H, adapt_H = norms
        if norm1_E is None or norm2_E is None or norm3_H is None or adapt_H is None:
            return None
        expand_EH, project_HE = self.conv_exp.weight.flatten(1), self.conv_pro.weight.flatten(1)
        return BottleneckWeights(
            expand_EH, norm1_E, self.depth_sep_conv.kernels(grid), norm2_E, project_HE, norm3_H, adapt_H
        )

    def forward(self, map_BHNN: Tensor, grid: tuple[int, int]) -> Tensor:
        """The bottleneck and its identity, [B, H, N, N] to the same, layer by layer; ``adapt_bn`` comes behind."""
        map_BENN = F.relu6(self.bn1(self.conv_exp(map_BHNN)))
        map_BENN = F.relu6(self.bn2(self.depth_sep_conv(map_BENN, grid)))
        return self.bn3(self.conv_pro(map_BENN)) + map_BHNN


class FoldedDLA(nn.Module):
    """A refiner whose norms have been folded away; for inference."""

    def __init__(self, folded: FoldedWeights) -> None:
        super().__init__()
        self.constraint = folded.local.constraint
        for name, value in zip(folded._fields, folded, strict=True):
            if not isinstance(value, LocalKernels):
                self.register_buffer(name, value)
        for index, kernel in enumerate(folded.local.kernels):
            self.register_buffer(f"kernel{index}", kernel)

    def forward(self, map_BHNN: Tensor, grid: tuple[int, int]) -> Tensor:
        """The refined map, [B, H, N, N] to the same; the factor on it is folded, too."""
        return refined_map(map_BHNN, self.weights(grid), 1.0)

    def weights(self, grid: tuple[int, int]) -> FoldedWeights:
        """The weights as ``attention.refine`` takes them."""
        kernels = tuple(kernel for name, kernel in self.named_buffers() if name.startswith("kernel"))
        folded = {name: getattr(self, name) for name in FoldedWeights._fields if name != "local"}
        return FoldedWeights(local=LocalKernels(kernels, self.constraint, grid), **folded)
