"""The way back of bottleneck_forward.py: four passes over tiles, and one expanded work buffer.

    1  ∂V, and the sums that norms 3 and 4 need                       from ∂out, h3 and A
    2  ∂project, ∂norm 2, m2 (the gradient behind norm 2)             from h2; m2 is the work buffer
    3  ∂kernel, ∂norm 1, ∂expand, the expanded share of ∂A            from m2, h2 and A
    4  the share of ∂A that reaches it through norm 1's statistics    from A

Every norm is differentiated by hand: with x̂ = (x − μ)·i the gradient behind it turns into γ·i·(g − mean(g) −
x̂·mean(g·x̂)), and each such mean is a sum over all tiles, known only when a pass is over. In the names below t, q, p
are such sums for norms 3 and 4, 2, and 1.
Axes: B batch, H heads, E expanded maps, N tokens, d head width; b, R the images and query rows of a tile, L = R·N.
"""

from __future__ import annotations

import torch
from torch import Tensor

from refiner_ds.attention.bottleneck_forward import Layer, Statistics
from refiner_ds.attention.tiles import Tile, convolve, kernel_gradient

__all__ = ["gradients"]


def gradients(
    layer: Layer,
    statistics: Statistics,
    local_BNNE: Tensor,
    narrow_BHNN: Tensor,
    value_BHNd: Tensor,
    grad_BHNd: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of map, value, expansion, kernel, projection, and weight and bias of the four norms, in this order.

    Args:
        layer: the layer, its norms folded with ``statistics``.
        local_BNNE, narrow_BHNN: the stacks h2 and h3.
        value_BHNd, grad_BHNd: values, and the gradient of the output.
    """
    last = _Last(layer, statistics, narrow_BHNN, value_BHNd, grad_BHNd)
    d_value_BHNd = last.sums()
    d_map_BHNN, m2_BNNE, d_project_HE, q0_E, q1_E = _second(layer, last, local_BNNE)
    q1_E = q1_E - statistics.mean2_E * q0_E
    d_kernel_E1kk, p0_E, through_EH = _first(layer, statistics, d_map_BHNN, m2_BNNE, local_BNNE, q0_E, q1_E)
    expand_EH, inverse_E = layer.refiner.expand_EH.double(), layer.inverse1_E
    gain_E = layer.refiner.norm1_E.weight.double() * inverse_E
    p1_E = (expand_EH * through_EH).sum(1)
    pulled_E = p1_E * inverse_E.square()
    d_expand_EH = gain_E[:, None] * (through_EH - pulled_E[:, None] * (expand_EH @ statistics.covariance_HH))
    _through_statistics(layer, statistics, d_map_BHNN, expand_EH, gain_E, pulled_E, p0_E)
    norms = (p1_E * inverse_E, p0_E, q1_E * layer.inverse2_E, q0_E, *last.norm_gradients())
    return d_map_BHNN, d_value_BHNd, d_expand_EH, d_kernel_E1kk, d_project_HE, *norms


class _Last:
    """Norms 3 and 4: pass 1, and what it makes of the gradient of T from then on."""

    def __init__(
        self, layer: Layer, statistics: Statistics, narrow_BHNN: Tensor, value_BHNd: Tensor, grad_BHNd: Tensor
    ) -> None:
        self.layer, self.statistics = layer, statistics
        self.narrow_BHNN, self.value_BHNd, self.grad_BHNd = narrow_BHNN, value_BHNd, grad_BHNd
        self.count = layer.map_BHNN.numel() // layer.heads

    def behind(self, tile: Tile) -> tuple[Tensor, Tensor]:
        """The gradients of the output and of T, [b, H, R, d] and [b, H, R, N]."""
        precision = self.layer.precision
        grad_bHRd = self.grad_BHNd[tile.images, :, tile.rows].to(precision)
        return grad_bHRd, grad_bHRd @ self.value_BHNd[tile.images].to(precision).mT

    def sums(self) -> Tensor:
        """Pass 1: sums of ∂T, ∂T·(h3 − μ3) and ∂T·(A − μ), and the gradient of the values, [B, H, N, d]."""
        layer = self.layer
        d_value_BHNd = torch.zeros_like(self.value_BHNd, dtype=layer.precision)
        sums_3H = torch.zeros(3, layer.heads, dtype=torch.float64, device=d_value_BHNd.device)
        for tile in layer.tiles():
            refined_bHRN, narrow_bHRN, map_bHRN = layer.refined(self.narrow_BHNN, tile)
            grad_bHRd, dt_bHRN = self.behind(tile)
            d_value_BHNd[tile.images] += refined_bHRN.mT @ grad_bHRd
            flat_bHL = dt_bHRN.flatten(2)
            sums_3H[0] += flat_bHL.sum((0, 2))
            sums_3H[1] += torch.linalg.vecdot(flat_bHL, narrow_bHRN.flatten(2)).sum(0)
            sums_3H[2] += torch.linalg.vecdot(flat_bHL, map_bHRN.flatten(2)).sum(0)
        t0_H, t1_H, t2_H = sums_3H
        self._fold(t0_H, t1_H - self.statistics.mean3_H * t0_H, t2_H - self.statistics.mean_H * t0_H)
        return d_value_BHNd

    def _fold(self, t0_H: Tensor, t1_H: Tensor, t2_H: Tensor) -> None:
        layer, joint_22H = self.layer, self.statistics.joint_22H
        kappa_H, beta_H, inverse3_H = layer.kappa_H, layer.beta_H, layer.inverse3_H
        inside_H = kappa_H * t1_H + t2_H
        t_H = inside_H * layer.inverse4_H.square() / self.count
        w_H = beta_H * (t1_H - t_H * self.count * (kappa_H * joint_22H[0, 0] + joint_22H[0, 1]))
        a2_H = -kappa_H * (beta_H * kappa_H * t_H + w_H * inverse3_H.square() / self.count)
        a1_H = kappa_H * beta_H
        self._to_narrow = self._columns(a1_H, a2_H, -a1_H * t_H, t0_H)
        self._to_map = self._columns(beta_H, -a1_H * t_H, -beta_H * t_H, t0_H)
        scale = layer.scale
        self._norms = (
            w_H * inverse3_H, torch.zeros_like(w_H), scale * layer.inverse4_H * inside_H, scale * t0_H
        )  # fmt: skip

    def _columns(self, gain_H: Tensor, narrow_H: Tensor, map_H: Tensor, t0_H: Tensor) -> list[Tensor]:
        """gain·(∂T − mean) + narrow·(h3 − μ3) + map·(A − μ), as what multiplies ∂T, h3 and A, and what is added."""
        level_H = -gain_H * t0_H / self.count
        level_H = level_H - narrow_H * self.statistics.mean3_H - map_H * self.statistics.mean_H
        return [self.layer.column(x_H) for x_H in (gain_H, narrow_H, map_H, level_H)]

    def norm_gradients(self) -> tuple[Tensor, ...]:
        """Weight and bias of norm 3, whose bias norm 4 cancels exactly, and of norm 4."""
        return self._norms

    def split(self, tile: Tile) -> tuple[Tensor, Tensor]:
        """The gradient of h3, and the direct share of the gradient of A, both [b, H, R, N]."""
        layer = self.layer
        narrow_bHRN, map_bHRN = layer.read(self.narrow_BHNN, tile), layer.read(layer.map_BHNN, tile)
        dt_bHRN = self.behind(tile)[1]

        def combine(columns: list[Tensor]) -> Tensor:
            sum_bHRN = torch.addcmul(columns[3], dt_bHRN, columns[0])
            return sum_bHRN.addcmul_(narrow_bHRN, columns[1]).addcmul_(map_bHRN, columns[2])

        return combine(self._to_narrow), combine(self._to_map)


def _gate(grad: Tensor, activated: Tensor) -> Tensor:
    """The gradient through relu6, zero where it is at either end."""
    return torch.ops.aten.hardtanh_backward(grad, activated, 0.0, 6.0)


def _second(layer: Layer, last: _Last, local_BNNE: Tensor) -> tuple[Tensor, ...]:
    """Pass 2: the direct share of ∂A, the work buffer m2, ∂project, and the sums of m2 and m2·h2."""
    d_map_BHNN, m2_BNNE = torch.empty_like(layer.map_BHNN), layer.wide_empty()
    d_project_HE = torch.zeros_like(layer.project_HE, dtype=torch.float64)
    q0_E = torch.zeros(layer.expanded, dtype=torch.float64, device=d_map_BHNN.device)
    q1_E = q0_E.clone()
    for tile in layer.tiles():
        dh3_bHRN, direct_bHRN = last.split(tile)
        d_map_BHNN[tile.images, :, tile.rows] = direct_bHRN
        u2_bLE, local_bLE = layer.second_activated(local_BNNE, tile)
        dh3_bHL = dh3_bHRN.flatten(2)
        d_project_HE += torch.bmm(dh3_bHL, u2_bLE).sum(0)
        m2_bLE = _gate(torch.bmm(dh3_bHL.mT, layer.project_HE.expand(len(dh3_bHL), -1, -1)), u2_bLE)
        m2_BNNE[tile.images, tile.rows] = m2_bLE.unflatten(1, dh3_bHRN.shape[2:])
        q0_E += m2_bLE.sum((0, 1))
        q1_E += (local_bLE * m2_bLE).sum((0, 1))
    return d_map_BHNN, m2_BNNE, d_project_HE, q0_E, q1_E


def _first(
    layer: Layer,
    statistics: Statistics,
    d_map_BHNN: Tensor,
    m2_BNNE: Tensor,
    local_BNNE: Tensor,
    q0_E: Tensor,
    q1_E: Tensor,
) -> tuple[Tensor, ...]:
    """Pass 3: ∂kernel, the sum p0 of m1 (the gradient behind norm 1), and m1·(A − μ)ᵀ; adds to ∂A what m1 brings."""
    precision, count = layer.precision, layer.map_BHNN.numel() // layer.heads
    gain_E = layer.refiner.norm2_E.weight.double() * layer.inverse2_E
    slope_E = -gain_E * q1_E * layer.inverse2_E.square() / count
    level_E = (-gain_E * q0_E / count - slope_E * statistics.mean2_E).to(precision)
    slope_E, mean_H11 = slope_E.to(precision), layer.column(statistics.mean_H)
    turned_E1kk = layer.kernel_E1kk.flip(-1, -2)
    d_kernel_E1kk = torch.zeros_like(layer.kernel_E1kk, dtype=torch.float64)
    p0_E, through_EH = torch.zeros_like(q0_E), torch.zeros_like(layer.folded_EH, dtype=torch.float64)
    for tile in layer.tiles(reach=True):
        dh2_bRNE = torch.addcmul(level_E, layer.read_wide(local_BNNE, tile, tile.reach), slope_E)
        dh2_bRNE.addcmul_(layer.read_wide(m2_BNNE, tile, tile.reach), layer.gain2_E)
        u1_bRNE = layer.activated(tile, tile.reach)
        u1_bERN, dh2_bERN = (x_bRNE.permute(0, 3, 1, 2) for x_bRNE in (u1_bRNE, dh2_bRNE))
        d_kernel_E1kk += kernel_gradient(
            u1_bERN, dh2_bERN[:, :, tile.inner], layer.kernel_E1kk, tile, layer.expanded
        )  # fmt: skip
        du1_bRNE = convolve(dh2_bERN, turned_E1kk, tile, layer.expanded).permute(0, 2, 3, 1)
        m1_bLE = _gate(du1_bRNE, u1_bRNE[:, tile.inner]).flatten(1, 2)
        map_bHRN = layer.read(layer.map_BHNN, tile) - mean_H11
        p0_E += m1_bLE.sum((0, 1))
        through_EH += torch.bmm(map_bHRN.flatten(2), m1_bLE).sum(0).T
        share_bHL = torch.bmm(layer.folded_EH.T.expand(len(m1_bLE), -1, -1), m1_bLE.mT)
        d_map_BHNN[tile.images, :, tile.rows] += share_bHL.view_as(map_bHRN)
    return d_kernel_E1kk, p0_E, through_EH


def _through_statistics(
    layer: Layer,
    statistics: Statistics,
    d_map_BHNN: Tensor,
    expand_EH: Tensor,
    gain_E: Tensor,
    pulled_E: Tensor,
    p0_E: Tensor,
) -> None:
    """Pass 4: add to ∂A what reaches it through the mean and variance of norm 1, one small matrix product on A."""
    count = layer.map_BHNN.numel() // layer.heads
    pull_HH = -(expand_EH.T * (gain_E * pulled_E / count)) @ expand_EH
    level_H = -expand_EH.T @ (gain_E * p0_E) / count - pull_HH @ statistics.mean_H
    pull_HH, level_H1 = pull_HH.to(layer.precision), level_H.to(layer.precision)[:, None]
    for tile in layer.tiles():
        map_bHRN = layer.read(layer.map_BHNN, tile)
        share_bHL = torch.baddbmm(level_H1, pull_HH.expand(len(map_bHRN), -1, -1), map_bHRN.flatten(2))
        d_map_BHNN[tile.images, :, tile.rows] += share_bHL.view_as(map_bHRN)
