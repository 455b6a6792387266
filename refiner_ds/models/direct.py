"""When a module's weights may be read directly instead of calling the module.

Fast paths compute several layers as one and read their weights for it. That is sound only where calling each layer
would do nothing else: an adapter in a layer's place (LoRA), a quantised or sharded weight, a parametrisation or a hook
must be honoured, so such a layer is called and the fast path left.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as nn_module
from torch.utils.module_tracker import ModuleTracker
from torchvision.ops import FrozenBatchNorm2d

from refiner_ds.attention import BatchNorm, Norm
from refiner_ds.models.sync_batch_norm import SyncBatchNorm, several_ranks

__all__ = ["batch_norm_tensors", "can_read"]

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
# Any other subclass (DTensor, a quantised weight) computes in ways of its own; a fake one stands for a plain tensor.
_TENSORS = (Tensor, nn.Parameter, FakeTensor)


def can_read(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether computing with ``module``'s weights is all that calling it would do.

    Args:
        kinds: the exact classes whose forward the caller computes itself; a subclass may do more.
    """
    if type(module) not in kinds or "forward" in vars(module) or _has_global_hook():
        return False
    if any(_is_foreign(hook) for name in _HOOKS for hook in vars(module)[name].values()):
        return False
    # dict's own values: DeepSpeed's would gather the parameters of ZeRO 3.
    return all(value is None or type(value) in _TENSORS for value in dict.values(vars(module)["_parameters"]))


def batch_norm_tensors(module: nn.Module) -> Norm | None:
    """The tensors of a batch norm as ``attention.refine`` takes them, in the mode the module is in.

    Taken are this package's batch norm and PyTorch's, their synchronised ones where they do not synchronise, and the
    frozen one of torchvision (``timm.utils.freeze``).

    Returns:
        ``None`` where the module has to be called: another class, hooks, statistics over ranks, no running
        statistics or no gain, statistics that are not to be updated, a cumulative average, or half precision.
    """
    if not can_read(module, BatchNorm, SyncBatchNorm, nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d):
        return None
    if isinstance(module, FrozenBatchNorm2d):
        return Norm(module.weight, module.bias, module.running_mean, module.running_var, None, False, module.eps)
    assert isinstance(module, nn.BatchNorm2d | nn.SyncBatchNorm)
    training = module.training
    mean, variance = module.running_mean, module.running_var
    if module.weight is None or module.bias is None or mean is None or variance is None or mean.dtype.itemsize < 4:
        return None
    synchronises = isinstance(module, nn.SyncBatchNorm | SyncBatchNorm) and several_ranks()
    if training and (module.momentum is None or not module.track_running_stats or synchronises):
        return None
    return Norm(
        module.weight, module.bias, mean, variance, module.num_batches_tracked, training, module.eps,
        module.momentum or 0.0,
    )  # fmt: skip


def _has_global_hook() -> bool:
    """Whether every module has to be called, for the sake of hooks of all modules."""
    if not nn_module._has_any_global_hook():
        return False
    # PyTorch's FLOP counter notes by them which module it is in, and counts operators.
    hooks = (hook for name in _HOOKS for hook in getattr(nn_module, f"_global{name}", {}).values())
    return not all(type(getattr(hook, "__self__", None)) is ModuleTracker for hook in hooks)


def _is_foreign(hook: object) -> bool:
    # DeepSpeed gathers the parameters of ZeRO 3 by hooks, and as well where they are read.
    return not (getattr(hook, "__module__", None) or "").startswith("deepspeed.")
