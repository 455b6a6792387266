"""From a run file to a DeepSpeed engine, and what the loop asks of it that DeepSpeed has no single call for."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor

from refiner_ds.attention.compiling import keep_code_by_cpu
from refiner_ds.config import BatchSplit, RunFile
from refiner_ds.models import RefinedViT
from refiner_ds.training import muon
from refiner_ds.training.cpu_adamw import cpu_adamw
from refiner_ds.training.fragments import Fragment, find_fragments
from refiner_ds.training.model_states import reduce_bucket_size
from refiner_ds.training.parameter_groups import parameter_groups
from refiner_ds.training.world import World

FUSED_ON = ("cuda",)  # on CPUs the fused AdamW gains little, and rounds otherwise than what runs began with


def computes_in_bf16(run: RunFile, world: World) -> bool:
    """``bf16.enabled``, resolved for this device: "auto" is on where a GPU has bf16, and off on CPUs (slower in it)."""
    asked = run.keys.bf16.enabled
    if asked == "auto":
        return world.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return asked


def evaluates_in_bf16(run: RunFile, world: World) -> bool:
    """Whether evaluation computes under autocast: where training computes in bf16, CPUs apart, slower so."""
    return world.device.type == "cuda" and computes_in_bf16(run, world)


def deepspeed_config(run: RunFile, batch: BatchSplit, bf16: bool, trained: int) -> dict[str, Any]:
    """The run file's DeepSpeed part with the batch spelled out, as ``deepspeed.initialize`` wants it.

    Args:
        trained: parameters.
    """
    config = run.keys.model_dump(mode="json", exclude_unset=True, exclude_none=True, exclude={"refiner", "extends"})
    config["train_batch_size"] = batch.global_batch
    config["train_micro_batch_size_per_gpu"] = batch.micro_batch
    config["gradient_accumulation_steps"] = batch.accumulation
    config["bf16"] = {**config.get("bf16", {}), "enabled": bf16}
    if run.keys.zero_optimization.stage:
        config["zero_optimization"]["reduce_bucket_size"] = reduce_bucket_size(run.keys.zero_optimization, trained)
    config["gradient_clipping"] = run.keys.gradient_clipping or 0.0  # left out, DeepSpeed clips at 1.0 unasked
    # DeepSpeed prints its own progress every ten steps otherwise, over the one progress line.
    config.setdefault("steps_per_print", 2**31)
    return config


def build_optimizer(run: RunFile, model: RefinedViT) -> torch.optim.Optimizer:
    """AdamW over the groups of ``parameter_groups``; on a GPU torch's fused one, a few kernels for all weights."""
    recipe = run.refiner.recipe
    groups = parameter_groups(recipe, model)
    settings: dict[str, Any] = {"lr": recipe.lr, "betas": recipe.betas, "eps": recipe.eps}
    if run.keys.zero_optimization.offloads_optimizer:
        return cpu_adamw(groups, settings)
    fused = next(model.parameters()).device.type in FUSED_ON
    return torch.optim.AdamW(groups, fused=fused or None, **settings)


