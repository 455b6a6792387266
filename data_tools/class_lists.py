"""Class lists: the names of a set's classes, and which of them a label number stands for.

    meta.mat             ImageNet's devkit (ILSVRC2012_devkit_t12/data/meta.mat): ILSVRC ids and WordNet ids
    map_clsloc.txt       the same in later devkits, as lines "<WordNet id> <ILSVRC id> <words>"
    classes.txt          one name a line, in the order in which label numbers count; or lines "<number> <name>", or
                         "<name>,<number>"; a line of titles may stand above those
    class_index.json     a list of names; {"0": name, …}; {name: 0, …}; or Keras' {"0": [WordNet id, words], …}

Where every line begins with a WordNet id, that is the name, and the rest of the line describes it.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refiner_ds.data.image_tree import printable
from refiner_ds.errors import DataError

WORDNET_ID = re.compile(r"(n\d{8})(?!\w)")
DEVKIT_LINE = re.compile(r"(n\d{8})\s+(\d+)\s+\S.*")
NUMBERED_LINE = re.compile(r"(\d+)[\s,;:.)]+(\S.*)")
NUMBER_AFTER = re.compile(r"(\S.*?)\s*[,;\t]\s*(\d+)")
TITLES = frozenset("class classes classname label labels name names category categories synset synsets wnid".split())
IMAGENET_FILE = re.compile(r"ILSVRC\d+_(val|test)_\d+")


@dataclass(frozen=True)
class ClassList:
    """Class names as a file lists them.

    Attributes:
        source: the file or set, for messages.
        names: in the order of the file.
        by_number: what numbers the file itself gives its names; None: numbers are positions in ``names``.
    """

    source: Path
    names: list[str]
    by_number: dict[int, str] | None = None

    def resolve(self, labels: dict[str, str], count_from: int | None, place: str) -> dict[str, str]:
        """The class name of every image.

        Args:
            labels: image → class as the label file says it: a name, or a number.
            count_from: 0 or 1, what positions in ``names`` are counted from; None: decided from the numbers.
            place: the label file, for messages.
        Raises:
            DataError: a class is not in the list, or it cannot be known which one a number means.
        """
        known = set(self.names)
        if known.issuperset(labels.values()):
            return labels
        for image, label in labels.items():
            if not label.isdecimal() and label not in known:
                raise DataError(f"{place}: {printable(image)} has class {label}, {self.not_listed(label)}")
        numbers = {label: int(label) for label in labels.values() if label.isdecimal()}
        by_number = self._numbered(numbers.values(), count_from, place)
        if count_from is None and min(by_number) == 1:
            self._refuse_other_numbers_than_imagenets(by_number, labels, place)
        for image, label in labels.items():
            if numbers.get(label) not in by_number:
                raise DataError(
                    f"{place}: {printable(image)} has class {label}, but {self.source} has numbers "
                    f"{min(by_number)} to {max(by_number)}; correct one of them"
                )
        return {image: by_number[numbers[label]] for image, label in labels.items()}

    def _numbered(self, numbers: Iterable[int], count_from: int | None, place: str) -> dict[int, str]:
        """The name of every number: what the list says, or its positions."""
        if self.by_number is not None:
            if count_from not in (None, min(self.by_number)):
                raise DataError(f"{self.source}: numbers its classes from {min(self.by_number)}, not {count_from}")
            return self.by_number
        lowest, highest = min(numbers), max(numbers)
        if count_from is None and 0 < lowest and highest < len(self.names):
            raise DataError(
                f"{place}: its class numbers, {lowest} to {highest}, may be counted from 0 or from 1; "
                "say which with --count-from"
            )
        first = int(lowest > 0) if count_from is None else count_from
        return dict(enumerate(self.names, first))

    def _refuse_other_numbers_than_imagenets(
        self, by_number: dict[int, str], labels: Iterable[str], place: str
    ) -> None:
        """ImageNet's ground truth, counted from 1, numbers classes by ILSVRC id: no sorted list, nor one of words."""
        names = [by_number[number] for number in sorted(by_number)]
        wordnet = all(map(WORDNET_ID.fullmatch, names))
        of_imagenet = _of_imagenet(labels)
        if (wordnet and names == sorted(names)) or (of_imagenet and not wordnet):
            kind = "lists WordNet ids in sorted order" if wordnet else "lists no WordNet ids"
            raise DataError(
                f"{self.source}: {kind}, but ImageNet's ground truth numbers classes by ILSVRC id; give the devkit's "
                f"data/meta.mat or map_clsloc.txt as --classes, or say --count-from 1 if {place} does count this list"
            )

    def not_listed(self, name: str) -> str:
        """That a class is missing, and which one may be meant."""
        near = difflib.get_close_matches(name, self.names, 1)
        return f"which is not in {self.source}; " + (f"did you mean {near[0]}?" if near else "correct one of them")


def refuse_imagenets_numbers_alone(label_of: dict[str, str], place: Path) -> None:
    """Refuse numbers from 1 on for ImageNet's images: as names they would later count another list.

    Args:
        label_of: image → class as the label file says it.
        place: the label file, for messages.
    Raises:
        DataError: see above.
    """
    numbers = {int(label) for label in label_of.values() if label.isdecimal()}
    if numbers and min(numbers) > 0 and _of_imagenet(label_of) and all(map(str.isdecimal, label_of.values())):
        raise DataError(
            f"{place}: numbers classes, by ILSVRC id if it is ImageNet's ground truth; give the devkit's data/meta.mat "
            "or map_clsloc.txt as --classes, or the list that is counted"
        )


