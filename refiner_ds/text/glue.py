"""Fine-tunes an encoder, refined or plain, on a task of GLUE, and measures it on the development set.

    python -m refiner_ds.text.glue --task sst2 --config ds_configs/glue/bert_small_refiner.json --data glue_data
    torchrun --nproc_per_node 8 --module refiner_ds.text.glue --task mnli --config … --data glue_data --seed 1

The data folder holds the benchmark's TSV files (glue_data/SST-2/train.tsv), or what datasets.save_to_disk wrote.
Results go to <output>/<run file's name>/<task>/seed_<n>/results.json. Exit codes: 0 done, 2 refused.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from refiner_ds.errors import report_errors
from refiner_ds.glue_table import glue_folder
from refiner_ds.text.command import run_parser


@report_errors
def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    given = _parser().parse_args(argv)
    from refiner_ds.text.glue_data import read_task
    from refiner_ds.text.glue_tasks import task_of
    from refiner_ds.text.run_file import read_run

    task, run = task_of(given.task), read_run(given.config)
    if given.model:
        run = replace(run, model=str(given.model), tokenizer=None)
    data = read_task(given.data, task)
    output = glue_folder(given.output, run.path, given.task.lower().replace("-", ""), given.seed)
    results = fine_tune(run, task, data, output, given.seed)
    if results is not None:
        print(_sentence(given.task, run, results), flush=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = run_parser(__doc__, "python -m refiner_ds.text.glue", "runs/glue", "the head, dropout and order")
    parser.add_argument("--task", required=True, help="cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte or wnli")
    parser.add_argument("--data", required=True, type=Path, metavar="FOLDER", help="GLUE's files")
    parser.add_argument("--model", metavar="PLACE", help="pre-trained folder or name, instead of the run file's")
    return parser


def fine_tune(run: Any, task: Any, data: Any, output: Path, seed: int) -> dict[str, Any] | None:
    """Train on the training set, measure on every development set, and write what was found.

    Returns:
        What ``results.json`` holds; ``None`` on other ranks than the first.
    Raises:
        RefinerError: run file, model or checkpoint cannot be what was asked for.
    """
    from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding

    from refiner_ds.text.glue_tasks import measure
    from refiner_ds.text.loading import load_model, load_tokenizer
    from refiner_ds.text.training import (
        make_trainer,
        quiet,
        train_timed,
        training_arguments,
        with_mean_loss,
        write_results,
    )

    quiet()
    arguments = training_arguments(run, output, seed)
    tokenizer = load_tokenizer(run)
    head = {"num_labels": 1, "problem_type": "regression"} if task.is_regression else {"num_labels": len(task.labels)}
    model = load_model(run, AutoModelForSequenceClassification, tokenizer, **head)
    encoded = {name: encode(samples, tokenizer, run.max_length, model) for name, samples in data.items()}
    train = encoded.pop("train")
    trainer = make_trainer(with_mean_loss(model), arguments, tokenizer, DataCollatorWithPadding(tokenizer), train)
    loss, seconds = train_timed(trainer)
    dev = {name: measure(task, trainer.predict(x).predictions, data[name].labels) for name, x in encoded.items()}
    trainer.save_model(str(output))
    if not trainer.is_world_process_zero():
        return None
    results = {
        "task": task.folder, "seed": seed, "config": str(run.path), "model": run.model,
        "refiner": None if run.refiner is None else run.refiner.as_keys(), "samples": len(train),
        "train_loss": loss, "train_seconds": seconds, "dev": dev,
        "score": sum(one["score"] for one in dev.values()) / len(dev),
    }  # fmt: skip
    write_results(output, results)
    return results


def encode(samples: Any, tokenizer: Any, max_length: int, model: Any) -> list[dict[str, Any]]:
    """Token numbers and label of every sample; cut to what both the run and the model's positions allow."""
    longest = min(max_length, getattr(model.config, "max_position_embeddings", max_length))
    columns = [list(column) for column in zip(*samples.sentences, strict=True)]
    found = tokenizer(*columns, truncation=True, max_length=longest)
    names = list(found.keys())
    rows = zip(*(found[name] for name in names), strict=True)
    return [
        {**dict(zip(names, row, strict=True)), "labels": label} for row, label in zip(rows, samples.labels, strict=True)
    ]


def _sentence(name: str, run: Any, results: dict[str, Any]) -> str:
    measured = ", ".join(
        f"{dev} {metric} {value:.2f}"
        for dev, metrics in results["dev"].items()
        for metric, value in metrics.items()
        if metric != "score"
    )
    kind = "plain" if run.refiner is None else f"refined ({run.refiner.kind})"
    return f"{name}, {kind}, seed {results['seed']}: {measured} ({results['train_seconds']:.0f} s of training)"


if __name__ == "__main__":
    sys.exit(main())
