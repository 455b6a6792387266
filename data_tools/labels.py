"""Images in one folder, labelled by a file:

    cat one.jpg<TAB>golden cat                             file and class, parted by tabs, commas, semicolons or spaces;
    "cat, one.jpg","golden cat"                            quoted as spreadsheets do, with or without a line of titles
    ImageId,PredictionString                               Kaggle's LOC_train_solution.csv and LOC_val_solution.csv:
    ILSVRC2012_val_00000001,n01751748 111 108 354 340      no file extension, a class before each box
    490                                                    one class a line, in the order of the file names

Files may be named by path or name, with or without extension, as long as one image is meant.
"""

from __future__ import annotations

import csv
import os
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from refiner_ds.data.image_tree import (
    IMAGE_EXTENSIONS,
    ImageFile,
    LabelledImage,
    LabelledImages,
    list_images,
    printable,
)
from refiner_ds.errors import DataError

from .class_lists import ClassList, read_text, refuse_imagenets_numbers_alone, sort_classes

FILE_TITLES = frozenset(
    "file files filename filepath fname path image images imageid imagename imagefile imagepath img imgname imgpath "
    "id key name".split()
)
CLASS_TITLES = frozenset(
    "class classes classname classid label labels labelname labelid category categoryname categoryid target "
    "groundtruth synset wnid species breed predictionstring".split()
)
DELIMITERS = ("\t", ",", ";")
FILE_NAME = re.compile(rf"[^\s,;|:\"']+({'|'.join(map(re.escape, IMAGE_EXTENSIONS))})(?![\w.])", re.IGNORECASE)
Find = Callable[[str], list[str]]  # the images that a file's name in a label file may mean


@dataclass(frozen=True)
class Row:
    """A line of a label file: its number, the file it names and the class."""

    line: int
    file: str
    label: str


def read_labelled_files(
    folder: Path, labels: Path, class_list: ClassList | None, like: ClassList | None, count_from: int | None
) -> LabelledImages:
    """Read a folder of images and the file that labels them.

    Args:
        folder: holds the images, in folders or not.
        labels: in any of the forms of the module's docstring.
        class_list: what class numbers stand for, and all classes there are; None: the classes that occur.
        like: the classes, in order, of a set whose labels this one is to share; None: class names sort into labels.
        count_from: see `ClassList.resolve`.
    Raises:
        DataError: an image without a label, a label without its image, contradictory labels, a class that is not in
            the list, or more than one way to read the file.
    """
    if not folder.is_dir():
        raise DataError(f"{printable(folder)}: no such folder; name the one that holds the images")
    images, ignored = list_images(folder)
    if not images:
        hint = f" (not taken: {ignored[0]})" if ignored else ""
        raise DataError(f"{printable(folder)}: no images in it{hint}")
    label_of = read_labels(labels, folder, images)
    numbers = class_list or like
    if numbers is not None:
        label_of = numbers.resolve(label_of, count_from, str(labels))
    elif count_from is not None:
        raise DataError("--count-from: needs the list that is counted, --classes or --like")
    else:
        refuse_imagenets_numbers_alone(label_of, labels)
    classes = like.names if like else sort_classes(class_list.names if class_list else label_of.values())
    position = {name: label for label, name in enumerate(classes)}
    for image, name in label_of.items():
        if name not in position:
            assert like is not None  # the classes hold whatever the list does
            raise DataError(f"{labels}: {printable(image)} has class {name}, {like.not_listed(name)}")
    labelled = [LabelledImage(image.path, image.size, position[label_of[image.path]]) for image in images]
    return LabelledImages(folder, labelled, classes, ignored)


def read_labels(labels: Path, folder: Path, images: list[ImageFile]) -> dict[str, str]:
    """The class that a label file gives each image, as it is written there: image path → class.

    Raises:
        DataError: see `read_labelled_files`.
    """
    find = _finder(folder, images)
    said: dict[str, Row] = {}
    for row in _rows(labels, find, [image.path for image in images]):
        path = _one_image(labels, row, find(row.file), folder)
        earlier = said.setdefault(path, row)
        if earlier.label != row.label:
            raise DataError(
                f"{labels}: {printable(path)} has class {earlier.label} in line {earlier.line} and {row.label} in "
                f"line {row.line}; keep one"
            )
    missing = [image.path for image in images if image.path not in said]
    if missing:
        others = f", like {len(missing) - 1} more of {len(images)} images" if len(missing) > 1 else ""
        raise DataError(
            f"{printable(folder / missing[0])}: has no line in {labels}{others}; add one or remove the image"
        )
    return {image.path: said[image.path].label for image in images}


