"""Autograd functions whose backward is written by hand, and so has no derivative of its own.

Nor have they one in forward mode, nor do they vectorise: ``is_transformed`` says when PyTorch's own operators compute.

PyTorch's ``once_differentiable`` refuses a second derivative only where the incoming gradient itself requires one. Of
``out.sum()`` it does not, and the second derivative would silently be missing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["REFUSAL", "first_order", "is_transformed"]

REFUSAL = "second derivatives need REFINER_ATTENTION=eager: this backward is written by hand and has none"

Backward = Callable[..., tuple[Tensor | None, ...]]


def first_order(backward: Backward) -> Backward:
    """Decorator of a backward: differentiating its results is a RuntimeError that names the eager backend."""

    @wraps(backward)
    def refusing(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            found = backward(ctx, *grads)
        if not torch.is_grad_enabled():  # on only with create_graph=True
            return found
        # The results hang on the inputs by a node that refuses, whichever of them the second derivative is for.
        parents = [grad for grad in (*grads, *_saved(ctx)) if isinstance(grad, Tensor) and grad.requires_grad]
        results = [None if grad is None else grad.detach().requires_grad_() for grad in found]
        refuse: Callable[..., Any] = torch._C._functions.DelayedError(REFUSAL.encode(), len(results) + len(parents))
        return tuple(refuse(*results, *parents)[: len(results)])

    return refusing


def is_transformed() -> bool:
    """Whether this is within a transform of ``torch.func`` or a level of forward-mode differentiation."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _saved(ctx: Any) -> tuple[Tensor, ...]:
    try:
        return ctx.saved_tensors
    except RuntimeError:  # an activation checkpoint gives them once
        return ()
