"""From a command's options to figures: the model and its sets, the process group, and one pass over each set."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from refiner_ds.analysis.loading import LoadedModel, load_model
from refiner_ds.attention import resolve_backend
from refiner_ds.data.augment import EvalSettings, EvalViews
from refiner_ds.data.decoding import AS_STORED
from refiner_ds.data.loader import eval_batches
from refiner_ds.data.workers import explain_worker_death
from refiner_ds.errors import ConfigError, DataError, report_rank_errors
from refiner_ds.evaluation.corruptions import ALEXNET_ERRORS, CorruptedView, corruption_figures, require_library
from refiner_ds.evaluation.metrics import class_rows, confusions, figures
from refiner_ds.evaluation.predictions import Predictions, Reading, predict
from refiner_ds.evaluation.sets import EvaluationSet, open_set, real_labels
from refiner_ds.training.build import choose_attention
from refiner_ds.training.engine import evaluates_in_bf16
from refiner_ds.training.world import World, init, shutdown

__all__ = ["Evaluator", "load_for"]

DEFAULT_BATCH = 64


def load_for(options: argparse.Namespace) -> LoadedModel:
    """The model that options name, with the crop ratio and the class names that they give."""
    loaded = load_model(str(options.place), options.weights, options.test_size)
    if getattr(options, "crop_ratio", None):
        loaded = replace(loaded, view=replace(loaded.view, crop_ratio=options.crop_ratio))
    if options.classes is not None:
        loaded = replace(loaded, classes=_read_names(options.classes))
    outputs = getattr(loaded.model, "num_classes", None)
    if loaded.classes is None:
        raise ConfigError(f"{loaded.label}: the names of its {outputs} classes are not known; give --classes FILE")
    if outputs is not None and len(loaded.classes) > outputs:
        raise ConfigError(f"{loaded.label}: has {outputs} outputs, fewer than the {len(loaded.classes)} class names")
    return loaded


def _read_names(file: Path) -> list[str]:
    """Class names, a line each. Raises DataError where the file cannot be read or a name comes twice."""
    try:
        names = [line.strip() for line in file.read_text("utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read ({error}); give class names, a line each") from None
    if twice := next((name for place, name in enumerate(names) if name in names[:place]), None):
        raise DataError(f"{file}: names {twice} twice; names of classes must differ")
    return names


class Evaluator:
    """Evaluates one model, over any number of sets.

    Args:
        options: of the command.
    """

    def __init__(self, loaded: LoadedModel, options: argparse.Namespace) -> None:
        assert loaded.classes is not None
        self.loaded, self._options = loaded, options
        self._data = loaded.run.refiner.data if loaded.run else None
        self.classes = loaded.classes
        outputs = int(getattr(loaded.model, "num_classes", len(self.classes)))
        # Outputs that no class was trained for can still be guessed.
        self._names = [*self.classes, *(f"output {number}" for number in range(len(self.classes), outputs))]
        self._world: World | None = None
        self._bf16 = False

    @property
    def world(self) -> World:
        """The open process group."""
        assert self._world is not None
        return self._world

    def open_set(self, given: str) -> EvaluationSet:
        """The set that ``[NAME=]PLACE`` names; see `sets.open_set`."""
        cache = self._data.cache if self._data else None
        data = open_set(given, self.classes, cache, getattr(self._options, "partial", False))
        if data.kind == "c":
            require_library()
            self._corruptions()
        return data

    def _corruptions(self) -> list[str]:
        chosen = self._options.corruptions or list(ALEXNET_ERRORS)
        if strange := [name for name in chosen if name not in ALEXNET_ERRORS]:
            raise ConfigError(f"--corruptions {strange[0]}: must be one of {', '.join(ALEXNET_ERRORS)}")
        return list(dict.fromkeys(chosen))

    @contextmanager
    def started(self) -> Iterator[World]:
        """The process group, open, and the model on this process's device."""
        self._world = init()
        if self.loaded.run is not None:
            choose_attention(self.loaded.run, self.world.device)
            self._bf16 = evaluates_in_bf16(self.loaded.run, self.world)
        elif os.environ.get("REFINER_ATTENTION"):
            resolve_backend(device=self.world.device)
        self.loaded.model.to(self.world.device)
        with report_rank_errors(self.world.rank), explain_worker_death():
            yield self.world
        shutdown()

    def predict(
        self,
        data: EvaluationSet,
        view: EvalSettings | EvalViews,
        readings: Sequence[Reading] = (None,),
        samples: np.ndarray | None = None,
    ) -> Predictions:
        """One pass over a set, or over some of its samples. Every rank must call it.

        Raises:
            DataError: a shard is missing or damaged.
        """
        self._refuse_missing_files(data)
        views = len(view.views) if isinstance(view, EvalViews) else 1
        chunk = self._options.batch or (self._data.eval_batch if self._data else None) or DEFAULT_BATCH
        workers = self._data.workers if self._data and self._options.workers is None else self._options.workers
        batches = eval_batches(
            data.index,
            view,
            batch=max(1, chunk // views),
            rank=self.world.rank,
            world_size=self.world.size,
            workers=workers or 0,
            on_bad_sample=self._on_bad_sample,
            decode=self._data or AS_STORED,
            samples=samples,
        ).handed_over(self.world.device)
        return predict(
            self.loaded.model,
            batches,
            self.world,
            self.loaded.mean,
            self.loaded.std,
            views=views,
            readings=readings,
            bf16=self._bf16,
            chunk=chunk,
        )

    @property
    def _on_bad_sample(self) -> str:
        return self._data.on_bad_sample if self._data else "error"

    def _refuse_missing_files(self, data: EvaluationSet) -> None:
        """Compare shards with their index, once on each node; all processes are refused together."""
        looks = self._on_bad_sample == "error" and self.world.local_rank == 0
        if error := self.world.first(next(iter(data.index.file_errors()), None) if looks else None):
            raise DataError(error)

    def evaluate(self, data: EvaluationSet) -> tuple[dict[str, Any], list[dict[str, Any]] | None]:
        """All figures of a set from one pass over it, and a row a class. Every rank must call it."""
        if data.kind == "c":
            return self._evaluate_corrupted(data), None
        accepted = real_labels(data, self.classes, self._options.real) if data.kind == "real" else None
        readings: list[Reading] = [None] if data.among is None else [None, data.among]
        found = self.predict(data, self.loaded.view, readings)
        answers = self._of_all(found, data)[0]
        restricted = self._options.restrict_classes and data.among is not None
        main = answers[1] if restricted else answers[0]
        note = data.note
        if restricted:
            note = f"{note}; guesses are among these alone"
        elif self._options.restrict_classes:
            note = f"{note or 'its classes are those of the run'}; guesses are among these alone"
        elif data.among is not None:
            note = f"{note}; guesses are among all the run's classes"
        result = self.about(data, found.bad) | figures(main) | {"classes": note}
        result["confusions"] = confusions(main, self._names)
        if data.among is not None:
            result["all_classes" if restricted else "restricted"] = figures(answers[0 if restricted else 1])
        if accepted is not None:
            labelled_N = np.array([bool(accepted[sample]) for sample in main.samples_N], bool)
            chosen = [accepted[sample] for sample in main.samples_N[labelled_N]]
            result["real"] = figures(main[labelled_N], chosen)
        return result, class_rows(main, self._names)

    def _evaluate_corrupted(self, data: EvaluationSet) -> dict[str, Any]:
        corruptions, severities = self._corruptions(), sorted(set(self._options.severities))
        side, how = self.loaded.view.img_size, self.loaded.view.interpolation
        pairs = [(name, severity) for name in corruptions for severity in severities]
        views = [CorruptedView(side, name, severity, how) for name, severity in [(corruptions[0], 0), *pairs]]
        found = self.predict(data, EvalViews(side, tuple(views)))
        clean, *each = [figures(by_reading[0]) for by_reading in self._of_all(found, data)]
        by_severity: dict[str, dict[str, Any]] = {name: {} for name in corruptions}
        for (name, severity), one in zip(pairs, each, strict=True):
            errors = {"top1_err": 100 - one["top1"], "top5_err": 100 - one["top5"]}
            by_severity[name][str(severity)] = {"top1": one["top1"], "top5": one["top5"]} | errors
        errors = {name: [row["top1_err"] for row in rows.values()] for name, rows in by_severity.items()}
        result = self.about(data, found.bad) | {key: clean[key] for key in ("top1", "top1_interval", "top5", "images")}
        return result | corruption_figures(errors, severities, data.whole) | {"by_severity": by_severity}

    def _of_all(self, found: Predictions, data: EvaluationSet) -> list[list[Any]]:
        if not found.answers or not len(found.answers[0][0].samples_N):
            raise DataError(f"{data.index.folder}: none of its {data.index.count} images can be read")
        return found.answers

    def about(self, data: EvaluationSet, bad: int) -> dict[str, Any]:
        """Which model was evaluated on which set, and how."""
        loaded = self.loaded
        return {
            "set": data.name,
            "place": str(data.index.folder),
            "whole": data.whole if data.kind else None,
            "model": loaded.label,
            "step": loaded.step,
            "weights": self._options.weights if loaded.step is not None else None,
            "img_size": loaded.view.img_size,
            "crop_ratio": loaded.view.crop_ratio,
            "interpolation": loaded.view.interpolation,
            "bad_samples": bad,
        }
