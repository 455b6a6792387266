"""Loads a micro-batch: reads its samples, draws their views, and puts pixels, labels and maps together.

A damaged sample is an error that names it, or its place is filled from a neighbour and counted, as the run file says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from refiner_ds.config.schema import DecodeKeys
from refiner_ds.data.augment import (
    IDENTITY,
    AugmentSettings,
    EvalSettings,
    EvalViews,
    Matrix,
    TrainView,
    preserve_rng_state,
    seed_sample,
)
from refiner_ds.data.batch import Batch, MapBatch
from refiner_ds.data.crop_decoding import crop_decoder
from refiner_ds.data.decoding import AS_STORED, Picture, decode_image, open_picture
from refiner_ds.data.index import MapFormat, ShardIndex
from refiner_ds.data.sampler import BatchIndices, EvalSampler, TrainSampler
from refiner_ds.data.samples import RawSample, open_reader
from refiner_ds.data.score_maps import ScoreMap
from refiner_ds.data.score_maps import decode as decode_map
from refiner_ds.errors import DataError


@dataclass(frozen=True)
class _MapArrays:
    """The score maps of a batch, filled row by row."""

    values_BKhw: np.ndarray
    classes_BKhw: np.ndarray
    affine_BT23: np.ndarray

    @classmethod
    def empty(cls, size: int, form: MapFormat, transforms: int) -> _MapArrays:
        shape = (size, form.k, form.rows, form.columns)
        identities = np.broadcast_to(IDENTITY.astype(np.float32), (size, transforms, 2, 3)).copy()
        return cls(np.zeros(shape, np.float16), np.zeros(shape, np.int16), identities)

    def set(self, row: int, score_map: ScoreMap, affines: list[Matrix]) -> None:
        self.values_BKhw[row] = score_map.values_Khw
        self.classes_BKhw[row] = score_map.classes_Khw
        self.affine_BT23[row, len(self.affine_BT23[row]) - len(affines) :] = affines

    def copy_row(self, source: int, row: int) -> None:
        for array in (self.values_BKhw, self.classes_BKhw, self.affine_BT23):
            array[row] = array[source]

    def batch(self) -> MapBatch:
        return MapBatch(*map(torch.from_numpy, (self.values_BKhw, self.classes_BKhw, self.affine_BT23)))


@dataclass(frozen=True)
class _Arrays:
    """A micro-batch, filled row by row."""

    pixels_BHWC: np.ndarray
    labels_B: np.ndarray
    loaded_B: np.ndarray
    maps: _MapArrays | None

    def copy_row(self, source: int, row: int) -> None:
        self.pixels_BHWC[row], self.labels_B[row] = self.pixels_BHWC[source], self.labels_B[source]
        if self.maps is not None:
            self.maps.copy_row(source, row)


class BatchDataset(Dataset[Any]):
    """Micro-batches by number; what the loader's workers hold.

    Args:
        index: the set.
        sampler: which samples a number stands for.
        settings: of training views, or of evaluation's one view or several.
        on_bad_sample: "error" or "skip".
        maps: where score maps come from: ``index`` itself or a set of maps; None: no maps.
        decode: the run file's keys about decoding.
    Raises:
        DataError: the maps are not those of the set.
    """

    def __init__(
        self,
        index: ShardIndex,
        sampler: TrainSampler | EvalSampler,
        settings: AugmentSettings | EvalSettings | EvalViews,
        on_bad_sample: str,
        maps: ShardIndex | None = None,
        decode: DecodeKeys = AS_STORED,
    ) -> None:
        self.reader = open_reader(index)
        self.map_reader = None
        self.map_format = None
        if maps is not None:
            self.map_format = maps.map_format_for(index)
            self.map_reader = self.reader if maps is index else open_reader(maps)
        self.sampler = sampler
        self.settings = settings
        self.rows = settings.img_size * (len(settings.views) if isinstance(settings, EvalViews) else 1)
        self.train_view = TrainView(settings) if isinstance(settings, AugmentSettings) else None
        self.on_bad_sample = on_bad_sample
        self.decode = decode
        self.open_picture: Callable[[RawSample, DecodeKeys], Picture] = open_picture
        crop_decoder()  # tried here, once for all workers

    def __getitem__(self, number: int) -> Batch | DataError:
        """A batch, or the error that stands in its way: raised in a worker it would arrive as a traceback."""
        try:
            with preserve_rng_state():
                return self._load(self.sampler[number])
        except DataError as error:
            return error

    def template(self) -> Batch:
        """The shape of every batch: tensors on the meta device, without memory."""
        size, side = len(self.sampler[0].samples_B), self.settings.img_size
        maps = self._empty_maps(size)
        numbers_B = torch.zeros(size, dtype=torch.int64)
        pixels_BHWC = torch.empty(size, self.rows, side, 3, dtype=torch.uint8)
        return Batch(pixels_BHWC, numbers_B, numbers_B, numbers_B.bool(), maps=maps.batch() if maps else None).to(
            "meta"
        )

    def _empty_maps(self, size: int) -> _MapArrays | None:
        if self.map_format is None or self.train_view is None:
            return None
        return _MapArrays.empty(size, self.map_format, self.train_view.max_affines)

    def _load(self, indices: BatchIndices) -> Batch:
        size, side = len(indices.samples_B), self.settings.img_size
        arrays = _Arrays(
            np.empty((size, self.rows, side, 3), np.uint8),
            np.zeros(size, np.int64),
            np.zeros(size, bool),
            self._empty_maps(size),
        )
        bad = 0
        for row in np.flatnonzero(indices.valid_B).tolist():
            try:
                self._load_row(int(indices.samples_B[row]), int(indices.views_B[row]), row, arrays)
            except DataError:
                if self.on_bad_sample == "error":
                    raise
                bad += 1
        self._fill(arrays, bad)
        return Batch(
            images_BHWC=torch.from_numpy(arrays.pixels_BHWC),
            labels_B=torch.from_numpy(arrays.labels_B),
            sample_B=torch.from_numpy(indices.samples_B.astype(np.int64)),
            valid_B=torch.from_numpy(arrays.loaded_B),
            padded=indices.padded,
            bad=bad,
            maps=arrays.maps.batch() if arrays.maps else None,
        )

    def _load_row(self, sample: int, number: int, row: int, arrays: _Arrays) -> None:
        """Read one sample and put the view of this number in its row."""
        raw = self.reader.read(sample)
        arrays.labels_B[row] = raw.label
        if self.train_view is None:
            arrays.pixels_BHWC[row] = self.settings(decode_image(raw, self.decode), sample)  # type: ignore[operator]
        else:
            seed_sample(self.sampler.seed, number, sample)  # type: ignore[union-attr]
            view = self.train_view(self.open_picture(raw, self.decode))
            arrays.pixels_BHWC[row] = view.pixels_SS3
            if arrays.maps is not None:
                arrays.maps.set(row, self._score_map(sample), view.affines)
        arrays.loaded_B[row] = True

    def _score_map(self, sample: int) -> ScoreMap:
        raw = self.map_reader.read(sample)  # type: ignore[union-attr]
        score_map = decode_map(raw.score_map, raw.location)
        if score_map.format != self.map_format:
            raise DataError(f"{raw.location}: its map is {score_map.format}, the set's are {self.map_format}")
        largest = int(score_map.classes_Khw.view(np.uint16).max())  # unsigned: a negative number is too large as well
        if largest >= len(self.reader.index.classes):
            raise DataError(
                f"{raw.location}: its map names class {largest}, past the set's {len(self.reader.index.classes)}"
            )
        return score_map

    def _fill(self, arrays: _Arrays, bad: int) -> None:
        """Let rows without a sample of their own repeat the one before them that has."""
        good = np.flatnonzero(arrays.loaded_B)
        if not len(good):
            if bad and self.train_view is not None:
                raise DataError(f"{self.reader.index.folder}: all {bad} samples of a micro-batch are damaged")
            arrays.pixels_BHWC[:] = 0
            return
        for row in np.flatnonzero(~arrays.loaded_B).tolist():
            arrays.copy_row(int(good[max(0, int(np.searchsorted(good, row)) - 1)]), row)