def _one_image(labels: Path, row: Row, meant: list[str], folder: Path) -> str:
    """The image that a row is about, which must be one, and have a class."""
    name = printable(row.file)
    if not meant:
        raise DataError(
            f"{labels}: line {row.line} names {name}, which is not in {printable(folder)}; "
            "remove the line or add the image"
        )
    if len(meant) > 1:
        raise DataError(
            f"{labels}: line {row.line}: {name} may be {printable(meant[0])} or {printable(meant[1])}; "
            "write the whole path"
        )
    if not row.label:
        raise DataError(f"{labels}: line {row.line} gives {name} no class; add one")
    if row.label != os.fsencode(row.label).decode("utf-8", "ignore"):
        raise DataError(f"{labels}: line {row.line}: a class name must be UTF-8; save the file as UTF-8")
    return meant[0]


def _finder(folder: Path, images: list[ImageFile]) -> Find:
    """A function from a file as a label file names it to the images that may be meant."""
    exact: dict[str, list[str]] = {}
    loose: dict[str, list[str]] = {}  # without the folder, without the extension
    caseless: dict[str, list[str]] = {}  # a file system that knows no case may have changed it
    for image in images:
        base = os.path.basename(image.path)
        exact.setdefault(_plain(image.path), []).append(image.path)
        for name in {os.path.splitext(image.path)[0], base, os.path.splitext(base)[0]}:
            loose.setdefault(_plain(name), []).append(image.path)
        for name in {image.path, base}:
            caseless.setdefault(_plain(name).casefold(), []).append(image.path)
    within = f"/{_plain(folder.resolve().name)}/"

    def find(text: str) -> list[str]:
        name = _plain(text).removeprefix("./")
        _, inside, rest = f"/{name}".partition(within)  # named from a folder above
        for form in (name, rest) if inside else (name,):
            if meant := exact.get(form) or loose.get(form) or caseless.get(form.casefold()):
                return meant
        return []

    return find


def _plain(name: str) -> str:
    """A file name as it is compared: one kind of slash, and one way to write an accent (file systems differ)."""
    return unicodedata.normalize("NFC", name.strip().replace("\\", "/"))


def _rows(labels: Path, find: Find, paths: list[str]) -> list[Row]:
    """The rows of a label file, read in the layout under which most of them name an image."""
    text = read_text(labels)
    if text.lstrip()[:1] in ("{", "["):
        raise DataError(f"{labels}: is JSON; give a table of file and class")
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    while lines and lines[0][1].startswith("# "):
        lines.pop(0)
    layouts: list[_Table | _Spaced] = [_Table(labels, lines, delimiter, find) for delimiter in DELIMITERS]
    layouts.append(_Spaced(lines, find))
    best = max(layouts, key=lambda layout: layout.matches)
    if best.matches:
        return best.rows()
    _refuse_files_that_are_not_there(labels, [line for _, line in lines])
    if len(lines) != len(paths):
        raise DataError(f"{labels}: {len(lines)} label{'s' * (len(lines) != 1)} for {len(paths)} images; give one each")
    return [Row(number, path, line.strip('"')) for (number, line), path in zip(lines, paths, strict=True)]


def _refuse_files_that_are_not_there(labels: Path, lines: list[str]) -> None:
    """Lines of which none names an image are classes, unless they look like files of another folder."""
    for line in lines:
        named = FILE_NAME.search(line)
        if named:
            raise DataError(
                f"{labels}: names {named[0]}, which is not among the images; remove the line or add the image"
            )
    tables = any(all(delimiter in line for line in lines) for delimiter in DELIMITERS)
    if tables and lines and len(set(lines)) == len(lines):
        raise DataError(
            f"{labels}: none of its lines names an image, the last is {lines[-1]!r}; name the images' folder"
        )


