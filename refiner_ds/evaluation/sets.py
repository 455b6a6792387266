"""The sets a model is evaluated on: ImageNet, its variants, and sets of one's own.

    imagenet   50,000 images of 1,000 classes      real     the same images with ReaL's labels beside their own
    v2         10,000 of 1,000, folders 0 … 999    sketch   50,889 of 1,000
    a          7,500 of 200                        r        30,000 of 200
    c          ImageNet's 50,000, corrupted while they are loaded

Each may be shards or class folders. Images and classes are counted and class names compared with the lists that come
with timm before anything is computed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

from refiner_ds.data.classes import match_classes
from refiner_ds.data.index import ShardIndex
from refiner_ds.data.locate import open_index
from refiner_ds.data.samples import open_reader
from refiner_ds.errors import DataError

__all__ = ["KNOWN", "EvaluationSet", "imagenet_synsets", "open_set", "real_labels", "split_name"]

ILSVRC_NAME = re.compile(r"ILSVRC2012_val_(\d{8})")
IMAGENET = "imagenet"  # the list of its 1,000 synsets, as timm calls it


@dataclass(frozen=True)
class KnownSet:
    """What is known of a published set: its name in results, images, and which list of synsets its classes are."""

    name: str
    images: int
    synsets: str


KNOWN = {
    "imagenet": KnownSet("imagenet", 50_000, IMAGENET),
    "real": KnownSet("imagenet", 50_000, IMAGENET),
    "v2": KnownSet("imagenetv2", 10_000, IMAGENET),
    "a": KnownSet("imagenet-a", 7_500, "imagenet_a"),
    "r": KnownSet("imagenet-r", 30_000, "imagenet_r"),
    "sketch": KnownSet("sketch", 50_889, IMAGENET),
    "c": KnownSet("imagenet-c", 50_000, IMAGENET),
}


@dataclass(frozen=True)
class EvaluationSet:
    """A set that a model can be evaluated on.

    Attributes:
        kind: a key of `KNOWN`, or "" for a set of one's own.
        name: in results and file names.
        index: its images; labels are the model's numbers.
        among: the model's numbers of the set's classes where it has only some of them, sorted; None: it has all.
        note: how its classes were matched, in one line; "" where both lists are the same.
        whole: it is a published set, with as many images as that has.
    """

    kind: str
    name: str
    index: ShardIndex
    among: list[int] | None
    note: str
    whole: bool


def split_name(given: str) -> tuple[str, str]:
    """The name and place of ``NAME=PLACE``; no name for a place alone."""
    name, equals, place = given.partition("=")
    return (name, place) if equals and re.fullmatch(r"[\w.-]+", name) else ("", given)


def open_set(given: str, classes: Sequence[str], cache: str | None = None, partial: bool = False) -> EvaluationSet:
    """Open ``PLACE`` or ``NAME=PLACE`` for a model.

    Args:
        classes: names of the model's classes, in the order of its outputs.
        cache: as in `locate.open_index`.
        partial: take a published set that is not whole.
    Raises:
        DataError: there is no such set, it is empty, not the one its name says, or has other classes than the model.
    """
    name, place = split_name(given)
    index = open_index(place, cache, check_files=False)
    if not index.count:
        raise DataError(f"{index.folder}: holds no images; give a set with some")
    names = list(index.classes)
    if name in KNOWN:
        names = _check(name, index, partial)
    match = match_classes(names, classes, str(index.folder))
    among = sorted(match.labels.tolist()) if len(names) < len(classes) else None
    shown = KNOWN[name].name if name in KNOWN else name or index.folder.name
    whole = name in KNOWN and index.count == KNOWN[name].images
    kind = name if name in KNOWN else ""
    return EvaluationSet(kind, shown, index.with_classes(list(classes), match.labels), among, match.note, whole)


def _check(kind: str, index: ShardIndex, partial: bool) -> list[str]:
    """The synsets of a published set's classes, after comparing the set with what it should be."""
    known, wanted = KNOWN[kind], imagenet_synsets(KNOWN[kind].synsets)
    names, place = list(index.classes), f"{kind}={index.folder}"
    if all(name.isdecimal() and int(name) < len(wanted) for name in names) and known.synsets == IMAGENET:
        names = [wanted[int(name)] for name in names]  # ImageNet-V2's folders
    if strange := [name for name in names if name not in set(wanted)]:
        raise DataError(
            f"{place}: {strange[0]!r} is none of the {len(wanted):,} synsets of {known.name}"
            " (class names must be synsets such as n01440764); give the set without a name, --data PLACE"
        )
    if partial:
        return names
    missing = sorted(set(wanted) - set(names))
    of_these = f"{known.images:,} images in {len(wanted):,} classes"
    hint = "complete it, or take what is there with --partial"
    if missing:
        raise DataError(
            f"{place}: has {len(names):,} classes where {known.name} has {of_these}; {missing[0]} is missing; {hint}"
        )
    if index.count != known.images:
        raise DataError(f"{place}: has {index.count:,} images where {known.name} has {of_these}; {hint}")
    return names


@cache
def imagenet_synsets(which: str = IMAGENET) -> tuple[str, ...]:
    """Synsets in the order of labels, from the lists in timm: "imagenet", "imagenet_a" or "imagenet_r"."""
    return tuple(_timm_file(f"{which}_synsets.txt").split())


def _timm_file(name: str) -> str:
    return (resources.files("timm.data") / "_info" / name).read_text()


def real_labels(data: EvaluationSet, classes: Sequence[str], file: Path | None = None) -> list[list[int]]:
    """For every image of ImageNet's validation set what ReaL (Beyer et al., 2020) takes for right; none for some.

    Images are found by their names: ILSVRC2012_val_00000001 is the first entry.

    Args:
        file: ReaL's ``real.json``; None: the one beside the set, else that which comes with timm.
    Returns:
        [images of the set], the model's numbers of classes.
    Raises:
        DataError: names or file are not ImageNet's, or the model lacks a class.
    """
    index, place = data.index, data.index.folder
    beside = next((found for found in (place / "real.json", place.parent / "real.json") if found.is_file()), None)
    file = file or beside
    try:
        listed = json.loads(file.read_text() if file else _timm_file("imagenet_real_labels.json"))
        by_image = [[int(label) for label in labels] for labels in listed]
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{file}: not ReaL's real.json ({error}); give another with --real FILE") from None
    synsets, number_of = imagenet_synsets(), {name: number for number, name in enumerate(classes)}
    if len(by_image) != KNOWN["real"].images or not all(0 <= n < len(synsets) for row in by_image for n in row):
        raise DataError(f"{file}: has {len(by_image):,} entries where ReaL has 50,000 lists of classes 0 to 999")
    reader = open_reader(index)
    found = []
    for sample in range(index.count):
        name = reader.name(sample)
        if (number := ILSVRC_NAME.search(name)) is None or not 1 <= int(number[1]) <= len(by_image):
            raise DataError(
                f"real={place}: image {name} does not carry its name, ILSVRC2012_val_ and eight digits;"
                " make the set again from files that do, or evaluate it as imagenet="
            )
        found.append([number_of[synsets[label]] for label in by_image[int(number[1]) - 1]])
    return found