def _of_imagenet(images: Iterable[str]) -> bool:
    return any(IMAGENET_FILE.match(os.path.basename(image)) for image in images)


def sort_classes(names: Iterable[str]) -> list[str]:
    """Class names in the order of a set's labels: sorted, and where all are numbers by number."""
    found = set(names)
    return sorted(found, key=int) if all(name.isdecimal() for name in found) else sorted(found)


def read_class_list(path: Path) -> ClassList:
    """Read any of the files in the module's docstring.

    Raises:
        DataError: it cannot be read, names a class twice, or names none; a name is not UTF-8, or a title.
    """
    if path.suffix == ".mat":
        found = _from_devkit(path)
    elif path.suffix == ".json":
        found = _from_json(path)
    else:
        found = _from_lines(path, [line.strip() for line in read_text(path).split("\n") if line.strip()])
    if not found.names:
        raise DataError(f"{path}: names no class; list one a line")
    title = found.names[0]
    if found.by_number is None and path.suffix != ".json" and re.sub(r"[\s_-]", "", title.lower()) in TITLES:
        raise DataError(
            f"{path}: its first line, {title}, is a title; remove it, or number the classes if it is a class"
        )
    first: dict[str, int] = {}
    for number, name in enumerate(found.names, 1):
        if name != os.fsencode(name).decode("utf-8", "ignore"):
            raise DataError(f"{path}: {printable(name)} is not UTF-8; save the file as UTF-8")
        if first.setdefault(name, number) != number:
            raise DataError(f"{path}: names {name} twice (classes {first[name]} and {number}); names must differ")
    return found


def read_text(path: Path) -> str:
    """A text file in UTF-8 or, with a byte order mark, UTF-16; other bytes stay as Python keeps them in file names.

    Raises:
        DataError: it cannot be read.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); name a text file") from None
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        text = data.decode("utf-16", "replace")
    elif b"\0" in data:
        raise DataError(f"{path}: not a text file; name a list of labels or classes")
    else:
        text = data.decode("utf-8-sig", "surrogateescape")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _from_lines(path: Path, lines: list[str]) -> ClassList:
    for rows in (lines, lines[1:]):  # with or without a line of titles
        for pattern, number, name in ((DEVKIT_LINE, 2, 1), (NUMBERED_LINE, 1, 2), (NUMBER_AFTER, 2, 1)):
            found = [row for row in map(pattern.fullmatch, rows) if row]
            numbers = [int(row[number]) for row in found]
            if rows and len(found) == len(rows) and _counts(numbers):
                names = _names([row[name] for row in found])
                return ClassList(path, names, dict(zip(numbers, names, strict=True)))
        if rows and all(map(WORDNET_ID.match, rows)):
            return ClassList(path, _names(rows))
    return ClassList(path, _names(lines))


def _counts(numbers: Sequence[int]) -> bool:
    """Whether numbers are 0, 1, … or 1, 2, … in any order."""
    return sorted(numbers) in (list(range(len(numbers))), list(range(1, len(numbers) + 1)))


def _names(lines: Sequence[str]) -> list[str]:
    """The names in lines of a class list."""
    ids = [WORDNET_ID.match(line) for line in lines]
    if all(ids):
        return [found[1] for found in ids if found]
    return [line.partition("\t")[0].strip().strip('"') for line in lines]


def _from_json(path: Path) -> ClassList:
    try:
        read = json.loads(read_text(path))
        if (
            isinstance(read, dict)
            and all(isinstance(entry, int) for entry in read.values())
            and _counts([*read.values()])
        ):
            read = {number: name for name, number in read.items()}  # torchvision's class_to_idx
        if isinstance(read, dict):
            by_number = {int(number): _json_name(entry) for number, entry in read.items()}
            return ClassList(path, list(by_number.values()), by_number)
        return ClassList(path, [_json_name(entry) for entry in read])
    except (ValueError, TypeError, IndexError):
        raise DataError(f'{path}: not a class list; wanted ["name", …] or {{"0": "name", …}}') from None


def _json_name(entry: Any) -> str:
    if isinstance(entry, list):
        entry = entry[0]
    if not isinstance(entry, str):
        raise TypeError
    return entry


def _from_devkit(path: Path) -> ClassList:
    """ILSVRC ids and WordNet ids of a devkit's ``meta.mat``; the inner nodes of the hierarchy are no classes."""
    from scipy.io import loadmat  # comes with scikit-learn

    try:
        synsets = loadmat(path, squeeze_me=True)["synsets"]
        leaves = synsets[synsets["num_children"] == 0]
        by_number = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in leaves}
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; it is data/meta.mat in ImageNet's devkit") from None
    except Exception:  # the reader of MATLAB's files raises what comes
        raise DataError(f"{path}: not data/meta.mat of ImageNet's devkit, ILSVRC2012_devkit_t12") from None
    return ClassList(path, list(by_number.values()), by_number)
