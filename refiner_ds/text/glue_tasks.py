"""The nine tasks of GLUE (Wang et al., 2019): where their sentences and labels stand, and what they are measured by.

folder of TSV files     as gluebenchmark.com distributes them: SST-2/train.tsv, MNLI/dev_matched.tsv
folder of datasets      as ``datasets.save_to_disk`` writes the hub's "glue": splits train, validation_matched
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from refiner_ds.errors import ConfigError

__all__ = ["TASKS", "Task", "measure", "task_of"]

Column = str | int

# What GLUE reports, from predictions and labels: each in [-1, 1].
METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "mcc": lambda found, true: matthews_corrcoef(true, found),
    "accuracy": lambda found, true: accuracy_score(true, found),
    "f1": lambda found, true: f1_score(true, found, zero_division=0),
    "pearson": lambda found, true: pearsonr(found, true).statistic,
    "spearman": lambda found, true: spearmanr(found, true).statistic,
}
YES_NO = ("entailment", "not_entailment")
THREE = ("entailment", "neutral", "contradiction")
SCORES = 5.0  # STS-B's run from 0 to this


class Task(NamedTuple):
    """One task.

    Args:
        folder: of its TSV files.
        columns: of the sentence, or of both, in TSV files; numbers where the files have no header.
        label: column of the label there.
        labels: the labels as TSV files spell them, in the order of the hub's numbers; none for a score from 0 to 5.
        metrics: keys of METRICS. A task's score is their mean.
        hub_columns: of the sentences in the hub's data set, whose label is "label".
        dev: names of the development sets, in both forms.
        cut_lines: share of lines that may lack columns and are left out, as the hub's data set leaves them out.
    """

    folder: str
    columns: tuple[Column, ...]
    label: Column
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    hub_columns: tuple[str, ...]
    dev: dict[str, str] = {"dev": "validation"}
    cut_lines: float = 0.0

    @property
    def is_regression(self) -> bool:
        """Whether it asks for a score rather than a class."""
        return not self.labels


PAIR, TRUTH = ("sentence1", "sentence2"), ("0", "1")
MATCHED = {"dev_matched": "validation_matched", "dev_mismatched": "validation_mismatched"}

TASKS = {
    "cola": Task("CoLA", (3,), 1, TRUTH, ("mcc",), ("sentence",)),
    "sst2": Task("SST-2", ("sentence",), "label", TRUTH, ("accuracy",), ("sentence",)),
    "mrpc": Task("MRPC", ("#1 String", "#2 String"), "Quality", TRUTH, ("accuracy", "f1"), PAIR),
    "stsb": Task("STS-B", PAIR, "score", (), ("pearson", "spearman"), PAIR),
    "qqp": Task(
        "QQP",
        ("question1", "question2"),
        "is_duplicate",
        TRUTH,
        ("accuracy", "f1"),
        ("question1", "question2"),
        cut_lines=1e-3,  # a few of the benchmark's own lines end early
    ),  # fmt: skip
    "mnli": Task("MNLI", PAIR, "gold_label", THREE, ("accuracy",), ("premise", "hypothesis"), MATCHED),
    "qnli": Task("QNLI", ("question", "sentence"), "label", YES_NO, ("accuracy",), ("question", "sentence")),
    "rte": Task("RTE", PAIR, "label", YES_NO, ("accuracy",), PAIR),
    "wnli": Task("WNLI", PAIR, "label", TRUTH, ("accuracy",), PAIR),
}


def task_of(name: str) -> Task:
    """The task of this name, in any common spelling.

    Raises:
        ConfigError: there is none.
    """
    task = TASKS.get(name.lower().replace("-", ""))
    if task is None:
        raise ConfigError(f"--task {name}: is not a task; it must be one of {', '.join(TASKS)}")
    return task


def measure(task: Task, outputs: np.ndarray, labels: Sequence[float]) -> dict[str, float]:
    """A development set's metrics, in hundredths as GLUE prints them, and ``score``, their mean.

    Args:
        outputs: the model's, [samples, classes], or [samples, 1] for scores.
        labels: the numbers of the true classes, or the true scores.
    Returns:
        By name. A correlation with outputs that are all equal is not a number, and counts as 0.
    """
    truth = np.asarray(labels)
    found = outputs.reshape(len(truth), -1)
    predicted = found[:, 0] if task.is_regression else found.argmax(-1)
    constant = task.is_regression and bool(np.all(predicted == predicted[0]))
    values = {name: 0.0 if constant else 100 * float(METRICS[name](predicted, truth)) for name in task.metrics}
    return {**values, "score": sum(values.values()) / len(values)}
