"""The paper's refiner, tile by tile, saving no map that can be computed again.

    q, k ─ softmax ─> A ─ expand ─ ∗ K ─ reduce ─> T ─ · V ─> out        in steps, or composed:
                      A ─────── ∗ W ─────────────> T                     W[o,i] = Σ_e reduce[o,e]·K[e]·expand[e,i]

Composed, one small dense kernel replaces all three; it is computed under autograd, which takes its gradient on to the
weights. From queries and keys, q, k, v and the weights or W are saved for backward; from a map, the map instead.
Axes: B batch, H heads, E expanded maps, M maps that multiply values (E without reduction), N tokens, d head width; b, R
the images and query rows of a tile, L = R·N.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from refiner_ds.attention import equations
from refiner_ds.attention.linear import operators
from refiner_ds.attention.map.tiled import make_map, score_gradients, softmax_rows
from refiner_ds.attention.norms import statistics_dtype
from refiner_ds.attention.tiling.ops import correlate, expand, product_dtype, reduce
from refiner_ds.attention.tiling.tiles import Tile, convolution_gradients, convolve, tiles
from refiner_ds.attention.weights import Case, DeferredMap, LinearWeights

__all__ = ["Steps", "composing_is_faster", "gradients", "refine", "refined_values", "steps_of", "supports"]

# By arithmetic composing pays from r = 3.3 on (12 heads, k = 3), but a multiplication takes longer in thin products and
# depthwise convolutions than in a dense one. Training at N = 197 on CPU, steps over composed: at r = 1 0.8 of the time,
# at r = 2 0.95 to 1.2, at r = 3 1.5 (bf16 autocast 0.9, 1.1, 1.6).
STEP_COST = 1.8


class Steps(NamedTuple):
    """The operations on a map, in either form.

    Args:
        kernel: [E, 1, k, k], or composed [H, H, k, k].
        expand_EH, reduce_HE: before and after it; ``None`` where there is no such step.
    """

    kernel: Tensor
    expand_EH: Tensor | None = None
    reduce_HE: Tensor | None = None

    @property
    def groups(self) -> int:
        """Of the convolution: 1 for a dense kernel, E for one kernel a map."""
        return self.kernel.shape[0] if self.kernel.shape[1] == 1 else 1

    @property
    def maps_out(self) -> int:
        """M."""
        return len(self.kernel if self.reduce_HE is None else self.reduce_HE)

    def to(self, dtype: torch.dtype) -> Steps:
        """The same in another precision."""
        around = (None if weight is None else weight.to(dtype) for weight in self[1:])
        return Steps(self.kernel.to(dtype), *around)


def composing_is_faster(heads: int, expanded: int, kernel_size: int) -> bool:
    """Whether one dense kernel is faster than expansion, depthwise kernels and reduction."""
    taps = kernel_size**2
    return heads * heads * taps <= STEP_COST * expanded * (2 * heads + taps)


def steps_of(weights: LinearWeights, scale: float) -> Steps:
    """The weights in the faster form, ``scale`` included; constraint "none" only."""
    kernel_E1kk = _exact(weights.local.kernels[0])
    if scale != 1:  # inductor loses track of a factor of 1 inside an activation checkpoint
        kernel_E1kk = kernel_E1kk * scale
    if weights.expand_EH is None or weights.reduce_HE is None:
        return Steps(kernel_E1kk, weights.expand_EH)
    expand_EH, reduce_HE = _exact(weights.expand_EH), _exact(weights.reduce_HE)
    if not composing_is_faster(expand_EH.shape[1], len(expand_EH), kernel_E1kk.shape[-1]):
        return Steps(kernel_E1kk, expand_EH, reduce_HE)
    with torch.autocast(kernel_E1kk.device.type, enabled=False):
        return Steps(equations.compose_kernel(expand_EH, kernel_E1kk, reduce_HE).contiguous())


def _exact(weight: Tensor) -> Tensor:
    return weight.to(statistics_dtype(weight.dtype))


def _in(x_bCRN: Tensor, weight: Tensor | None) -> Tensor:
    """Maps as the convolution takes them, with their axis last in memory; combined by ``weight`` if there is one."""
    return x_bCRN.contiguous(memory_format=torch.channels_last) if weight is None else expand(x_bCRN, weight)


def _out(x_bCRN: Tensor, weight: Tensor | None) -> Tensor:
    """The convolution's output as products with values take it, combined by ``weight`` if there is one."""
    return x_bCRN.contiguous() if weight is None else reduce(x_bCRN, weight)


