"""Label files as people have them: read as they are meant, or refused in a sentence that says what is wrong."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from data_tools.class_lists import ClassList, read_class_list
from data_tools.labels import read_labelled_files
from refiner_ds.errors import DataError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four images, by their names alone."""
    (tmp_path / "val").mkdir()
    for name in ("cat one.jpg", "dog.JPEG", "a,b.png", "caf\u00e9.jpg"):
        (tmp_path / "val" / name).write_bytes(b"x")
    return tmp_path / "val"


MEANT = {"cat one.jpg": "golden cat", "dog.JPEG": "dog", "a,b.png": 'the "big", one', "caf\u00e9.jpg": "dog"}


def read(
    folder: Path,
    text: str | bytes,
    classes: ClassList | None = None,
    like: ClassList | None = None,
    count_from: int | None = None,
) -> tuple[dict[str, str], list[str]]:
    """Class by image, and the classes, of a folder and the text of its label file."""
    labels = folder.parent / "labels.txt"
    labels.write_bytes(text if isinstance(text, bytes) else text.encode())
    found = read_labelled_files(folder, labels, classes, like, count_from)
    return {image.path: found.classes[image.label] for image in found.images}, found.classes


def refusal(folder: Path, text: str, **named: object) -> str:
    with pytest.raises(DataError) as refused:
        read(folder, text, **named)  # type: ignore[arg-type]
    assert "\n" not in str(refused.value)
    return str(refused.value)


ROWS = [(name, label.replace('"', '""')) for name, label in MEANT.items()]


def quoted(delimiter: str) -> str:
    """The four labels as a spreadsheet writes them."""
    return "".join(f'"{name}"{delimiter}"{label}"\n' for name, label in ROWS)


