"""One transformer block: attention, then an MLP, each behind a layer norm and a residual path.

    x ── x + gain·drop_path(attn(norm(x / gain))) ── x + gain·drop_path(mlp(norm(x / gain))) ──>

The released models have gain 2 and a learned scale behind the MLP, a plain ViT gain 1 and none.
Axes: B batch, H heads, E maps that multiply values, N tokens, D width, M hidden width of the MLP.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from refiner_ds.models.lean_mlp import gelu_linear_scale, norm_linear

__all__ = ["Block", "ScaledMlp"]


class ScaledMlp(nn.Module):
    """Two linear layers with GELU between; the output is multiplied, channel by channel, with a learned scale.

    Args:
        dim, hidden: widths outside and inside.
        drop: dropout behind each layer, the second one behind the scale.
        init_values: where the scale starts; ``None`` leaves the scale out.
    """

    def __init__(self, dim: int, hidden: int, drop: float = 0.0, init_values: float | None = 1e-5) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop)
        self.scale_channel = None if init_values is None else nn.Parameter(torch.full((dim,), init_values))

    def forward(self, x_BND: Tensor, norm: nn.LayerNorm) -> Tensor:
        """The MLP of norm(x), [B, N, D] to [B, N, D]."""
        dropping = self.training and self.drop.p > 0
        if torch.is_grad_enabled() and not dropping and not torch.compiler.is_compiling():
            hidden_BNM = norm_linear(x_BND, norm, self.fc1)
            return gelu_linear_scale(hidden_BNM, self.fc2.weight, self.fc2.bias, self.scale_channel)
        x_BND = self.fc2(self.drop(F.gelu(self.fc1(norm(x_BND)))))
        return self.drop(x_BND if self.scale_channel is None else x_BND * self.scale_channel)


class Block(nn.Module):
    """Attention and MLP around a residual stream; see the head of this file.

    Args:
        attn: the attention, one of ``refiner_ds.models.attention``.
        mlp: the MLP.
        dim: width.
        drop_path: the probability with which a sample skips each branch.
        gain: what the stream is divided by before each norm and each branch multiplied by after.
    """

    attn: Any  # one of the four kinds; nn.Module would hide forward_with_map from a type checker

    def __init__(self, attn: nn.Module, mlp: ScaledMlp, dim: int, drop_path: float = 0.0, gain: float = 1.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = mlp
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.gain = gain

    def forward(
        self, x_BND: Tensor, residual_BHNN: Tensor | None = None, keep_map: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The stream [B, N, D], the map to hand on, and with ``keep_map`` the one that multiplied the values."""
        used_BENN = None
        norm_BND = self.norm1(x_BND / self.gain)
        if keep_map:
            out_BND, residual_BHNN, used_BENN = self.attn.forward_with_map(norm_BND, residual_BHNN)
        else:
            out_BND, residual_BHNN = self.attn(norm_BND, residual_BHNN)
        x_BND = x_BND + self.drop_path(out_BND) * self.gain
        x_BND = x_BND + self.drop_path(self.mlp(x_BND / self.gain, self.norm2)) * self.gain
        return x_BND, residual_BHNN, used_BENN
