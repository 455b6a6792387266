"""Samples from image files, with published score maps beside them where there are any: <class>/<image>.pt."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from refiner_ds.data.image_tree import LabelledImage, LabelledImages, list_files, printable
from refiner_ds.data.index import MapFormat
from refiner_ds.data.score_maps import encode, read_published
from refiner_ds.data.tar_format import BLOCK, padded
from refiner_ds.errors import DataError

from .builder import Plan, Sample

MAP_EXTENSION = ".pt"
KEY_STEM = 70  # bytes of a file name that go into its key; number, extension and a margin fill a tar header's 100


@dataclass(frozen=True)
class PublishedMaps:
    """A folder of published score maps, all of one format, over this many classes."""

    folder: Path
    format: MapFormat
    classes: int

    def read(self, image: LabelledImage) -> bytes:
        """The record of an image's map.

        Raises:
            DataError: it is missing, damaged or of another format.
        """
        path = self.folder / map_path(image.path)
        score_map = read_published(path, image.label, self.classes)
        if score_map.format != self.format:
            raise DataError(
                f"{printable(path)}: its map is {score_map.format}, others are {self.format}; all must be alike"
            )
        return encode(score_map)


@dataclass(frozen=True)
class FileSamples:
    """The samples of a shard, as files of a folder; the first of them has this position in the set."""

    folder: Path
    first: int
    images: list[LabelledImage]
    maps: PublishedMaps | None

    @property
    def count(self) -> int:
        """Samples there are."""
        return len(self.images)

    def read(self) -> Iterator[Sample]:
        """The samples in order.

        Raises:
            DataError: a file cannot be read, or its map is not right.
        """
        for position, image in enumerate(self.images, self.first):
            path = self.folder / image.path
            try:
                data = path.read_bytes()
            except OSError as error:
                raise DataError(
                    f"{printable(path)}: cannot be read ({error.strerror}); make it readable or remove it"
                ) from None
            score_map = self.maps.read(image) if self.maps else None
            yield Sample(key_of(position, image.path), image.path, data, image.label, score_map)


def key_of(position: int, path: str) -> str:
    """A key that no other sample has, and that still tells a person which file it was."""
    stem = os.path.splitext(os.path.basename(path))[0]
    return f"{position:09d}-{re.sub(r'[^A-Za-z0-9_-]', '_', stem)[:KEY_STEM]}"


def map_path(image_path: str) -> str:
    """Where an image's published map lies, relative to the folder of maps."""
    return os.path.splitext(image_path)[0] + MAP_EXTENSION


def plan_from_files(source: LabelledImages, seed: int, shard_bytes: int, maps: Path | None = None) -> Plan:
    """Shuffle all images by the seed and split them into shards of nearly equal count and about ``shard_bytes``.

    Raises:
        DataError: images and maps do not match, or a map is not one.
    """
    published, beside = None, BLOCK + padded(1)  # the label
    if maps is not None:
        _check_maps(source, maps)
        first = read_published(maps / map_path(source.images[0].path), 0, len(source.classes))
        published = PublishedMaps(maps, first.format, len(source.classes))
        beside = BLOCK + padded(len(encode(first)))
    count = len(source.images)
    stored = sum(BLOCK + padded(image.size) + beside for image in source.images)
    shards = max(1, -(-stored // shard_bytes))
    shuffled = [source.images[number] for number in np.random.RandomState(seed).permutation(count)]
    bounds = [count * number // shards for number in range(shards + 1)]
    listing = repr([(image.path, image.label, image.size) for image in source.images])
    return Plan(
        source.folder,
        source.classes,
        [
            FileSamples(source.folder, start, shuffled[start:end], published)
            for start, end in zip(bounds[:-1], bounds[1:], strict=True)
        ],
        {
            "samples": hashlib.sha256(listing.encode()).hexdigest(),
            "classes": source.classes,
            "seed": seed,
            "maps": asdict(published.format) if published else None,
        },
        source.ignored,
        published.format if published else None,
    )


def _check_maps(source: LabelledImages, maps: Path) -> None:
    """Check that every image has its published map and every map its image, before anything is written.

    Raises:
        DataError: there is no such folder, an image has no map or a map no image; names the first and counts the rest.
    """
    if not maps.is_dir():
        raise DataError(f"{printable(maps)}: no such folder; name the one that holds <class>/<image>.pt score maps")
    wanted: set[str] = set()
    for image in source.images:
        path = map_path(image.path)
        if path in wanted:
            both = f"{printable(source.folder / image.path)}: shares its map {printable(path)} with another image"
            raise DataError(f"{both}; rename one")
        wanted.add(path)
    files, _ = list_files(maps, "", lambda name: "" if name.endswith(MAP_EXTENSION) else "not a map by its name")
    found = {file.path for file in files}
    for missing in sorted(wanted - found)[:1]:
        raise DataError(
            f"{printable(maps / missing)}: missing, and {len(wanted - found)} of {len(wanted)} images have no map; "
            "add their maps or remove those images"
        )
    for spare in sorted(found - wanted)[:1]:
        raise DataError(
            f"{printable(maps / spare)}: has no image in {printable(source.folder)}, as {len(found - wanted)} of "
            f"{len(found)} maps; add the images or remove those maps"
        )
