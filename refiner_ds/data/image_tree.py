"""Lists the images of a folder tree; everything that is not taken is named, with the reason.

    <folder>/<class>/…/<image>.jpg   `read_class_folders`: one folder per class, as in ImageNet; names sort into labels
    <folder>/…/<image>.jpg           `list_images`: any tree

File names are bytes to the operating system. They stay as Python reads them (surrogate escapes where they are not
UTF-8), and `printable` shows them. Links are followed; a link to nothing, to itself or to a folder around it is named.
Nothing here needs torch.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from refiner_ds.errors import DataError

IMAGE_EXTENSIONS = tuple(".jpg .jpeg .jpe .jfif .png .webp .avif .bmp .dib .gif .tif .tiff .ppm .pgm .pbm .pnm".split())
OTHER_FORMATS = tuple(".heic .heif .jxl .jp2 .j2k .jpx .svg .psd .eps .ico .raw .dng .cr2 .nef .arw .exr .hdr".split())
LEFTOVER_FOLDERS = {  # of other programs; those whose names begin with a dot aside
    name: f"left behind by {program}"
    for program, names in {
        "macOS": ("__macosx", "network trash folder", "temporary items"),
        "Windows": ("$recycle.bin", "recycler", "system volume information", "found.000"),
        "a Synology disk station": ("@eadir", "@tmp", "#recycle", "#snapshot"),
        "a QNAP disk station": ("@__thumb", "@recycle", "@recently-snapshot"),
        "the file system": ("lost+found",),
        "Python": ("__pycache__",),
    }.items()
    for name in names
}
SPLITS = frozenset("train training val valid validation dev test testing".split())


@dataclass(frozen=True)
class ImageFile:
    """An image by its name: path relative to the listed folder, and size in bytes."""

    path: str
    size: int


@dataclass(frozen=True)
class LabelledImage(ImageFile):
    """An image and its label, a position in the list of classes."""

    label: int


@dataclass(frozen=True)
class LabelledImages:
    """All images of a folder in a fixed order, the class names, and what was not taken (one line each).

    Attributes:
        looked_at: relative paths of folders that were listed, and of what could not be opened; a change of one of them
            changes what is found.
    """

    folder: Path
    images: list[LabelledImage]
    classes: list[str]
    ignored: list[str]
    looked_at: list[str] = field(default_factory=list)


def printable(path: str | Path) -> str:
    """A file name that can be printed and kept in a UTF-8 file, on one line."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def read_class_folders(
    folder: Path, progress: Callable[[int, int, int], None] = lambda classes, of, images: None
) -> LabelledImages:
    """Read a tree with one folder per class; class names sort into labels.

    Args:
        progress: called after every class with the classes read, all classes, and the images so far.
    Raises:
        DataError: no such folder; no class folders; folders that are splits rather than classes; a class without
            images; a class name that is not UTF-8.
    """
    if not folder.is_dir():
        raise DataError(f"{printable(folder)}: no such folder; name one that holds a folder of images for every class")
    names, ignored, looked_at = [], [], [""]
    for name in _names(folder):
        found = _stat(f"{folder}/{name}")
        if isinstance(found, str):
            looked_at.append(name)
            ignored.append(f"{printable(name)}: {found}")
        elif not stat.S_ISDIR(found.st_mode):
            reason = _why_not_taken(name, found.st_mode, _why_no_image)
            ignored.append(f"{printable(name)}: {reason or 'an image in no class folder'}")
        elif reason := _why_skipped(name):
            ignored.append(f"{printable(name)}/: {reason}")
        else:
            names.append(name)
    _refuse_what_are_no_classes(folder, names)
    images: list[LabelledImage] = []
    for label, name in enumerate(names):
        inside, not_taken = list_files(folder, name, _why_no_image, looked_at)
        if not inside:
            hint = f"; not taken: {not_taken[0]}" if not_taken else ""
            raise DataError(f"{folder / name}: no images in this class{hint}; remove the folder or fill it")
        images += [LabelledImage(image.path, image.size, label) for image in inside]
        ignored += not_taken
        progress(label + 1, len(names), len(images))
    return LabelledImages(folder, images, names, ignored, looked_at)