def refined_values(
    scale: float, value_BHNd: Tensor, steps: Steps, source: list[Tensor], mask_BN: Tensor | None = None
) -> Tensor:
    """Refined maps times values, [B, M, N, d] in the values' dtype; ``source`` is a map, or queries and keys.

    A mask acts where the map is made; values are zero for padding already, and the output of its rows is any number.
    """
    batch, _, tokens, width = value_BHNd.shape
    out_BMNd = value_BHNd.new_empty(batch, steps.maps_out, tokens, width)
    dtype = product_dtype(value_BHNd)
    with torch.autocast(value_BHNd.device.type, enabled=False):
        steps = steps.to(dtype)
        for tile in _cut(value_BHNd, steps):
            map_bHRN = _map_rows(source, scale, tile, mask_BN).to(dtype)
            # The dense convolution alone is as fast on maps as they come.
            dense = steps.groups == 1 and steps.expand_EH is None
            expanded_bERN = map_bHRN if dense else _in(map_bHRN, steps.expand_EH)
            refined_bMRN = _out(convolve(expanded_bERN, steps.kernel, tile, steps.groups), steps.reduce_HE)
            out_BMNd[tile.images, :, tile.rows] = equations.attend(refined_bMRN, value_BHNd[tile.images].to(dtype))
    return out_BMNd


def gradients(
    grad_BMNd: Tensor, scale: float, value_BHNd: Tensor, steps: Steps, source: list[Tensor],
    mask_BN: Tensor | None = None,
) -> list[Tensor | None]:  # fmt: skip
    """Backward of :func:`refined_values`: of value, kernel, expansion, reduction, and the map or queries and keys."""
    with torch.autocast(value_BHNd.device.type, enabled=False):
        backward = _Backward(value_BHNd, steps, source, scale, mask_BN)
        for tile in _cut(value_BHNd, backward.steps):
            backward.add(grad_BMNd, tile)
    return backward.gradients()


