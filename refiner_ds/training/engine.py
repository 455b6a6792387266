"""From a run file to a DeepSpeed engine, and what the loop asks of it that DeepSpeed has no single call for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param
from torch import Tensor, nn

from refiner_ds.config import BatchPlan, RunFile
from refiner_ds.models import RefinedViT
from refiner_ds.training.parameter_groups import parameter_groups
from refiner_ds.training.world import World


def computes_in_bf16(run: RunFile, world: World) -> bool:
    """What ``bf16.enabled`` comes to on this device: "auto" is on where a GPU has bf16, off on CPUs, slower in it."""
    asked = run.keys.bf16.enabled
    if asked == "auto":
        return world.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return asked


def evaluates_in_bf16(run: RunFile, world: World) -> bool:
    """Whether evaluation computes under autocast: where training computes in bf16, CPUs apart, slower so."""
    return world.device.type == "cuda" and computes_in_bf16(run, world)


def deepspeed_config(run: RunFile, batch: BatchPlan, bf16: bool) -> dict[str, Any]:
    """The run file's DeepSpeed part with the batch spelled out, as ``deepspeed.initialize`` wants it."""
    config = run.keys.model_dump(mode="json", exclude_unset=True, exclude_none=True, exclude={"refiner", "extends"})
    config["train_batch_size"] = batch.global_batch
    config["train_micro_batch_size_per_gpu"] = batch.micro_batch
    config["gradient_accumulation_steps"] = batch.accumulation
    config["bf16"] = {**config.get("bf16", {}), "enabled": bf16}
    config["gradient_clipping"] = run.keys.gradient_clipping or 0.0  # left out, DeepSpeed clips at 1.0 unasked
    # DeepSpeed prints its own progress every ten steps otherwise, over the one progress line.
    config.setdefault("steps_per_print", 2**31)
    return config


def build_optimizer(run: RunFile, model: RefinedViT) -> torch.optim.Optimizer:
    """AdamW over the groups of ``parameter_groups``."""
    recipe = run.refiner.recipe
    groups = parameter_groups(recipe, model)
    settings: dict[str, Any] = {"lr": recipe.lr, "betas": recipe.betas, "eps": recipe.eps}
    offload = run.keys.zero_optimization.offload_optimizer
    if offload is not None and offload.device not in (None, "none"):
        return deepspeed.ops.adam.DeepSpeedCPUAdam(groups, adamw_mode=True, **settings)
    return torch.optim.AdamW(groups, **settings)


class Engine:
    """A DeepSpeed engine around a model.

    The fp32 weights an optimizer owns lie in another place at every ZeRO stage; ``masters`` yields this rank's part of
    them wherever they are, ``full_weights`` and ``set_full_weights`` see them whole, under the model's names.
    """

    def __init__(self, run: RunFile, model: RefinedViT, batch: BatchPlan, world: World) -> None:
        self.bf16 = computes_in_bf16(run, world)
        self.batch = batch
        config = deepspeed_config(run, batch, self.bf16)
        if run.keys.activation_checkpointing is not None:
            deepspeed.checkpointing.configure(mpu_=None, deepspeed_config=config)
        self.module = model.to(world.device)
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=self.module, optimizer=build_optimizer(run, self.module), config=config
        )
        self._stage = run.keys.zero_optimization.stage
        self._clips = run.keys.gradient_clipping
        self._grad_norm: Tensor | float | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward through DeepSpeed."""
        return self.engine(*args, **kwargs)

    def backward_and_step(self, loss: Tensor) -> None:
        """Backward of one micro-batch; the optimizer steps when the accumulation is full."""
        self.engine.backward(loss)
        last = self.engine.is_gradient_accumulation_boundary()
        if last and self._stage == 0 and not self.bf16:  # the one case in which DeepSpeed tells no gradient norm
            grads = [p.grad for p in self.module.parameters() if p.grad is not None]
            self._grad_norm = torch.nn.utils.get_total_norm(grads)
        self.engine.step()
        if last and (norm := self.engine.get_global_grad_norm()) is not None:
            self._grad_norm = norm

    def set_lr(self, lr: float) -> None:
        """Learning rate of the next step; groups that scale theirs (layer-wise decay) scale it."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)

    @property
    def grad_norm(self) -> float | None:
        """Global gradient norm of the last step, before clipping."""
        return None if self._grad_norm is None else float(self._grad_norm)

    @property
    def skipped_steps(self) -> int:
        """Optimizer steps DeepSpeed has left out because of gradients that were not finite."""
        return self.engine.skipped_steps

    @property
    def stepped(self) -> bool:
        """Whether the last optimizer step changed the weights."""
        return bool(self.engine.was_step_applied())

    def masters(self) -> list[Tensor]:
        """The fp32 weights this rank's optimizer updates: whole, flat or partitioned, by ZeRO stage."""
        if self._stage == 3:
            return [tensor.data for tensor in self.optimizer.fp32_partitioned_groups_flat]
        base = getattr(self.optimizer, "optimizer", self.optimizer)
        return [tensor.data for group in base.param_groups for tensor in group["params"]]

    def _named_masters(self) -> Iterator[tuple[str, nn.Parameter, Tensor | None]]:
        """Names and parameters; the third is the whole master where no partition has to be gathered (stage 0)."""
        names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        if self._stage > 0:
            trained = ((name, one, None) for name, one in self.module.named_parameters() if one.requires_grad)
            yield from trained
            return
        wrapped = getattr(self.optimizer, "fp16_groups", None)
        groups = wrapped or [group["params"] for group in self.optimizer.param_groups]
        parameters = [parameter for group in groups for parameter in group]
        for parameter, master in zip(parameters, self.masters(), strict=True):
            yield names[id(parameter)], parameter, master

    def full_weights(self) -> dict[str, Tensor]:
        """Every fp32 weight, whole, on the CPU. Every rank must call it."""
        frozen = ((name, one) for name, one in self.module.named_parameters() if not one.requires_grad)
        weights = {name: one.detach().float().cpu().clone() for name, one in frozen}
        for name, parameter, master in self._named_masters():
            full = safe_get_full_fp32_param(parameter) if master is None else master
            weights[name] = full.detach().float().cpu().clone()
        return {name: weights[name] for name, _ in self.module.named_parameters()}

    def set_full_weights(self, weights: dict[str, Tensor]) -> None:
        """Write whole fp32 weights into the masters (not into the parameters forward uses). Every rank must call it."""
        for name, parameter, master in self._named_masters():
            if master is None:
                safe_set_full_fp32_param(parameter, weights[name].to(parameter.device))
            else:
                master.copy_(weights[name])

    def statistics(self) -> dict[str, Tensor]:
        """The model's buffers that training changes (running statistics), by name; on the device, live."""
        return {name: buffer for name, buffer in self.module.named_buffers() if buffer is not None}

    def close(self) -> None:
        """Let DeepSpeed go in order; without this it now and then aborts at exit."""
        self.engine.destroy()