LAYOUTS: dict[str, str | bytes] = {
    "tab": "".join(f"{name}\t{label}\n" for name, label in MEANT.items() if '"' not in label)
    + 'a,b.png\t"the ""big"", one"\n',
    "comma, quoted": quoted(","),
    "semicolon, quoted": quoted(";"),
    "titles": "Image_ID,Label\n" + quoted(","),
    "titles of other columns": "width,filename,class_name\n"
    + "".join(f"7,{line}\n" for line in quoted(",").splitlines()),
    "class first": "label,file\n"
    + "".join(f'"{label.replace(chr(34), chr(34) * 2)}","{n}"\n' for n, label in MEANT.items()),
    "byte order mark": b"\xef\xbb\xbf" + quoted(",").encode(),
    "utf-16": quoted("\t").encode("utf-16"),
    "carriage returns": quoted(",").replace("\n", "\r\n"),
    "old carriage returns": quoted(",").replace("\n", "\r"),
    "spaces": "".join(f"{name}  {label}\n" for name, label in MEANT.items()),
    "blank lines": "\n" + quoted(",").replace("\n", "\n\n"),
    "no extension": quoted(",").replace(".jpg", "").replace(".JPEG", "").replace(".png", ""),
    "paths": "".join(f"val/{name}\t{label}\n" for name, label in MEANT.items()),
    "paths from above": "".join(f"data/val/{name}\t{label}\n" for name, label in MEANT.items()),
    "another case": "".join(f"{name.upper()}\t{label}\n" for name, label in MEANT.items() if '"' not in label)
    + 'A,B.PNG\t"the ""big"", one"\n',
    "a comment": "# mine\n" + quoted(","),
    "an index": ",file,label\n" + "".join(f'{n},"{row[0]}","{row[1]}"\n' for n, row in enumerate(ROWS)),
    "windows paths": "".join(f".\\{name}\t{label}\n" for name, label in MEANT.items()),
    "decomposed accents": quoted(",").replace("\u00e9", "e\u0301"),
    "broken over two lines": quoted(",").replace("golden cat", "golden\ncat"),
    "named twice alike": quoted(",") + 'dog.JPEG,"dog"\n',
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_label_is_the_one_that_is_written(folder: Path, layout: str) -> None:
    found, classes = read(folder, LAYOUTS[layout])
    assert found == MEANT
    assert classes == sorted(set(MEANT.values()))


def test_column_of_file_names_is_told_from_one_of_numbers_that_name_files_too(tmp_path: Path) -> None:
    for name in ("2.jpg", "1.jpg"):
        (tmp_path / "val").mkdir(exist_ok=True)
        (tmp_path / "val" / name).write_bytes(b"x")
    assert read(tmp_path / "val", "2,1.jpg\n1,2.jpg\n")[0] == {"1.jpg": "2", "2.jpg": "1"}


def test_labels_in_the_order_of_the_file_names_keep_their_spaces(folder: Path) -> None:
    found, _ = read(folder, "big cat\nsmall cat\ndog, a\nbig cat\n")
    assert found == {"a,b.png": "big cat", "caf\u00e9.jpg": "small cat", "cat one.jpg": "dog, a", "dog.JPEG": "big cat"}


def test_names_that_are_not_utf8_are_found(tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"x")
    found, _ = read(tmp_path / "val", b"caf\xe9.jpg\tcat\n")
    assert found == {os.fsdecode(b"caf\xe9.jpg"): "cat"}


def kaggle(tmp_path: Path) -> Path:
    """Files of ImageNet's validation set by their names."""
    (tmp_path / "val").mkdir()
    for number in range(1, 4):
        (tmp_path / "val" / f"ILSVRC2012_val_{number:08d}.JPEG").write_bytes(b"x")
    return tmp_path / "val"


def test_kaggles_solution_files_are_read(tmp_path: Path) -> None:
    """No file extension, a class before every box, several boxes."""
    found, _ = read(
        kaggle(tmp_path),
        "ImageId,PredictionString\n"
        "ILSVRC2012_val_00000002,n03995372 85 1 499 272 \n"
        "ILSVRC2012_val_00000001,n03481172 131 0 499 254 n03481172 10 20 30 40 \n"
        "ILSVRC2012_val_00000003,n03995372 -1 0 4 5\n",
    )
    assert [found[name] for name in sorted(found)] == ["n03481172", "n03995372", "n03995372"]


def test_boxes_of_two_classes_are_refused(tmp_path: Path) -> None:
    rows = "".join(f"ILSVRC2012_val_{n:08d},n00000001 1 2 3 4 n0000000{n} 1 2 3 4\n" for n in (1, 2, 3))
    assert "line 3 has boxes of n00000001 and n00000002" in refusal(
        kaggle(tmp_path), "ImageId,PredictionString\n" + rows
    )


REFUSED = {
    "contradiction": ("dog.JPEG\tdog\ndog.JPEG\tcat\n", "has class dog in line 1 and cat in line 2"),
    "contradiction by name": ("dog.JPEG\tdog\nval/dog\tcat\n", "dog.JPEG has class dog in line 1 and cat in line 2"),
    "no image": ("dog.JPEG\tdog\ncow.jpg\tcow\n", "line 2 names cow.jpg, which is not in"),
    "no label": ("dog.JPEG\tdog\n", "has no line in"),
    "no class": ("dog.JPEG,dog\na,b.png,\n", "put cells with a delimiter in them into quotation marks"),
    "empty class": ('dog.JPEG,dog\n"a,b.png",\n', "line 2 gives a,b.png no class"),
    "three columns": ("dog.JPEG,7,dog\n", "3 columns, of which 2 may be the class"),
    "two titles": ("file,label,class\ndog.JPEG,7,dog\n", "3 columns, of which 2 may be the class"),
    "another folder": ("train/dog.JPEG cat\ntrain/b.jpg cat\nc.jpg cat\nd.jpg dog\n", "names train/dog.JPEG, which"),
    "another delimiter": ("dog.JPEG|cat\nb.jpg|cat\nc.jpg|dog\nd.jpg|dog\n", "names dog.JPEG, which is not among"),
    "other names": ("img1,ant\nimg2,ant\nimg3,bee\nimg4,bee\n", "none of its lines names an image"),
    "few names": ("dog,ant\nimg2,ant\nimg3,bee\nimg4,bee\n", "line 2 names img2, which is not in"),
    "titles that are a file": ("cow.jpg,name\n" + quoted(","), "line 1 names cow.jpg, which is not in"),
    "json": ('{"dog.JPEG": "dog"}\n', "is JSON; give a table"),
    "count": ("1\n2\n", "2 labels for 4 images"),
    "nothing": ("", "0 labels for 4 images"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_meant_is_refused(folder: Path, case: str) -> None:
    text, says = REFUSED[case]
    assert says in refusal(folder, text)


def test_name_that_may_be_two_images_is_refused(folder: Path) -> None:
    for name in ("x/1.jpg", "y/1.jpg"):
        (folder / name).parent.mkdir()
        (folder / name).write_bytes(b"x")
    assert "1.jpg may be x/1.jpg or y/1.jpg; write the whole path" in refusal(folder, "dog.JPEG,dog\n1.jpg,cat\n")


def test_numbers_stand_for_the_list_and_labels_are_sorted(tmp_path: Path) -> None:
    images = tmp_path / "val"
    images.mkdir()
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        (images / name).write_bytes(b"x")
    listed = ClassList(Path("classes.txt"), ["zebra", "ant", "golden cat"])
    for text, first in (("0\n1\n2\n", 0), ("1\n2\n3\n", 1)):
        found, classes = read(images, text, listed)
        assert list(found.values()) == ["zebra", "ant", "golden cat"]
        assert classes == ["ant", "golden cat", "zebra"]
        assert read(images, text, listed, count_from=first)[0] == found
    assert "counted from 0 or from 1; say which with --count-from" in refusal(images, "1\n2\n2\n", classes=listed)
    assert read(images, "1\n2\n2\n", listed, count_from=1)[0] == dict(zip(found, ["zebra", "ant", "ant"], strict=True))
    assert "has class 4, but classes.txt has numbers 1 to 3" in refusal(images, "1\n2\n4\n", classes=listed)
    assert "which is not in classes.txt; did you mean zebra?" in refusal(images, "zebr\nant\nant\n", classes=listed)


def test_classes_may_be_those_of_another_set(tmp_path: Path) -> None:
    like = ClassList(Path("shards/train"), ["zebra", "ant", "cow"])
    assert read(kaggle(tmp_path), "ant\nant\nzebra\n", like=like)[1] == ["zebra", "ant", "cow"]
    assert "dog, which is not in shards/train" in refusal(tmp_path / "val", "ant\ndog\nzebra\n", like=like)


def test_numbers_without_a_list_are_names_in_the_order_of_numbers(tmp_path: Path) -> None:
    found, classes = read(kaggle(tmp_path), "10\n9\n0\n")
    assert list(found.values()) == ["10", "9", "0"] and classes == ["0", "9", "10"]
    assert "--count-from: needs the list" in refusal(tmp_path / "val", "1\n2\n3\n", count_from=1)
    for image in (tmp_path / "val").iterdir():
        image.rename(image.with_name(f"mine{image.name[-6:]}"))
    assert read(tmp_path / "val", "10\n9\n1\n")[1] == ["1", "9", "10"]


def test_imagenets_ground_truth_without_a_list_is_refused(tmp_path: Path) -> None:
    """As names, 1 to 1000 would be matched to places in a run's list of sorted WordNet ids."""
    message = refusal(kaggle(tmp_path), "490\n361\n171\n")
    assert "by ILSVRC id" in message and "meta.mat or map_clsloc.txt as --classes" in message


IDS = {1: "n02119789", 2: "n02100735", 3: "n02110185"}  # as in ILSVRC2012: by id, not by WordNet id
WORDS = {1: "kit fox, Vulpes macrotis", 2: "English setter", 3: "Siberian husky"}


def devkit(tmp_path: Path) -> Path:
    """A devkit's meta.mat of three classes and an inner node of the hierarchy."""
    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O"), ("children", "O")]
    rows = [(number, IDS[number], WORDS[number], 0, np.zeros(0)) for number in (2, 1, 3)]
    rows.append((4, "n02075296", "carnivore", 3, np.array([1, 2, 3])))
    synsets = np.empty((len(rows), 1), dtype=kind)
    for place, row in enumerate(rows):
        synsets[place, 0] = row
    (tmp_path / "data").mkdir()
    savemat(tmp_path / "data" / "meta.mat", {"synsets": synsets})
    (tmp_path / "data" / "map_clsloc.txt").write_text(
        "".join(f"{IDS[number]} {number} {WORDS[number].split(',')[0].replace(' ', '_')}\n" for number in IDS)
    )
    return tmp_path / "data"


@pytest.mark.parametrize("name", ["meta.mat", "map_clsloc.txt"])
def test_imagenets_ground_truth_is_numbered_by_ilsvrc_id(tmp_path: Path, name: str) -> None:
    """The devkit's own miniature: ground truth 3, 1, 2 is husky, fox, setter, and labels follow sorted WordNet ids."""
    images, ground_truth = kaggle(tmp_path), "3\n1\n2\n"
    listed = read_class_list(devkit(tmp_path) / name)
    found, classes = read(images, ground_truth, listed)
    assert list(found.values()) == ["n02110185", "n02119789", "n02100735"]
    assert classes == ["n02100735", "n02110185", "n02119789"]
    train = ClassList(Path("shards/train"), ["n02119789", "n02110185", "n02100735"])
    assert read(images, ground_truth, listed, train) == (found, train.names)


def test_sorted_synsets_are_not_what_the_ground_truth_numbers(tmp_path: Path) -> None:
    images, ordered = kaggle(tmp_path), tmp_path / "synsets.txt"
    ordered.write_text("".join(f"{name} {WORDS[number]}\n" for number, name in sorted(IDS.items(), key=lambda i: i[1])))
    listed = read_class_list(ordered)
    assert listed.names == ["n02100735", "n02110185", "n02119789"]
    message = refusal(images, "3\n1\n2\n", classes=listed)
    assert "ILSVRC id" in message and "meta.mat" in message and "--count-from 1" in message
    assert list(read(images, "3\n1\n2\n", listed, count_from=1)[0].values()) == ["n02119789", "n02100735", "n02110185"]
    words = ClassList(Path("words.txt"), ["English setter", "Siberian husky", "kit fox"])
    assert "lists no WordNet ids, but ImageNet's" in refusal(images, "3\n1\n2\n", classes=words)
    assert list(read(images, "3\n1\n2\n", words, count_from=1)[0].values()) == [*words.names[2:], *words.names[:2]]
    numbered = ClassList(listed.source, listed.names, dict(enumerate(listed.names, 1)))
    assert "ILSVRC id" in refusal(images, "3\n1\n2\n", classes=numbered)
    assert "numbers its classes from 1, not 0" in refusal(images, "3\n1\n2\n", classes=numbered, count_from=0)
    by_id = ClassList(Path("by_id.txt"), [IDS[number] for number in IDS])
    assert list(read(images, "3\n1\n2\n", by_id)[0].values()) == ["n02110185", "n02119789", "n02100735"]


LISTS = {
    "names with spaces": ("golden cat\ndog\n", ["golden cat", "dog"], None),
    "described": ("n00000002 kit fox, a fox\nn00000001\tdog\n", ["n00000002", "n00000001"], None),
    "description after a tab": ("golden cat\tfelis\ndog\tcanis\n", ["golden cat", "dog"], None),
    "numbered": ("2 golden cat\n1 dog\n", ["golden cat", "dog"], {2: "golden cat", 1: "dog"}),
    "numbered from 0": ("0: cat\n1: dog\n", ["cat", "dog"], {0: "cat", 1: "dog"}),
    "numbered, with titles": ("id,name\n1,dog\n0,golden cat\n", ["dog", "golden cat"], {1: "dog", 0: "golden cat"}),
    "numbered after the name": ("golden cat,2\ndog,1\n", ["golden cat", "dog"], {2: "golden cat", 1: "dog"}),
    "described, with titles": ("wnid,words\nn00000002,fox\nn00000001,dog\n", ["n00000002", "n00000001"], None),
    "rooms": ("room 2\nroom 1\n", ["room 2", "room 1"], None),
    "json by name": ('{"golden cat": 1, "dog": 0}', ["golden cat", "dog"], {1: "golden cat", 0: "dog"}),
    "numbers that do not count": ("7 up\n9 lives\n", ["7 up", "9 lives"], None),
    "quoted, with a mark": ('\ufeff"golden cat"\n"dog"\n', ["golden cat", "dog"], None),
    "json": ('["golden cat", "dog"]', ["golden cat", "dog"], None),
    "json by number": (
        '{"1": ["n00000001", "dog"], "0": ["n00000002", "fox"]}',
        ["n00000001", "n00000002"],
        {1: "n00000001", 0: "n00000002"},
    ),
}


@pytest.mark.parametrize("case", LISTS)
def test_class_list(tmp_path: Path, case: str) -> None:
    text, names, by_number = LISTS[case]
    path = tmp_path / ("classes.json" if "json" in case else "classes.txt")
    path.write_text(text)
    assert read_class_list(path) == ClassList(path, names, by_number)


@pytest.mark.parametrize(
    "name, text, says",
    [
        ("twice.txt", "crane\nfox\ncrane\n", "names crane twice (classes 1 and 3)"),
        ("empty.txt", "\n", "names no class"),
        ("bytes.txt", "\0", "not a text file"),
        ("title.txt", "Class Name\ncat\ndog\n", "its first line, Class Name, is a title; remove it"),
        ("latin.txt", "dog\ncaf\udce9\n", "caf\\xe9 is not UTF-8"),
        ("latin.json", '["dog", "caf\\udce9"]', "caf\\xe9 is not UTF-8"),
        ("other.mat", "x", "not data/meta.mat of ImageNet's devkit"),
        ("other.json", "7", "not a class list"),
        ("other.json", '{"0": 7}', "not a class list"),
    ],
)
def test_class_list_that_is_none_is_refused(tmp_path: Path, name: str, text: str, says: str) -> None:
    (tmp_path / name).write_text(text, errors="surrogateescape")
    with pytest.raises(DataError, match=re.escape(says)):
        read_class_list(tmp_path / name)
    for absent in ("absent.txt", "absent.mat"):
        with pytest.raises(DataError, match="absent"):
            read_class_list(tmp_path / absent)
