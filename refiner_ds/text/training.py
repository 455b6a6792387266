"""What fine-tuning and pre-training share: transformers' Trainer, with DeepSpeed where the run file has its keys.

run file ─ text.training ─> TrainingArguments ─> Trainer <─ model, tokenizer
         └ DeepSpeed's keys ─> deepspeed=

Arguments come before the model: ZeRO 3 shards it while it is built.
"""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.state import AcceleratorState, PartialState
from transformers import Trainer, TrainingArguments

from refiner_ds.errors import ConfigError
from refiner_ds.files import write_atomically
from refiner_ds.glue_table import RESULTS
from refiner_ds.text.mean_statistics import MeanStatistics
from refiner_ds.text.run_file import TextRun, refuse_unknown_arguments

__all__ = ["make_trainer", "quiet", "train_timed", "training_arguments", "with_mean_loss", "write_results"]

ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}


def quiet() -> None:
    """Leave warnings and errors of transformers; its bars and reports of loading are not a command's output."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def training_arguments(run: TextRun, output: Path, seed: int) -> Any:
    """TrainingArguments of a run; from here on DeepSpeed's state belongs to it.

    Raises:
        ConfigError: a key of ``text.training`` is unknown or its value cannot be.
    """
    refuse_unknown_arguments(run, (one.name for one in fields(TrainingArguments)))
    given: dict[str, Any] = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, **run.training}
    given |= {"output_dir": str(output), "seed": seed}
    if run.deepspeed:
        given["deepspeed"] = _with_whole_saves(run.deepspeed)
        _prepare_deepspeed()
        if not torch.cuda.is_available():
            _join_on_cpu()
            given["accelerator_config"] = {**given.get("accelerator_config", {}), "use_configured_state": True}
    elif not torch.cuda.is_available():
        given["use_cpu"] = True
    if not torch.cuda.is_available():
        given.setdefault("dataloader_pin_memory", False)
    try:
        return TrainingArguments(**given)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{run.path}: text.training: {str(error).strip().splitlines()[0]}") from None


def _with_whole_saves(keys: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's keys; at stage 3 saving gathers the weights unless they say otherwise: shards cannot be loaded."""
    zero = keys.get("zero_optimization", {})
    if not isinstance(zero, dict) or zero.get("stage") != 3:
        return keys
    return {**keys, "zero_optimization": {"stage3_gather_16bit_weights_on_model_save": True, **zero}}


def _prepare_deepspeed() -> None:
    """What DeepSpeed looks for before a process group is opened."""
    import deepspeed

    # It would compile a shared-memory all-reduce on first use on CPUs; gloo does the same work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:  # without a launcher it looks for MPI: say that this process is alone
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update({**ALONE, "MASTER_PORT": str(port)})


def _join_on_cpu() -> None:
    """Open the process group that accelerate does not open for DeepSpeed on CPUs, where every rank would be alone.

    There it finds no device of a kind it knows, takes no backend, and says that there is one process. With the backend
    given it joins as it does on GPUs; TrainingArguments is to take that state as it is.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    try:
        PartialState(backend="gloo")
    finally:
        del os.environ["ACCELERATE_USE_DEEPSPEED"]


def with_mean_loss(model: Any) -> Any:
    """The model, whose loss the Trainer is to take as a mean over a process's samples, as that of a classifier is.

    It takes every loss of transformers for a sum over the words of all processes, as a language model's is, and would
    multiply a classifier's gradients by the number of processes, and without DeepSpeed by that of accumulated steps.
    """
    model.accepts_loss_kwargs = False
    return model


def make_trainer(model: Any, arguments: Any, tokenizer: Any, collator: Any, samples: list[Any]) -> Any:
    """A Trainer over encoded samples."""
    return Trainer(
        model=model, args=arguments, train_dataset=samples, data_collator=collator, processing_class=tokenizer,
        callbacks=[MeanStatistics()],
    )  # fmt: skip


def train_timed(trainer: Any) -> tuple[float, float]:
    """Train to the end; returns the mean loss, and how many seconds it took, to a tenth."""
    begun = time.monotonic()
    loss: float = trainer.train().training_loss
    return loss, round(time.monotonic() - begun, 1)


def write_results(folder: Path, results: dict[str, Any]) -> None:
    """``results.json`` in a folder that is made where it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / RESULTS, json.dumps(results, indent=1) + "\n")