def _refuse_what_are_no_classes(folder: Path, names: list[str]) -> None:
    if not names:
        raise DataError(f"{printable(folder)}: no class folders; for images in one folder give a label file (--labels)")
    for name in names:
        if name != os.fsencode(name).decode("utf-8", "ignore"):
            raise DataError(f"{printable(folder / name)}: a class name must be UTF-8; rename the folder")
    if len(names) > 1 and SPLITS.issuperset(name.lower() for name in names):
        raise DataError(
            f"{printable(folder)}: its folders {', '.join(names)} are splits, not classes; name one of them"
        )
    inside = _names(folder / names[0]) if len(names) == 1 else []
    if inside and all((folder / names[0] / name).is_dir() for name in inside):
        raise DataError(
            f"{printable(folder)}: holds one folder of folders; name {printable(folder / names[0])} instead"
        )


def list_images(folder: Path, below: str = "") -> tuple[list[ImageFile], list[str]]:
    """The images under ``folder / below`` by their names, sorted by path, and one line for everything not taken.

    Raises:
        DataError: a folder cannot be listed.
    """
    return list_files(folder, below, _why_no_image)


def list_files(
    folder: Path, below: str, why_not: Callable[[str], str], looked_at: list[str] | None = None
) -> tuple[list[ImageFile], list[str]]:
    """As `list_images`, for files of which ``why_not`` says by their names why they are not taken, or "".

    Args:
        looked_at: is added to, see `LabelledImages`.
    """
    looked_at = [] if looked_at is None else looked_at
    images: list[ImageFile] = []
    ignored: list[str] = []
    above = frozenset(_identity(os.stat(parent)) for parent in (folder.resolve(), *folder.resolve().parents))
    waiting = [(below, above)]
    while waiting:
        inside, around = waiting.pop()
        looked_at.append(inside)
        around |= {_identity(os.stat(folder / inside))}  # folders that a link must not lead back to
        for name in _names(folder / inside):
            path = f"{inside}/{name}" if inside else name
            found = _stat(f"{folder}/{path}")
            if isinstance(found, str):
                looked_at.append(path)
                ignored.append(f"{printable(path)}: {found}")
            elif not stat.S_ISDIR(found.st_mode):
                if reason := _why_not_taken(name, found.st_mode, why_not):
                    ignored.append(f"{printable(path)}: {reason}")
                else:
                    images.append(ImageFile(path, found.st_size))
            elif reason := _why_skipped(name):
                ignored.append(f"{printable(path)}/: {reason}")
            elif _identity(found) in around:
                ignored.append(f"{printable(path)}/: a link to a folder around it")
            else:
                waiting.append((path, around))
    return sorted(images, key=lambda image: image.path), sorted(ignored)


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise DataError(f"{printable(folder)}: cannot be listed ({error.strerror}); make it readable") from None


def _stat(path: str) -> os.stat_result | str:
    """What is known of a file, or why nothing is."""
    try:
        return os.stat(path)
    except FileNotFoundError:
        return "a link to nothing"
    except OSError as error:  # a link to itself, say
        return f"cannot be opened ({error.strerror})"


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _why_not_taken(name: str, mode: int, why_not: Callable[[str], str]) -> str:
    """Why a file is not taken, or ""."""
    if name.startswith("._"):
        return "left behind by macOS"
    if name.startswith("."):
        return "a hidden file"
    if not stat.S_ISREG(mode):
        return "not a file"
    return why_not(name)


def _why_no_image(name: str) -> str:
    """Why a file is no image by its name, or ""."""
    extension = os.path.splitext(name)[1].lower()
    if extension in OTHER_FORMATS:
        return f"{extension} images are not taken; convert them to JPEG or PNG"
    return "" if extension in IMAGE_EXTENSIONS else "not an image by its name"


def _why_skipped(name: str) -> str:
    """Why a folder is not looked into, or ""."""
    if name.startswith("."):
        return "a hidden folder"
    return LEFTOVER_FOLDERS.get(name.lower(), "")