class _Table:
    """A label file as a table with this delimiter.

    Attributes:
        matches: rows whose file is an image; 0 where the text is no such table.
    """

    def __init__(self, labels: Path, lines: list[tuple[int, str]], delimiter: str, find: Find) -> None:
        self.labels = labels
        self.matches = 0
        reader = csv.reader((f"{line}\n" for _, line in lines), delimiter=delimiter, skipinitialspace=True)
        try:
            self.table = [(reader.line_num, [cell.strip().replace("\n", " ") for cell in row]) for row in reader]
        except csv.Error:  # a quotation mark that is never closed
            return
        self.table = [(lines[line - 1][0], row) for line, row in self.table]
        self.find = find
        width = min((len(row) for _, row in self.table), default=0)
        if width > 1:
            self.file_column = max(range(width), key=self._names_files)
            self.matches = self._names_files(self.file_column)[0]

    def _names_files(self, column: int) -> tuple[int, int]:
        """How many cells of a column name an image, and how many of those with an extension."""
        named = [row[column] for _, row in self.table if self.find(row[column])]
        return len(named), sum(cell.lower().endswith(IMAGE_EXTENSIONS) for cell in named)

    def rows(self) -> list[Row]:
        """The rows below the titles.

        Raises:
            DataError: it is unclear which column is the class, or an image has boxes of several classes.
        """
        (first_line, first), *others = self.table
        for line, row in others:
            if len(row) != len(first):
                raise DataError(
                    f"{self.labels}: line {line} has {len(row)} cells where line {first_line} has {len(first)}; "
                    "put cells with a delimiter in them into quotation marks"
                )
        titles = [re.sub(r"[^a-z0-9]", "", cell.lower()) for cell in first]
        file = first[self.file_column]
        names_a_file = self.find(file) or FILE_NAME.fullmatch(file)
        if names_a_file or not (FILE_TITLES | CLASS_TITLES).intersection(titles):
            titles = []
        body = others if titles else self.table
        classes = self._class_column(titles, body)
        found = [Row(line, row[self.file_column], row[classes]) for line, row in body]
        return self._without_boxes(found) if all(_is_boxes(row.label) for row in found) else found

    def _class_column(self, titles: list[str], body: list[tuple[int, list[str]]]) -> int:
        width = len(self.table[0][1])
        filled = [column for column in range(width) if any(row[column] for _, row in body)]
        candidates = [column for column in filled if column != self.file_column]
        if len(candidates) > 1 and titles:
            candidates = [column for column in candidates if titles[column] in CLASS_TITLES] or candidates
        if len(candidates) != 1:
            raise DataError(
                f"{self.labels}: {len(filled)} columns, of which {len(candidates)} may be the class; "
                "keep two, titled file and class"
            )
        return candidates[0]

    def _without_boxes(self, rows: list[Row]) -> list[Row]:
        """Kaggle's rows, ``<class> <box> <class> <box> …``, with the class alone."""
        for row in rows:
            found = sorted(set(row.label.split()[::5]))
            if len(found) > 1:
                raise DataError(
                    f"{self.labels}: line {row.line} has boxes of {found[0]} and {found[1]}; an image has one class"
                )
        return [Row(row.line, row.file, row.label.split()[0]) for row in rows]


def _is_boxes(cell: str) -> bool:
    words = cell.split()
    numbers = [word for place, word in enumerate(words) if place % 5]
    return len(words) > 4 and len(words) % 5 == 0 and all(re.fullmatch(r"-?\d+", word) for word in numbers)


class _Spaced:
    """A label file as lines ``<file> <class>``, both perhaps with spaces: the longest beginning that names an image."""

    def __init__(self, lines: list[tuple[int, str]], find: Find) -> None:
        self._rows = [Row(number, *self._split(line, find)) for number, line in lines]
        pairs = any(row.label for row in self._rows)
        self.matches = sum(bool(find(row.file)) for row in self._rows) if pairs else 0

    @staticmethod
    def _split(line: str, find: Find) -> tuple[str, str]:
        gaps = [found.span() for found in re.finditer(r"\s+", line)]
        for start, end in reversed(gaps):
            if find(line[:start]):
                return line[:start], line[end:]
        return (line[: gaps[0][0]], line[gaps[0][1] :]) if gaps else (line, "")

    def rows(self) -> list[Row]:
        """One row a line."""
        return self._rows
