"""Makes a micro-batch: reads its samples, draws their views, and puts pixels, labels and maps together.

A damaged sample is an error that names it, or its place is filled from a neighbour and counted, as the run allows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Dataset

from refiner_ds.data.augment import (
    IDENTITY,
    AugmentSettings,
    EvalSettings,
    Matrix,
    TrainView,
    eval_view,
    seed_sample,
    undisturbed_randomness,
)
from refiner_ds.data.batch import Batch, MapBatch
from refiner_ds.data.index import MapFormat, ShardIndex
from refiner_ds.data.plan import EvalPlan, TrainPlan, Wanted
from refiner_ds.data.samples import SampleReader, decode_image
from refiner_ds.data.score_maps import ScoreMap, decode
from refiner_ds.errors import DataError


@dataclass(frozen=True)
class _MapPlaces:
    """Room for the score maps of a batch, filled place by place."""

    values_BKhw: np.ndarray
    classes_BKhw: np.ndarray
    steps_BS23: np.ndarray

    @classmethod
    def of(cls, size: int, form: MapFormat, steps: int) -> _MapPlaces:
        shape = (size, form.k, form.rows, form.columns)
        every_step = np.broadcast_to(IDENTITY.astype(np.float32), (size, steps, 2, 3)).copy()
        return cls(np.zeros(shape, np.float16), np.zeros(shape, np.int16), every_step)

    def put(self, place: int, score_map: ScoreMap, steps: list[Matrix]) -> None:
        self.values_BKhw[place] = score_map.values_Khw
        self.classes_BKhw[place] = score_map.classes_Khw
        self.steps_BS23[place, len(self.steps_BS23[place]) - len(steps) :] = steps

    def repeat(self, source: int, place: int) -> None:
        for array in (self.values_BKhw, self.classes_BKhw, self.steps_BS23):
            array[place] = array[source]

    def batch(self) -> MapBatch:
        return MapBatch(*map(torch.from_numpy, (self.values_BKhw, self.classes_BKhw, self.steps_BS23)))


class BatchMaker(Dataset):
    """Micro-batches by number; what the loader's workers hold.

    Args:
        index: the set.
        plan: which samples a number stands for.
        settings: of training views, or of evaluation.
        on_bad: "error" or "skip".
        maps: where score maps come from: ``index`` itself or a parallel set; None: no maps.
    Raises:
        DataError: the maps are not those of the set.
    """

    def __init__(
        self,
        index: ShardIndex,
        plan: TrainPlan | EvalPlan,
        settings: AugmentSettings | EvalSettings,
        on_bad: str,
        maps: ShardIndex | None = None,
    ) -> None:
        self.reader = SampleReader(index)
        self.map_reader = None
        self.map_format = None
        if maps is not None:
            self.map_format = maps.maps_of(index)
            self.map_reader = self.reader if maps is index else SampleReader(maps)
        self.plan = plan
        self.settings = settings
        self.train_view = TrainView(settings) if isinstance(settings, AugmentSettings) else None
        self.on_bad = on_bad

    def __getitem__(self, number: int) -> Batch | DataError:
        """A batch, or the error that stands in its way: raised in a worker it would arrive as a traceback."""
        try:
            with undisturbed_randomness():
                return self._make(self.plan.wanted(number))
        except DataError as error:
            return error

    def blank(self) -> Batch:
        """The shape of every batch: tensors on the meta device, without memory."""
        size, side = len(self.plan.wanted(0).samples_B), self.settings.img_size
        maps = None
        if self.map_format and self.train_view:
            maps = _MapPlaces.of(size, self.map_format, self.train_view.most_steps).batch()
        numbers_B = torch.zeros(size, dtype=torch.int64)
        pixels_BHWC = torch.empty(size, side, side, 3, dtype=torch.uint8)
        return Batch(pixels_BHWC, numbers_B, numbers_B, numbers_B.bool(), maps=maps).to("meta")

    def _make(self, wanted: Wanted) -> Batch:
        size, side = len(wanted.samples_B), self.settings.img_size
        pixels_BHWC = np.empty((size, side, side, 3), np.uint8)
        labels_B = np.zeros(size, np.int64)
        made_B = np.zeros(size, bool)
        maps = None
        if self.map_format and self.train_view:
            maps = _MapPlaces.of(size, self.map_format, self.train_view.most_steps)
        bad = 0
        for place in np.flatnonzero(wanted.valid_B).tolist():
            try:
                self._put(int(wanted.samples_B[place]), wanted.epoch, place, pixels_BHWC, labels_B, maps)
                made_B[place] = True
            except DataError:
                if self.on_bad == "error":
                    raise
                bad += 1
        self._fill(pixels_BHWC, labels_B, maps, made_B, bad)
        return Batch(
            images_BHWC=torch.from_numpy(pixels_BHWC),
            labels_B=torch.from_numpy(labels_B),
            sample_B=torch.from_numpy(wanted.samples_B.astype(np.int64)),
            valid_B=torch.from_numpy(made_B),
            padded=wanted.padded,
            bad=bad,
            maps=maps.batch() if maps else None,
        )

    def _put(
        self,
        sample: int,
        epoch: int,
        place: int,
        pixels_BHWC: np.ndarray,
        labels_B: np.ndarray,
        maps: _MapPlaces | None,
    ) -> None:
        """Read one sample and put its view in its place."""
        raw = self.reader.read(sample)
        image = decode_image(raw)
        labels_B[place] = raw.label
        if self.train_view is None:
            pixels_BHWC[place] = eval_view(image, self.settings)  # type: ignore[arg-type]
            return
        seed_sample(self.plan.seed, epoch, sample)  # type: ignore[union-attr]
        view = self.train_view(image)
        pixels_BHWC[place] = view.pixels_SS3
        if maps is not None:
            maps.put(place, self._score_map(sample), view.steps)

    def _score_map(self, sample: int) -> ScoreMap:
        raw = self.map_reader.read(sample)  # type: ignore[union-attr]
        score_map = decode(raw.score_map, raw.place)
        if score_map.format != self.map_format:
            raise DataError(f"{raw.place}: its map is {score_map.format}, the set's are {self.map_format}")
        largest = int(score_map.classes_Khw.view(np.uint16).max())  # unsigned: a negative number is too large as well
        if largest >= len(self.reader.index.classes):
            raise DataError(
                f"{raw.place}: its map names class {largest}, past the set's {len(self.reader.index.classes)}"
            )
        return score_map

    def _fill(
        self,
        pixels_BHWC: np.ndarray,
        labels_B: np.ndarray,
        maps: _MapPlaces | None,
        made_B: np.ndarray,
        bad: int,
    ) -> None:
        """Let places without a sample of their own repeat the one before them that has."""
        good = np.flatnonzero(made_B)
        if not len(good):
            if bad and self.train_view is not None:
                raise DataError(f"{self.reader.index.folder}: all {bad} samples of a micro-batch are damaged")
            pixels_BHWC[:] = 0
            return
        for place in np.flatnonzero(~made_B).tolist():
            source = int(good[max(0, int(np.searchsorted(good, place)) - 1)])
            pixels_BHWC[place], labels_B[place] = pixels_BHWC[source], labels_B[source]
            if maps is not None:
                maps.repeat(source, place)
