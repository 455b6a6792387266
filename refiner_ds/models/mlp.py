"""An MLP behind its layer norm, in two halves that each save only their input for backward.

    x ─ norm ─ fc1 ──> h                       backward: computes norm(x) again
    h ─ gelu ─ fc2 ─ · scale ──> out           backward: computes gelu(h) again; ∂scale from ∂weight, row by row

With z = gᵀ·gelu(h), where g is the gradient of out, ∂weight = scale·z and ∂scale = Σ weight·z + bias·Σ g: the output
before the scale is not needed.
Axes: B batch, N tokens, D width, M hidden width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refiner_ds.attention import is_traced, is_transformed
from refiner_ds.models.direct import can_read

__all__ = ["ScaledMlp"]


class ScaledMlp(nn.Module):
    """Two linear layers with GELU between; the output is multiplied channel by channel with a learned scale.

    Args:
        dim, hidden: widths outside and inside.
        drop: dropout behind each layer, the second one behind the scale.
        init_values: initial value of the scale; ``None`` leaves the scale out.
    """

    def __init__(self, dim: int, hidden: int, drop: float = 0.0, init_values: float | None = 1e-5) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.drop = nn.Dropout(drop)
        self.scale_channel = None if init_values is None else nn.Parameter(torch.full((dim,), init_values))

    def forward(self, x_BND: Tensor, norm: nn.LayerNorm) -> Tensor:
        """The MLP of norm(x), [B, N, D] to [B, N, D].

        With gradients on, plain layers are computed by this file's two functions. Dropout, tracing, ``torch.func``,
        forward mode or a layer that is more than its weights (see ``direct.py``) calls the modules one by one.
        """
        if torch.is_grad_enabled() and not is_traced() and not is_transformed() and self._is_plain(norm):
            hidden_BNM = norm_linear(x_BND, norm, self.fc1)
            return gelu_linear_scale(hidden_BNM, self.fc2.weight, self.fc2.bias, self.scale_channel)
        x_BND = self.fc2(self.drop(F.gelu(self.fc1(norm(x_BND)))))
        return self.drop(x_BND if self.scale_channel is None else x_BND * self.scale_channel)

    def _is_plain(self, norm: nn.LayerNorm) -> bool:
        if not (can_read(self.drop, nn.Dropout) and can_read(norm, nn.LayerNorm)) or self.training and self.drop.p > 0:
            return False
        layers = (norm, self.fc1, self.fc2)
        linears = can_read(self.fc1, nn.Linear) and can_read(self.fc2, nn.Linear)
        return linears and all(layer.weight is not None and layer.bias is not None for layer in layers)


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_BND: Tensor, gain_D: Tensor, shift_D: Tensor, eps: float, weight_MD: Tensor, bias_M: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x_BND, gain_D, shift_D, weight_MD)
        ctx.eps, ctx.bias_dtype = eps, bias_M.dtype
        norm_BND = F.layer_norm(x_BND, gain_D.shape, gain_D, shift_D, eps)
        return F.linear(norm_BND.to(weight_MD.dtype), weight_MD, bias_M)

    @staticmethod
    def backward(ctx: Any, grad_BNM: Tensor) -> tuple[Tensor | None, ...]:
        x_BND, gain_D, shift_D, weight_MD = ctx.saved_tensors
        with torch.autocast(grad_BNM.device.type, enabled=False):
            norm_BND, *moments = torch.native_layer_norm(x_BND, gain_D.shape, gain_D, shift_D, ctx.eps)
            grad_XM = grad_BNM.flatten(0, -2)
            d_weight_MD = grad_XM.mT @ norm_BND.to(weight_MD.dtype).flatten(0, -2)
            d_norm_BND = (grad_XM @ weight_MD).view_as(norm_BND).to(norm_BND.dtype)
            d_x_BND, d_gain_D, d_shift_D = torch.ops.aten.native_layer_norm_backward(
                d_norm_BND, x_BND, gain_D.shape, *moments, gain_D, shift_D, [True, True, True]
            )
        return d_x_BND, d_gain_D, d_shift_D, None, d_weight_MD, grad_XM.sum(0).to(ctx.bias_dtype)


def norm_linear(x_BND: Tensor, norm: nn.LayerNorm, linear: nn.Linear) -> Tensor:
    """``linear(norm(x))``; saves ``x`` and the weights for backward, which computes norm(x) again.

    Args:
        x_BND: [..., D].
        norm, linear: an ``nn.LayerNorm`` and an ``nn.Linear``; their weights are read, the modules not called.
    Returns:
        [..., M], under autocast in its dtype.
    """
    device = x_BND.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)  # "meta" has none
    dtype = torch.get_autocast_dtype(device) if autocast else linear.weight.dtype
    x_BND = x_BND.to(norm.weight.dtype)
    weight_MD, bias_M = linear.weight.to(dtype), linear.bias.to(dtype)
    return _NormLinear.apply(x_BND, norm.weight, norm.bias, norm.eps, weight_MD, bias_M)


class _GeluLinearScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_BNM: Tensor, weight_DM: Tensor, bias_D: Tensor, scale_D: Tensor | None) -> Tensor:
        ctx.save_for_backward(hidden_BNM, weight_DM, bias_D, scale_D)
        out_BND = F.linear(F.gelu(hidden_BNM), weight_DM, bias_D)
        return out_BND if scale_D is None else out_BND * scale_D

    @staticmethod
    def backward(ctx: Any, grad_BND: Tensor) -> tuple[Tensor | None, ...]:
        hidden_BNM, weight_DM, bias_D, scale_D = ctx.saved_tensors
        with torch.autocast(grad_BND.device.type, enabled=False):
            exact_XD = grad_BND.flatten(0, -2)
            grad_XD = exact_XD.to(hidden_BNM.dtype)
            d_weight_DM = grad_XD.mT @ F.gelu(hidden_BNM).flatten(0, -2)
            d_bias_D, d_scale_D = exact_XD.sum(0), None
            if scale_D is not None:
                pulled_D = (weight_DM * d_weight_DM.to(scale_D.dtype)).sum(1)
                d_scale_D = (pulled_D + bias_D * d_bias_D).to(scale_D.dtype)
                grad_XD = (exact_XD * scale_D).to(hidden_BNM.dtype)
                d_weight_DM, d_bias_D = d_weight_DM * scale_D[:, None], d_bias_D * scale_D
            d_gelu_BNM = (grad_XD @ weight_DM).view_as(hidden_BNM)
            d_hidden_BNM = torch.ops.aten.gelu_backward(d_gelu_BNM, hidden_BNM)
        return d_hidden_BNM, d_weight_DM.to(weight_DM.dtype), d_bias_D.to(bias_D.dtype), d_scale_D


def gelu_linear_scale(hidden_BNM: Tensor, weight_DM: Tensor, bias_D: Tensor, scale_D: Tensor | None) -> Tensor:
    """``linear(gelu(hidden), weight, bias) * scale``; saves ``hidden`` and the weights for backward.

    Args:
        hidden_BNM: what the first layer gives, [..., M]; the linear layer runs in its dtype, as under autocast.
        weight_DM, bias_D: of the linear layer.
        scale_D: ``None`` leaves the scale out.
    Returns:
        [..., D], promoted to the scale's dtype.
    """
    dtype = hidden_BNM.dtype
    return _GeluLinearScale.apply(hidden_BNM, weight_DM.to(dtype), bias_D.to(dtype), scale_D)
