"""Where images to be sharded come from: class folders, or flat files with a label list."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from refiner_ds.errors import DataError

MAP_ENDING = ".pt"
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")


@dataclass(frozen=True)
class SourceImage:
    """An image to be sharded: path relative to the source folder, label, bytes."""

    path: str
    label: int
    size: int


@dataclass(frozen=True)
class Source:
    """All images of a folder in a fixed order, the class names, and the files that are no images by their names."""

    folder: Path
    images: list[SourceImage]
    classes: list[str]
    ignored: list[str]


def class_folders(folder: Path) -> Source:
    """Read a tree with a folder a class, as ImageNet's; names sort into labels.

    Raises:
        DataError: no such folder, no class folders, or a class without images.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; name one that holds a folder of images for every class")
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise DataError(f"{folder}: no class folders; for flat files give a label list with --labels")
    images: list[SourceImage] = []
    ignored: list[str] = []
    for label, name in enumerate(classes):
        before = len(images)
        for path, size in _files(folder, name):
            if path.lower().endswith(IMAGE_ENDINGS):
                images.append(SourceImage(path, label, size))
            else:
                ignored.append(path)
        if len(images) == before:
            raise DataError(f"{folder / name}: no images in this class; remove the folder or fill it")
    return Source(folder, images, classes, ignored)


def flat_files(folder: Path, labels: Path, class_list: Path | None) -> Source:
    """Read flat files and a label list: lines ``<file name> <class>``, or one class a line in the order of file names.

    Args:
        folder: holds the images.
        labels: the list; fields parted by spaces, a tab or a comma. A class is a name, or a number counted from 1 when
            every one is a number (as ImageNet's ground truth) and ``class_list`` is given.
        class_list: one class name a line, in the order of labels; None: names that occur, sorted.
    Raises:
        DataError: a file is missing or unlabelled, a name is not in the class list, the counts differ.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; name the one that holds the images")
    sizes = dict(_files(folder, ""))
    names = sorted(path for path in sizes if path.lower().endswith(IMAGE_ENDINGS))
    ignored = sorted(set(sizes) - set(names))
    rows = [re.split(r"[\s,]+", line.strip()) for line in _lines(labels)]
    if all(len(row) == 1 for row in rows):
        if len(rows) != len(names):
            raise DataError(f"{labels}: {len(rows)} labels for the {len(names)} images in {folder}; give one each")
        rows = [[name, row[0]] for name, row in zip(names, rows, strict=True)]
    named = {row[0]: row[1] for row in rows if len(row) > 1}
    for name in names:
        if name not in named:
            raise DataError(f"{folder / name}: has no line in {labels}; add one or remove the image")
    for name in named:
        if name not in sizes:
            raise DataError(f"{labels}: names {name}, which is not in {folder}; remove the line or add the image")
    classes = [line.split()[0] for line in _lines(class_list)] if class_list else sorted(set(named.values()))
    number_of = {name: label for label, name in enumerate(classes)}
    if class_list and all(label.isdigit() and label not in number_of for label in named.values()):
        number_of = {str(label + 1): label for label in range(len(classes))}
    for name, label in named.items():
        if label not in number_of:
            raise DataError(f"{labels}: {name} has class {label}, which is not in {class_list}; correct one of them")
    return Source(folder, [SourceImage(name, number_of[named[name]], sizes[name]) for name in names], classes, ignored)


def check_maps(source: Source, maps: Path) -> None:
    """See that the images and the published maps under ``maps`` are each other's, before anything is written.

    Raises:
        DataError: there is no such folder, an image has no map or a map no image; names the first and counts the rest.
    """
    if not maps.is_dir():
        raise DataError(f"{maps}: no such folder; name the one that holds <class>/<image>.pt score maps")
    wanted: set[str] = set()
    for image in source.images:
        path = map_path(image.path)
        if path in wanted:
            raise DataError(f"{source.folder / image.path}: shares its map {path} with another image; rename one")
        wanted.add(path)
    found = {path for path, _ in _files(maps, "") if path.endswith(MAP_ENDING)}
    for missing in sorted(wanted - found)[:1]:
        raise DataError(
            f"{maps / missing}: missing, and {len(wanted - found)} of {len(wanted)} images have no map; "
            "add their maps or remove those images"
        )
    for spare in sorted(found - wanted)[:1]:
        raise DataError(
            f"{maps / spare}: has no image in {source.folder}, as {len(found - wanted)} of {len(found)} maps; "
            "add the images or remove those maps"
        )


def map_path(image_path: str) -> str:
    """Where an image's published map lies, relative to the folder of maps."""
    return os.path.splitext(image_path)[0] + MAP_ENDING


def _files(folder: Path, below: str) -> list[tuple[str, int]]:
    """Relative path and size of every file under ``folder / below``, sorted by path."""
    found: list[tuple[str, int]] = []
    waiting = [below]
    while waiting:
        inside = waiting.pop()
        with os.scandir(folder / inside) as entries:
            for entry in entries:
                path = f"{inside}/{entry.name}" if inside else entry.name
                if entry.is_dir():
                    waiting.append(path)
                else:
                    found.append((path, entry.stat().st_size))
    return sorted(found)


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a list ({error}); name a text file") from None
