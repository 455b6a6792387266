"""Linear CKA between pairs of layers over a whole data set, unbiased, streamed in float64.

    batches of features X [n, p], Y [n, q]  ── update ──▶  sums of size p·q  ── similarity ──▶  CKA in [−1, 1]

Centred kernel alignment (Kornblith et al., 2019) of the Gram matrices K = XXᵀ and L = YYᵀ, with the unbiased estimate
of HSIC (Song et al., 2012, eq. 5), whose diagonals are left out:

    HSIC = (tr(K̃L̃) + 1ᵀK̃1·1ᵀL̃1/((n−1)(n−2)) − 2/(n−2)·1ᵀK̃L̃1) / (n(n−3))

No Gram matrix is ever made: with s = Σx and k = |x|² each of the three terms is a sum over samples,

    tr(K̃L̃)  = |XᵀY|² − Σ k·l        1ᵀK̃1 = |s_x|² − Σ k
    1ᵀK̃L̃1 = s_xᵀ(XᵀY)s_y − s_x·Σ l·x − s_y·Σ k·y + Σ k·l

so the result is that of the full computation, not a mean over batches, whatever the order or size of batches.
Axes: n samples, p and q features.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["CKA", "linear_cka"]

FEWEST = 4  # the unbiased estimate divides by n(n − 3)


class CKA:
    """CKA of one pair of feature sets.

    The estimate does not change when a constant vector is added to all samples; the first batch's mean is taken off
    every sample, since features with a large mean would otherwise lose digits to cancellation.
    """

    def __init__(self) -> None:
        self._pairs = {"xy": _CrossSums(), "xx": _CrossSums(), "yy": _CrossSums()}
        self._means: tuple[Tensor, Tensor] | None = None
        self._scales = (1.0, 1.0)

    @property
    def samples(self) -> int:
        """Samples taken in so far."""
        return self._pairs["xy"].count

    def update(self, x_np: Tensor, y_nq: Tensor) -> None:
        """Take in the features of some samples.

        Args:
            x_np, y_nq: features of the same samples in the same order, [n, p] and [n, q], any float dtype.
        Raises:
            ValueError: they are not two matrices of as many rows, or hold values that are not finite.
        """
        if x_np.dim() != 2 or y_nq.dim() != 2 or x_np.shape[0] != y_nq.shape[0]:
            raise ValueError(f"features are {list(x_np.shape)} and {list(y_nq.shape)}; they must be [n, p] and [n, q]")
        x_np, y_nq = x_np.detach().double().cpu(), y_nq.detach().double().cpu()
        if not (x_np.isfinite().all() and y_nq.isfinite().all()):
            raise ValueError("features hold values that are not finite; evaluate in fp32, or use another checkpoint")
        if not x_np.shape[0]:
            return
        if self._means is None:
            self._means = x_np.mean(0), y_nq.mean(0)
            # CKA does not change with the scale of features; fourth powers of 1e-5 or 1e5 would lose range.
            self._scales = _largest(x_np), _largest(y_nq)
        x_np = (x_np - self._means[0]) / self._scales[0]
        y_nq = (y_nq - self._means[1]) / self._scales[1]
        self._pairs["xy"].update(x_np, y_nq)
        self._pairs["xx"].update(x_np, x_np)
        self._pairs["yy"].update(y_nq, y_nq)

    def similarity(self) -> float:
        """CKA of all samples taken in. Features that do not vary are similar to nothing: 0, never NaN.

        Raises:
            ValueError: fewer than four samples.
        """
        if self.samples < FEWEST:
            raise ValueError(f"CKA of {self.samples} samples; it takes at least {FEWEST}")
        both, own_x, own_y = (self._pairs[pair].hsic() for pair in ("xy", "xx", "yy"))
        # The unbiased estimate of a variance can come out below zero where there is next to none.
        if own_x <= 0 or own_y <= 0:
            return 0.0
        return both / (own_x * own_y) ** 0.5


def _largest(x_np: Tensor) -> float:
    return (float(x_np.abs().max()) if x_np.numel() else 0.0) or 1.0


class _CrossSums:
    """The sums that HSIC of one pair needs."""

    def __init__(self) -> None:
        self.count = 0
        self._started = False

    def update(self, x_np: Tensor, y_nq: Tensor) -> None:
        if not self._started:
            p, q = x_np.shape[1], y_nq.shape[1]
            self._cross_pq = torch.zeros(p, q, dtype=torch.float64)
            self._sum_p, self._weighted_p = torch.zeros(2, p, dtype=torch.float64)
            self._sum_q, self._weighted_q = torch.zeros(2, q, dtype=torch.float64)
            self._k = self._l = self._kl = 0.0
            self._started = True
        k_n, l_n = x_np.square().sum(1), y_nq.square().sum(1)
        self._cross_pq += x_np.T @ y_nq
        self._sum_p += x_np.sum(0)
        self._sum_q += y_nq.sum(0)
        self._weighted_p += l_n @ x_np
        self._weighted_q += k_n @ y_nq
        self._k += float(k_n.sum())
        self._l += float(l_n.sum())
        self._kl += float(k_n @ l_n)
        self.count += x_np.shape[0]

    def hsic(self) -> float:
        n = self.count
        trace = float(self._cross_pq.square().sum()) - self._kl
        all_k, all_l = float(self._sum_p @ self._sum_p) - self._k, float(self._sum_q @ self._sum_q) - self._l
        rows = float(self._sum_p @ self._cross_pq @ self._sum_q) + self._kl
        rows -= float(self._sum_p @ self._weighted_p) + float(self._sum_q @ self._weighted_q)
        return (trace + all_k * all_l / ((n - 1) * (n - 2)) - 2 / (n - 2) * rows) / (n * (n - 3))


def linear_cka(x_np: Tensor, y_nq: Tensor) -> float:
    """CKA of two matrices of features that are all at hand."""
    pair = CKA()
    pair.update(x_np, y_nq)
    return pair.similarity()