class Engine:
    """A DeepSpeed engine around a model.

    The fp32 weights an optimizer owns lie in another place at every ZeRO stage: ``masters`` are this rank's part of
    them wherever they are, ``fragments`` says which part of which parameter that is.

    Attributes:
        frozen: weights that are not trained, by name: whole, fp32, on the CPU.
        before_update: called when all of a step but the update is done, in stages 1 to 3 once a parameter group.
        await_copies: called before masters, moments or EMA change, and returns once nobody reads them any more.
    """

    before_update: Callable[[], None] | None = None
    await_copies: Callable[[], None] | None = None

    def __init__(self, run: RunFile, model: RefinedViT, batch: BatchSplit, world: World) -> None:
        self.bf16 = computes_in_bf16(run, world)
        self.batch = batch
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        config = deepspeed_config(run, batch, self.bf16, trained)
        if run.keys.activation_checkpointing is not None:
            deepspeed.checkpointing.configure(mpu_=None, deepspeed_config=config)
        # fp32 also where the model is bf16: weights that never change are never rounded.
        self.frozen = {name: p.detach().cpu().clone() for name, p in model.named_parameters() if not p.requires_grad}
        self.module = model.to(world.device)
        optimizer = build_optimizer(run, self.module)
        for group in optimizer.param_groups:
            # In bf16 at stage 0, DeepSpeed takes a step to make the optimizer's states: it must not decay the weights,
            # nor be counted. `set_lr` comes before every real step.
            group["lr"] = 0.0
        muon.import_uncompiled()
        self.engine, self.optimizer, _, _ = deepspeed.initialize(model=self.module, optimizer=optimizer, config=config)
        if run.refiner.model.compile != "none":
            keep_code_by_cpu()
            self.engine.compile(backend=run.refiner.model.compile)  # evaluation has a model of its own
        self._rank = world.rank
        self._stage = run.keys.zero_optimization.stage
        self._clips = run.keys.gradient_clipping
        self._grad_norm: Tensor | float | None = None
        self._allows: Callable[[Tensor | float | None], bool] | None = None
        self._allowed: bool | None = None
        self._gate(self._base)
        self.restore_counts(0, 0, 0)

    def _gate(self, optimizer: torch.optim.Optimizer) -> None:
        """Let a step be called off when all but the update is done: every ZeRO stage ends in this call."""
        update = optimizer.step

        def step(*args: Any, **kwargs: Any) -> Any:
            if self._allowed is None and self._allows is not None:  # stages 1 to 3 come here once a parameter group
                self._allowed = self._allows(getattr(self.optimizer, "_global_grad_norm", self._grad_norm))
            if self._allowed is False:
                return None
            if self.before_update is not None:
                self.before_update()
            if self.await_copies is not None:
                self.await_copies()
            return update(*args, **kwargs)

        optimizer.step = step  # type: ignore[method-assign]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward through DeepSpeed."""
        return self.engine(*args, **kwargs)

    def backward_and_step(self, loss: Tensor, allows: Callable[[Tensor | float | None], bool] | None = None) -> None:
        """Backward of one micro-batch; the optimizer steps when the accumulation is full.

        Args:
            allows: asked with the gradient norm, on all ranks alike, before weights change; False skips the step.
        """
        self._allows, self._allowed = allows, None
        self.engine.backward(loss)
        last = self.engine.is_gradient_accumulation_boundary()
        if last and self._stage == 0 and not self.bf16:  # the one case in which DeepSpeed tells no gradient norm
            grads = [p.grad for p in self.module.parameters() if p.grad is not None]
            self._grad_norm = torch.nn.utils.get_total_norm(grads)
        self.engine.step()
        if last and (norm := self.engine.get_global_grad_norm()) is not None:
            self._grad_norm = norm
        if last and self._allowed is False:
            self.engine.skipped_steps += 1

    def set_lr(self, lr: float) -> None:
        """Learning rate of the next step; groups that scale theirs (layer-wise decay) scale it."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)

    @property
    def grad_norm(self) -> float | None:
        """Global gradient norm of the last step, before clipping."""
        return None if self._grad_norm is None else float(self._grad_norm)

    @property
    def unread_grad_norm(self) -> Tensor | float | None:
        """`grad_norm` as it comes: a tensor that the device may still have to compute."""
        return self._grad_norm

    @property
    def skipped_steps(self) -> int:
        """Optimizer steps DeepSpeed has left out because of gradients that were not finite."""
        return self.engine.skipped_steps

    @property
    def stepped(self) -> bool:
        """Whether the last optimizer step changed the weights."""
        return bool(self.engine.was_step_applied()) and self._allowed is not False

    def masters(self) -> list[Tensor]:
        """The fp32 weights this rank's optimizer updates: whole, flat or partitioned, by ZeRO stage."""
        return [tensor.data for tensor in self._masters()]

    def master_parameters(self) -> list[Tensor]:
        """The same as the optimizer holds them, with the gradients it is given."""
        return list(self._masters())

    def _masters(self) -> list[Tensor]:
        if self._stage == 3:
            return list(self.optimizer.fp32_partitioned_groups_flat)
        return [tensor for group in self._base.param_groups for tensor in group["params"]]

    @property
    def _base(self) -> torch.optim.Optimizer:
        """torch's optimizer, which DeepSpeed wraps at most stages."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def moments(self, key: str) -> list[Tensor]:
        """AdamW's moments in the form of the masters, live; zeros before the first step.

        Args:
            key: "exp_avg" or "exp_avg_sq".
        """
        return [self._moments_of(master)[key] for master in self._masters()]

    def _moments_of(self, master: Tensor) -> dict[str, Any]:
        state = self._base.state[master]
        if "exp_avg" not in state:
            zero: Any = 0 if isinstance(self._base, deepspeed.ops.adam.DeepSpeedCPUAdam) else torch.zeros(())
            if self._base.defaults.get("fused"):
                zero = zero.to(master.device)  # where the fused kernel counts it
            state.update(step=zero, exp_avg=torch.zeros_like(master), exp_avg_sq=torch.zeros_like(master))
        return state

    @property
    def optimizer_steps(self) -> int:
        """Steps AdamW has counted, for its bias correction: those that were not skipped."""
        return int(self._moments_of(self._masters()[0])["step"])

    def restore_counts(self, step: int, optimizer_steps: int, skipped_steps: int) -> None:
        """Put DeepSpeed's and AdamW's counts where they were after ``step`` optimizer steps."""
        for master in self._masters():
            state = self._moments_of(master)
            count = state["step"]
            state["step"] = torch.full_like(count, optimizer_steps) if torch.is_tensor(count) else optimizer_steps
        self.engine.global_steps, self.engine.skipped_steps = step, skipped_steps
        self.engine.global_samples = step * self.batch.global_batch
        self.engine.micro_steps = step * self.batch.accumulation

    @cached_property
    def fragments(self) -> list[Fragment]:
        """Where this rank's part of every parameter lies in the masters."""
        return find_fragments(self.optimizer, self._masters(), dict(self.module.named_parameters()), self._rank)

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        """Whole shapes of the parameters by name, frozen ones included."""
        return {name: getattr(p, "ds_shape", p.shape) for name, p in self.module.named_parameters()}

    @property
    def replicated(self) -> bool:
        """Whether every rank has whole masters."""
        return self._stage == 0 and not any(hasattr(p, "_hp_mapping") for p in self.module.parameters())

    def full_weights(self) -> dict[str, Tensor]:
        """Every fp32 weight, whole, on the CPU. Every rank must call it."""
        trained = dict(self.frozen)
        if self.replicated:
            masters = self.masters()
            for fragment in self.fragments:
                whole = fragment.of(masters).detach().float().cpu().clone()
                trained[fragment.name] = whole.view(self.shapes[fragment.name])
        else:
            for name, parameter in self.module.named_parameters():
                if name not in trained:
                    trained[name] = safe_get_full_fp32_param(parameter).detach().float().cpu().clone()
        return {name: trained[name] for name in self.shapes}

    @torch.no_grad()
    def load_parameters(self, weights: Callable[[str], Tensor]) -> None:
        """Write whole weights into the parameters that forward uses, in their own precision. Every rank must call it.

        Args:
            weights: a whole fp32 weight by name.
        """
        for name, parameter in self.module.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=self._stage == 3):
                if self._stage < 3 or self._rank == 0:
                    parameter.data.copy_(weights(name))
        self.frozen = {name: weights(name).clone() for name in self.frozen}

    def statistics(self) -> dict[str, Tensor]:
        """The model's buffers that training changes (running statistics), by name; on the device, live."""
        return {name: buffer for name, buffer in self.module.named_buffers() if buffer is not None}

    def close(self) -> None:
        """Let DeepSpeed go in order; without this it now and then aborts at exit."""
        self.engine.destroy()
