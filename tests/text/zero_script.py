"""On every rank: a refined BERT is fine-tuned by transformers' Trainer under ZeRO, a stage after the other.

Saves each stage's model, the weights of one plain loop over the same samples, and by stage how many of the refiners'
weights are shards between steps. Every stage begins with a refined model that was saved before. Then bottlenecks are
trained, and each process's running means are saved too.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

os.environ["HF_HUB_OFFLINE"] = "1"

from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification, BertConfig, set_seed

from refiner_ds.text import add_refiner
from refiner_ds.text.loading import load_model
from refiner_ds.text.options import RefinerOptions
from refiner_ds.text.run_file import TextRun
from refiner_ds.text.training import make_trainer, quiet, train_timed, training_arguments, with_mean_loss

SAMPLES, BATCH, RATE = 16, 8, 1e-2
MODEL = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 32,
    "vocab_size": 60, "max_position_embeddings": 16, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


def samples() -> list[dict[str, list[int] | int]]:
    draw = torch.Generator().manual_seed(3)
    rows = []
    for label in [0, 1] * (SAMPLES // 2):
        words = torch.randint(1, 60, (9,), generator=draw).tolist()
        real = 9 - 3 * label
        rows.append({"input_ids": words, "attention_mask": [1] * real + [0] * (9 - real), "labels": label})
    return rows


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def run_file(stage: int, world: int, model: Path, kind: str = "linear") -> TextRun:
    training = {
        "max_steps": 3, "per_device_train_batch_size": BATCH // world, "learning_rate": RATE, "optim": "sgd",
        "lr_scheduler_type": "constant", "train_sampling_strategy": "sequential", "logging_strategy": "no",
    }  # fmt: skip
    # The engine's optimizer is named here: the Trainer then steps DeepSpeed's own.
    buckets = {"reduce_bucket_size": 100_000, "allgather_bucket_size": 100_000, "stage3_param_persistence_threshold": 0}
    keys = {
        "zero_optimization": {"stage": stage, **buckets}, "zero_allow_untested_optimizer": True,
        "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto",
    }  # fmt: skip
    refiner = RefinerOptions(kind, 2, 3, "fresh")
    return TextRun(Path("zero.json"), str(model), None, refiner, training=training, deepspeed=keys)


def plain_loop(model: torch.nn.Module, rows: list[dict]) -> dict[str, torch.Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for step in range(3):
        start = step * BATCH % SAMPLES
        model(**collate(rows[start : start + BATCH])).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def running_means(begun: Path, output: Path, world: int, rows: list[dict]) -> list[float]:
    """Of the bottlenecks of a model that the Trainer has trained."""
    run = run_file(0, world, begun, "bottleneck")
    arguments = training_arguments(run, output, 0)
    model = load_model(run, AutoModelForSequenceClassification, None, num_labels=2)
    train_timed(make_trainer(with_mean_loss(model), arguments, None, collate, rows))
    return [x for name, buffer in model.named_buffers() if "running_mean" in name for x in buffer.tolist()]


def main(report: Path) -> None:
    quiet()
    rank, world, rows = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), samples()
    found: dict[int, int] = {}
    set_seed(7)
    plain, folder = report.parent / f"plain_{rank}", report.parent / f"begun_{rank}"
    AutoModelForSequenceClassification.from_config(BertConfig(**MODEL)).save_pretrained(plain)
    twin = add_refiner(
        AutoModelForSequenceClassification.from_config(BertConfig(**MODEL)), expansion_ratio=2, init="fresh"
    )
    twin.save_pretrained(folder)
    wanted = plain_loop(twin.train(), rows)
    for stage in (0, 1, 2, 3):
        output = report.parent / f"stage_{stage}"
        run = run_file(stage, world, folder)
        arguments = training_arguments(run, output, 0)
        model = load_model(run, AutoModelForSequenceClassification, None, num_labels=2)
        trainer = make_trainer(with_mean_loss(model), arguments, None, collate, rows)
        train_timed(trainer)
        found[stage] = sum(weight.numel() == 0 for name, weight in model.named_parameters() if "refiner" in name)
        trainer.save_model(str(output))
    statistics: list[list[float]] = [[]] * world
    dist.all_gather_object(statistics, running_means(plain, report.parent / "bottleneck", world, rows))
    if rank == 0:
        save_file({name: value.contiguous() for name, value in wanted.items()}, report.parent / "wanted.safetensors")
        report.write_text(json.dumps({"sharded": found, "running_means": statistics}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