def _cut(value_BHNd: Tensor, steps: Steps) -> list[Tile]:
    """Tiles sized for the input, output or expanded maps, whichever are most."""
    batch, heads, tokens, _ = value_BHNd.shape
    most = max(heads, steps.maps_out, len(steps.kernel))
    return list(tiles(batch, tokens, most, value_BHNd.device, steps.kernel.shape[-1] // 2, steps.kernel.itemsize))


def _map_rows(source: list[Tensor], scale: float, tile: Tile, mask_BN: Tensor | None) -> Tensor:
    """A tile's rows of the map with their halo, [b, H, R, N]: read, or computed from queries and keys."""
    if len(source) == 1:
        return source[0][tile.images, :, tile.with_halo]
    return softmax_rows(source[0], source[1], scale, tile, tile.with_halo, mask_BN)


class _Backward:
    """Gradients, tile by tile: sums of what all tiles share, rows of the rest."""

    def __init__(
        self, value_BHNd: Tensor, steps: Steps, source: list[Tensor], scale: float, mask_BN: Tensor | None
    ) -> None:
        precision = statistics_dtype(value_BHNd.dtype)
        self.value_BHNd, self.source, self.scale, self.mask_BN = value_BHNd, source, scale, mask_BN
        self.dtype = product_dtype(value_BHNd)
        self.steps = steps.to(self.dtype)
        self.d_value_BHNd = torch.zeros_like(value_BHNd, dtype=precision)
        self.d_steps = [None if weight is None else torch.zeros_like(weight, dtype=torch.float64) for weight in steps]
        self.d_source = [torch.zeros_like(x, dtype=precision if len(source) > 1 else x.dtype) for x in source]

    def gradients(self) -> list[Tensor | None]:
        """Of value, kernel, expansion, reduction, and the map or queries and keys."""
        return [self.d_value_BHNd, *self.d_steps, *self.d_source]

    def add(self, grad_BMNd: Tensor, tile: Tile) -> None:
        """Add one tile's."""
        softmax_bHRN = _map_rows(self.source, self.scale, tile, self.mask_BN)
        d_map_bHRN = self._through_steps(softmax_bHRN.to(self.dtype), grad_BMNd, tile)
        if len(self.source) == 1:
            self.d_source[0][tile.images, :, tile.rows] = d_map_bHRN
            return
        q_BHNd, k_BHNd = self.source
        interior_bHRN = softmax_bHRN[:, :, tile.interior]
        dq_bHRd, dk_bHNd = score_gradients(interior_bHRN, d_map_bHRN, q_BHNd, k_BHNd, self.scale, tile)
        self.d_source[0][tile.images, :, tile.rows] = dq_bHRd
        self.d_source[1][tile.images] += dk_bHNd

    def _through_steps(self, map_bHRN: Tensor, grad_BMNd: Tensor, tile: Tile) -> Tensor:
        """Add to the gradients of values and weights; returns that of the map's rows."""
        steps, (d_kernel, d_expand_EH, d_reduce_HE) = self.steps, self.d_steps
        heads = self.value_BHNd.shape[1]
        shares = steps.maps_out // heads
        halo_bMRd = grad_BMNd[tile.images, :, tile.with_halo].to(self.dtype)
        value_bMNd = self.value_BHNd[tile.images].to(self.dtype).repeat_interleave(shares, 1)
        d_refined_bMRN = halo_bMRd @ value_bMNd.mT
        expanded_bERN = _in(map_bHRN, steps.expand_EH)
        local_bERN = convolve(expanded_bERN, steps.kernel, tile, steps.groups)
        d_value_bMNd = _out(local_bERN, steps.reduce_HE).mT @ halo_bMRd[:, :, tile.interior]
        self.d_value_BHNd[tile.images] += d_value_bMNd.unflatten(1, (heads, shares)).sum(2)
        if d_reduce_HE is not None:
            d_reduce_HE += correlate(d_refined_bMRN[:, :, tile.interior], local_bERN)
        d_local_bERN = _in(d_refined_bMRN, None if steps.reduce_HE is None else steps.reduce_HE.T)
        d_wide_bERN, share = convolution_gradients(expanded_bERN, d_local_bERN, steps.kernel, tile, steps.groups)
        assert d_kernel is not None
        d_kernel += share
        if steps.expand_EH is None or d_expand_EH is None:
            return _out(d_wide_bERN, None)
        d_expand_EH += correlate(map_bHRN[:, :, tile.interior], d_wide_bERN).T
        return _out(d_wide_bERN, steps.expand_EH.T)


def supports(case: Case) -> str | None:
    """The reason why this case is left to the eager backend, or ``None``."""
    assert isinstance(case.weights, LinearWeights)
    constraint = case.weights.local.constraint
    return None if constraint == "none" else f"constraint {constraint!r} is implemented there alone"


def refine(case: Case, scale: float, save_for_backward: str) -> Tensor:
    """Refined maps times values, [B, M, N, d] in the values' dtype; there is no choice of what is saved.

    With dropout the map is made first and saved: tiles overlap by the kernel's halo, and an entry must be dropped in
    all of them or in none.
    """
    attn, value_BHNd, weights, _ = case
    assert isinstance(weights, LinearWeights)
    steps = steps_of(weights, scale)
    if isinstance(attn, DeferredMap) and attn.dropout:
        attn = make_map(attn).to(value_BHNd.dtype)
    return operators.refine_linear("tiled", attn, value_BHNd, *steps)
