"""Class folders as people have them: every image is taken or named, and what other programs left is no class."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from refiner_ds.data.image_tree import LabelledImages, list_images, printable, read_class_folders
from refiner_ds.errors import DataError


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two classes of two files; only names matter here."""
    for name in ("cat/1.jpg", "cat/2.jpg", "dog/1.jpg", "dog/2.jpg"):
        put(tmp_path / "set" / name)
    return tmp_path / "set"


def put(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")


def taken(found: LabelledImages) -> list[tuple[str, str]]:
    return [(image.path, found.classes[image.label]) for image in found.images]


FOUR = [("cat/1.jpg", "cat"), ("cat/2.jpg", "cat"), ("dog/1.jpg", "dog"), ("dog/2.jpg", "dog")]

LEFT_BEHIND = [
    "__MACOSX/cat/._1.jpg",
    ".Trashes/1.jpg",
    "@eaDir/1.jpg/SYNOPHOTO_THUMB_M.jpg",
    ".@__thumb/1.jpg",
    "#recycle/1.jpg",
    "$RECYCLE.BIN/1.jpg",
    "System Volume Information/1.jpg",
    "lost+found/1.jpg",
    ".ipynb_checkpoints/1-checkpoint.jpg",
    "cat/@eaDir/1.jpg/SYNOFILE_THUMB_XL.jpg",
    "cat/.ipynb_checkpoints/1-checkpoint.jpg",
    "cat/._1.jpg",
    "cat/.1.jpg.Xy3Za9",
    "cat/.DS_Store",
    "cat/Thumbs.db",
    "cat/desktop.ini",
    "cat/1.jpg~",
    ".DS_Store",
    "Thumbs.db",
    "readme.txt",
    "montage.jpg",
]


@pytest.mark.parametrize("name", LEFT_BEHIND)
def test_what_other_programs_leave_is_no_class_and_no_sample_and_is_named(tree: Path, name: str) -> None:
    put(tree / name)
    found = read_class_folders(tree)
    assert taken(found) == FOUR
    (line,) = found.ignored
    assert name.startswith(line.split(": ")[0].rstrip("/"))


@pytest.mark.parametrize("extension", ".JPG .JPEG .jpe .jfif .tif .TIFF .ppm .pgm .avif .webp .bmp .gif .png".split())
def test_every_format_that_can_be_read_is_taken_in_either_case(tree: Path, extension: str) -> None:
    put(tree / f"cat/3{extension}")
    assert (f"cat/3{extension}", "cat") in taken(read_class_folders(tree))


def test_other_formats_are_named(tree: Path) -> None:
    put(tree / "dog/3.HEIC")
    assert read_class_folders(tree).ignored == ["dog/3.HEIC: .heic images are not taken; convert them to JPEG or PNG"]


def test_links_are_followed_and_those_that_lead_nowhere_are_named(tree: Path, tmp_path: Path) -> None:
    put(tmp_path / "elsewhere/4.jpg")
    (tree / "cow").symlink_to(tmp_path / "elsewhere")
    (tree / "cat/5.jpg").symlink_to(tmp_path / "elsewhere/4.jpg")
    (tree / "cat/gone.jpg").symlink_to(tmp_path / "gone.jpg")
    (tree / "cat/self.jpg").symlink_to(tree / "cat/self.jpg")
    (tree / "cat/up").symlink_to(tree)
    (tree / "cat/far_up").symlink_to(tmp_path.parent)
    (tree / "cat/here").symlink_to(tree / "cat")
    (tree / "gone").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tree / "cat/pipe.jpg")
    found = read_class_folders(tree)
    assert taken(found) == sorted([*FOUR, ("cat/5.jpg", "cat"), ("cow/4.jpg", "cow")])
    told = dict(line.split(": ") for line in found.ignored)
    assert told["cat/gone.jpg"] == told["gone"] == "a link to nothing"
    assert "cannot be opened" in told["cat/self.jpg"] and told["cat/pipe.jpg"] == "not a file"
    assert told["cat/here/"] == "a link to a folder around it"
    assert told["cat/up/"] == told["cat/far_up/"] == "a link to a folder around it"


def test_names_that_are_not_utf8_are_taken_and_can_be_printed(tree: Path) -> None:
    put(tree / "cat" / os.fsdecode(b"caf\xe9.jpg"))
    put(tree / "cat/two\nlines.jpg")
    found = list_images(tree)[0]
    assert [printable(image.path) for image in found if len(image.path) > 9] == [
        "cat/caf\\xe9.jpg",
        "cat/two\\nlines.jpg",
    ]


def refusal(folder: Path) -> str:
    with pytest.raises(DataError) as refused:
        read_class_folders(folder)
    return str(refused.value)


def test_trees_that_cannot_be_meant_are_refused(tree: Path, tmp_path: Path) -> None:
    assert "no such folder" in refusal(tmp_path / "absent")
    assert "no class folders" in refusal(tree / "cat")
    put(tree / "cow/notes.txt")
    assert "cow: no images in this class; not taken: cow/notes.txt: not an image by its name" in refusal(tree)
    for split in ("train/cat/1.jpg", "val/cat/1.jpg"):
        put(tmp_path / "splits" / split)
    assert "train, val are splits, not classes" in refusal(tmp_path / "splits")
    put(tmp_path / "wrapped/inner/cat/1.jpg")
    assert "wrapped/inner instead" in refusal(tmp_path / "wrapped")
    put(tmp_path / "bytes" / os.fsdecode(b"caf\xe9") / "1.jpg")
    assert "must be UTF-8" in refusal(tmp_path / "bytes")
