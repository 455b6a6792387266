"""The bytes of one sample, read at its indexed place.

A read fetches image and map together and is checked against the index before anything is decoded: a cut shard, swapped
bytes or the shard of another set is an error that names shard and sample, never a wrong picture.
"""

from __future__ import annotations

import math
import os
import time
from collections import OrderedDict
from typing import Any, NamedTuple

from refiner_ds.data.class_folders import ClassFolders
from refiner_ds.data.image_tree import printable
from refiner_ds.data.index import ShardIndex
from refiner_ds.data.remote import fetch_shard
from refiner_ds.data.tar_format import BLOCK, NAME_BYTES, checksum, header_name, padded, span_bytes, split_name
from refiner_ds.errors import DataError

MAX_OPEN_SHARDS = 256  # file descriptors a process keeps; well under the usual limit of 1,024
RETRY_AFTER_SECONDS = 600.0  # until a shard that could not be fetched is requested again


class RawSample(NamedTuple):
    """One sample as stored: image file bytes, map record (empty without one), label and where it came from.

    Attributes:
        name: of its first tar member, ``<key>.<ending>``.
        shard: path of the tar, or of the image's folder.
        number: of the sample in the tar, or of the image in all class folders.
    """

    image: memoryview
    score_map: memoryview
    label: int
    name: str
    shard: str
    number: int

    @property
    def key(self) -> str:
        """What the sample's files are called, without their endings.

        Raises:
            DataError: existing tars alone: it is not ASCII, or longer than a tar header can hold.
        """
        if not self.name.isascii() or len(self.name) >= NAME_BYTES:
            raise DataError(
                f"{self.location}: its name is not ASCII or has {NAME_BYTES} bytes and more; "
                "make a set with data_tools/shard.py, which names samples anew"
            )
        return split_name(self.name)[0]

    @property
    def location(self) -> str:
        """Shard and sample, for error messages."""
        return f"{self.shard}: sample {self.number} ({self.name})"


class SampleReader:
    """Reads samples of a set by number; keeps the most recently used shards open.

    Reads are positioned (``os.pread``), so processes forked from this one may share its descriptors.
    """

    def __init__(self, index: ShardIndex) -> None:
        self.index = index
        self._maps_only = index.is_maps_only
        self._open: OrderedDict[int, tuple[int, str]] = OrderedDict()
        self._unreachable: dict[int, tuple[float, str]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": OrderedDict()}  # descriptors mean nothing to another process

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close every shard."""
        while self._open:
            os.close(self._open.popitem()[1][0])

    def _open_shard(self, shard: int) -> tuple[int, str]:
        """Descriptor and path of a shard."""
        if shard in self._open:
            self._open.move_to_end(shard)
            return self._open[shard]
        if len(self._open) >= MAX_OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1][0])
        since, reason = self._unreachable.get(shard, (-math.inf, ""))
        if time.monotonic() - since < RETRY_AFTER_SECONDS:
            raise DataError(reason)
        try:
            path = fetch_shard(self.index, shard)
        except DataError as error:
            # Its other samples fail at once instead of waiting for the same timeout.
            self._unreachable[shard] = time.monotonic(), str(error)
            raise
        self._open[shard] = os.open(path, os.O_RDONLY | os.O_CLOEXEC), str(path)
        return self._open[shard]

    def read(self, sample: int) -> RawSample:
        """The stored bytes of sample number ``sample``.

        Raises:
            DataError: the shard is missing, cut or damaged at this sample; names both.
        """
        shard = self.index.shard_of(sample)
        offset, image_bytes, map_bytes, stored_label, check = self.index.members[sample].item()
        label = self.index.label(stored_label)
        wanted = span_bytes(image_bytes, map_bytes)
        try:
            descriptor, path = self._open_shard(shard)
            span = os.pread(descriptor, wanted, offset)
        except OSError as error:
            raise self._error(sample, f"cannot be read ({error.strerror})") from None
        except DataError as error:
            raise self._error(sample, f"is not here: {error}") from None
        name = header_name(span[:BLOCK])
        if len(span) < wanted:
            raise self._error(sample, "is cut off; copy the shard here again")
        if checksum(span) != check:
            raise self._error(
                sample,
                "is damaged or of another set; copy the shard here again, data_tools/verify.py lists every fault",
                found=f", found as {name!r}",
            )
        view = memoryview(span)
        number = sample - int(self.index.starts[shard])
        if self._maps_only:
            return RawSample(view[:0], view[BLOCK:], label, name, path, number)
        map_start = BLOCK + padded(image_bytes) + BLOCK
        return RawSample(view[BLOCK : BLOCK + image_bytes], view[map_start:], label, name, path, number)

    def name(self, sample: int) -> str:
        """The name of a sample's first tar member, ``<key>.<ending>``, without reading the sample.

        Raises:
            DataError: the shard is missing or cannot be read.
        """
        try:
            descriptor, _ = self._open_shard(self.index.shard_of(sample))
            return header_name(os.pread(descriptor, BLOCK, int(self.index.members[sample]["offset"])))
        except OSError as error:
            raise self._error(sample, f"cannot be read ({error.strerror})") from None

    def _error(self, sample: int, reason: str, found: str = "") -> DataError:
        shard = self.index.shard_of(sample)
        number = sample - int(self.index.starts[shard])
        path = self.index.shard_path(shard)
        return DataError(f"{path}: sample {number} (number {sample} of the set{found}) {reason}")


class FileReader:
    """Reads images of class folders by number."""

    def __init__(self, index: ClassFolders) -> None:
        self.index = index

    def read(self, sample: int) -> RawSample:
        """The bytes of image number ``sample``.

        Raises:
            DataError: the file is missing, cannot be read or has another size than when it was listed.
        """
        name, record = self.index.path_of(sample), self.index.members[sample]
        path = self.index.folder / name
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(f"{printable(path)}: cannot be read ({error.strerror}); put the image back") from None
        if len(data) != record["image_bytes"]:
            raise DataError(
                f"{printable(path)}: has {len(data)} bytes and had {record['image_bytes']} when it was listed; "
                f"put the old image back, or remove {self.index.kept} to list the folders again"
            )
        view = memoryview(data)
        label = self.index.label(int(record["label"]))
        return RawSample(view, view[:0], label, os.path.basename(name), os.path.dirname(path), sample)

    def name(self, sample: int) -> str:
        """The file name of an image."""
        return os.path.basename(self.index.path_of(sample))


def open_reader(index: ShardIndex) -> SampleReader | FileReader:
    """The reader for a set: of shards, or of class folders."""
    return FileReader(index) if isinstance(index, ClassFolders) else SampleReader(index)
