"""WebDataset tars that others wrote are read where they lie: same images, same labels, not a byte copied or changed."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from data_tools.verify import main as verify
from refiner_ds.data.augment import EvalSettings
from refiner_ds.data.decoding import decode_image
from refiner_ds.data.index import ShardIndex, find_maps, maps_folder
from refiner_ds.data.loader import eval_batches, train_batches
from refiner_ds.data.samples import SampleReader
from refiner_ds.data.score_maps import ScoreMap, encode
from refiner_ds.data.webdataset_index import TarScan, find_tars, index_existing
from refiner_ds.data.writer import SetWriter
from refiner_ds.errors import DataError
from refiner_ds.files import sha256_of
from tests.data.conftest import png, views

SYNSETS = ["n01440764", "n01443537", "n01484850"]


def jpeg(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((9, 8, 3), number * 5 % 256, np.uint8)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def add(tar: tarfile.TarFile, name: str, payload: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(payload)
    tar.addfile(member, io.BytesIO(payload))


def timm_tars(folder: Path, split: str = "train", tars: int = 3, each: int = 7) -> Path:
    """Tars as in timm's imagenet-1k-wds: .cls, .jpg and .json with the original file name."""
    folder.mkdir(exist_ok=True)
    for tar_number in range(tars):
        with tarfile.open(folder / f"imagenet1k-{split}-{tar_number:04d}.tar", "w") as tar:
            for number in range(tar_number * each, (tar_number + 1) * each):
                synset, key = SYNSETS[number % 3], f"{SYNSETS[number % 3]}_{number}"
                about = {"filename": f"{synset}/{key}.JPEG", "height": 9, "label": number % 3, "width": 8}
                add(tar, f"{key}.cls", str(number % 3).encode())
                add(tar, f"{key}.jpg", jpeg(number))
                add(tar, f"{key}.json", json.dumps(about).encode())
    return folder


def sums(folder: Path) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in folder.glob("*.tar")}


def test_timms_tars_are_read_as_webdataset_reads_them(tmp_path: Path) -> None:
    folder = timm_tars(tmp_path / "wds")
    timm_tars(folder, "validation", 1)
    before = sums(folder)
    index = ShardIndex.load(index_existing(folder / "imagenet1k-train-{0000..0002}.tar"))
    assert index.folder == folder / "imagenet1k-train" and index.count == 21
    assert [shard.name for shard in index.shards] == [f"imagenet1k-train-000{n}.tar" for n in range(3)]
    assert index.classes == SYNSETS  # from the folders of the original files
    tars = [str(index.shard_path(number)) for number in range(3)]
    reader = SampleReader(index)
    for number, theirs in enumerate(webdataset.WebDataset(tars, shardshuffle=False).decode("rgb8")):
        ours = reader.read(number)
        assert ours.key == theirs["__key__"] and ours.label == theirs["cls"]
        assert np.abs(decode_image(ours).astype(int) - theirs["jpg"]).max() <= 1
    assert sums(folder) == before
    assert sorted(path.name for path in index.folder.iterdir()) == ["index.json", "members.npy"]


def test_indexed_tars_train_evaluate_verify_and_take_maps_like_our_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = ShardIndex.load(index_existing(timm_tars(tmp_path / "wds")))
    assert index.folder == tmp_path / "wds"
    with SetWriter(tmp_path / "own", SYNSETS, 5) as writer:
        for number in range(21):
            writer.add(f"{number}", jpeg(number), "jpg", number % 3)
    both = index, ShardIndex.load(tmp_path / "own")
    how = {"global_batch": 6, "micro_batch": 3, "rank": 0, "world_size": 2, "seed": 3}
    for ours, theirs in islice(zip(*(train_batches(one, views(8), **how) for one in both), strict=False), 6):  # type: ignore[arg-type]
        assert torch.equal(ours.images_BHWC, theirs.images_BHWC) and torch.equal(ours.labels_B, theirs.labels_B)
    seen = [b.labels_B for b in eval_batches(index, EvalSettings(8), batch=21, rank=0, world_size=1, workers=1)]
    assert torch.cat(seen).tolist() == [number % 3 for number in range(21)]
    assert verify([str(index.folder), "--processes", "1"]) == 0
    one = ScoreMap(np.ones((1, 2, 2), np.float16), np.zeros((1, 2, 2), np.int16), 0)
    reader = SampleReader(index)
    with SetWriter(maps_folder(index.folder), SYNSETS, 7, one.format) as writer:
        for number in range(21):
            writer.add_map(reader.read(number).key, encode(one), number % 3)
    assert find_maps(index).map_format_for(index) == one.format
    tar = index.shard_path(1)
    data = bytearray(tar.read_bytes())
    data[int(index.members[8]["offset"]) + 600] ^= 1
    tar.write_bytes(data)
    with pytest.raises(DataError, match=r"imagenet1k-train-0001.tar: sample 1 \(number 8 .* is damaged"):
        reader.read(8)
    assert verify([str(index.folder), "--processes", "1"]) == 1
    assert "imagenet1k-train-0001.tar: checksum differs" in capsys.readouterr().out


def test_index_may_lie_elsewhere_or_move_with_the_tars(tmp_path: Path) -> None:
    folder = timm_tars(tmp_path / "wds")
    folder.chmod(0o555)
    elsewhere = ShardIndex.load(index_existing(folder, out=tmp_path / "indexes" / "train"))
    assert elsewhere.shard_path(0) == tmp_path / "wds" / "imagenet1k-train-0000.tar"
    folder.chmod(0o755)
    inside = index_existing(folder / "*.tar")
    shutil.move(folder, tmp_path / "moved")
    assert ShardIndex.load(tmp_path / "moved" / inside.name).count == 21
    with pytest.raises(DataError, match="imagenet1k-train-0000.tar: named by index.json but missing"):
        ShardIndex.load(tmp_path / "indexes" / "train")


def test_where_no_index_can_be_written_no_tar_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object) -> list[TarScan]:
        raise AssertionError("hours of it")

    folder, in_the_way = timm_tars(tmp_path / "wds"), tmp_path / "file"
    in_the_way.write_text("")
    for out in (in_the_way, in_the_way / "index"):
        with pytest.raises(DataError, match="cannot be written, so the index has to go elsewhere; .* with --out"):
            index_existing(folder, out=out, scan=read)
    monkeypatch.setattr(os, "access", lambda path, mode: path != folder)  # a mount that cannot be written
    with pytest.raises(DataError, match="wds: cannot be written"):
        index_existing(folder, scan=read)
    with pytest.raises(DataError, match="wds/imagenet1k-train: cannot be written"):
        index_existing(folder / "imagenet1k-train-*.tar", scan=read)


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_tars_of_every_dialect_with_folders_long_names_and_leftovers(tmp_path: Path, form: int) -> None:
    deep = "a.folder/" + "x" * 60 + "/" + "y" * 60
    with tarfile.open(tmp_path / "any-0.tar", "w", format=form) as tar:
        around = tarfile.TarInfo("a.folder")
        around.type = tarfile.DIRTYPE
        tar.addfile(around)
        for name in (".DS_Store", "a.folder/._3.jpg", "__index__", "README"):
            add(tar, name, b"left behind")
        for number, stem in enumerate(("a.folder/3", deep, "short")):
            add(tar, f"{stem}.JPG", jpeg(number))
            add(tar, f"{stem}.cls", b"%d\n" % number)
        link = tarfile.TarInfo("short.png")
        link.type, link.linkname = tarfile.SYMTYPE, "short.JPG"
        tar.addfile(link)
    index = ShardIndex.load(index_existing(tmp_path))
    reader = SampleReader(index)
    assert [int(decode_image(reader.read(n))[0, 0, 0]) // 5 for n in range(3)] == [0, 1, 2]
    assert [reader.read(n).label for n in range(3)] == [0, 1, 2] and index.classes == ["0", "1", "2"]
    assert reader.read(0).key == "a.folder/3"
    with pytest.raises(DataError, match="its name is not ASCII or has 100 bytes and more"):
        reader.read(1).key  # noqa: B018
    assert verify([str(tmp_path), "--processes", "1"]) == 0


def plain_tar(path: Path, *samples: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for number, sample in enumerate(samples):
            for ending, payload in sample.items():
                add(tar, ending.removeprefix("=") if ending[0] == "=" else f"{number}.{ending}", payload)
    return path


def test_labels_are_numbers_or_names_in_cls_or_json(tmp_path: Path) -> None:
    image = png(np.zeros((4, 4, 3), np.uint8))
    cat, dog = {"png": image, "cls": b"golden cat\n"}, {"json": b'{"label": "dog"}', "png": image}
    plain_tar(tmp_path / "named-0.tar", cat, dog, {"png": image, "cls.txt": b"ant"})
    index = ShardIndex.load(index_existing(tmp_path))
    assert index.classes == ["ant", "dog", "golden cat"] and index.members["label"].tolist() == [2, 1, 0]
    other = ["dog", "golden cat", "ant", "bee"]
    given = ShardIndex.load(index_existing(tmp_path, out=tmp_path / "given", classes=other))
    assert given.classes == other and given.members["label"].tolist() == [1, 0, 2]
    with pytest.raises(DataError, match="named-0.tar: sample 2 has class ant, none of the 2 in the list"):
        index_existing(tmp_path, out=tmp_path / "few", classes=other[:2])
    assert not (tmp_path / "few").exists()


IMAGE = png(np.zeros((4, 4, 3), np.uint8))
REFUSED: dict[str, tuple[list[dict[str, bytes]], str]] = {
    "no image": ([{"cls": b"0", "txt": b"a cat"}], r"a-0.tar: sample 0 \(0\): has no image among cls, txt"),
    "two images": ([{"png": IMAGE, "jpg": IMAGE, "cls": b"0"}], "has several images"),
    "no label": ([{"png": IMAGE, "cls": b"0"}, {"png": IMAGE, "json": b"{}"}], r"sample 1 \(1\): has no label"),
    "two labels": ([{"png": IMAGE, "cls": b"0", "json": b'{"label": 1}'}], "its .cls says 0 and its .json says 1"),
    "negative": ([{"png": IMAGE, "cls": b"-1"}], "its label is -1; it must be"),
    "empty label": ([{"png": IMAGE, "cls": b"\n"}], "its label is ''; it must be"),
    "an id": ([{"png": IMAGE, "cls": b"99999999999"}], "its label is 99999999999; numbers must be places in a list"),
    "not UTF-8": ([{"png": IMAGE, "cls": "café".encode("latin-1")}], "its .cls is no text in UTF-8"),
    "names and numbers": (
        [{"png": IMAGE, "cls": b"1"}, {"png": IMAGE, "cls": b"cat"}],
        "a-0.tar: sample 1 has the class name 'cat' and .*a-0.tar: sample 0 the number 1; use one or the other",
    ),
    "not JSON": ([{"png": IMAGE, "json": b"{"}], "its .json is not JSON"),
    "key twice at once": ([{"=0.png": IMAGE, "=0.cls": b"0"}, {"=0.png": IMAGE, "=0.cls": b"0"}], "has .png twice"),
    "key twice": (
        [{"png": IMAGE, "cls": b"0"}, {"png": IMAGE, "cls": b"0"}, {"=0.png": IMAGE, "=0.cls": b"0"}],
        "sample 0 of a-0.tar and sample 2 of a-0.tar have one key",
    ),
    "no samples": ([{"=README": b""}], "hold no samples"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_tars_that_are_no_set_are_refused_and_nothing_is_written(tmp_path: Path, fault: str) -> None:
    samples, says = REFUSED[fault]
    plain_tar(tmp_path / "a-0.tar", *samples)
    with pytest.raises(DataError, match=says) as told:
        index_existing(tmp_path)
    assert "\n" not in str(told.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a-0.tar"]


@pytest.mark.parametrize(
    "spoil, says",
    [
        (lambda data: data[:10240], "does not end as a tar does .at byte 10240.; it was cut"),
        (lambda data: data[:700], "the member at byte 0 .0.png. is cut off"),
        (lambda data: b"\x1f\x8b" + data[2:], "is compressed"),
        (lambda data: data[:4196] + b"rubbish!" + data[4204:], "no tar header at byte 4096"),
        (lambda data: b"not a tar at all" * 100, "no tar header at byte 0"),
    ],
)
def test_damaged_tars_are_refused(tmp_path: Path, spoil: Callable[[bytes], bytes], says: str) -> None:
    path = plain_tar(tmp_path / "a-0.tar", *[{"png": IMAGE, "cls": b"0"}] * 5)
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(DataError, match=says):
        index_existing(tmp_path)


def test_patterns_and_folders_name_their_tars(tmp_path: Path) -> None:
    for name in ("a-2.tar", "a-10.tar", "a-1.tar", "b-1.tar"):
        plain_tar(tmp_path / name, {f"={name[:-4]}.png": IMAGE, f"={name[:-4]}.cls": b"0"})
    assert find_tars(tmp_path / "a-*.tar").names == ["a-1.tar", "a-2.tar", "a-10.tar"]
    assert find_tars(tmp_path / "a-{1,10}.tar").names == ["a-1.tar", "a-10.tar"]
    assert find_tars(f"{tmp_path}/{{a,b}}-1.tar").names == ["a-1.tar", "b-1.tar"]
    with pytest.raises(DataError, match="holds tars of several sets .a, b.; name one"):
        find_tars(tmp_path)
    with pytest.raises(DataError, match=r"a-3.tar: no such tar"):
        find_tars(tmp_path / "a-{1..3}.tar")
    with pytest.raises(DataError, match="no such folder"):
        find_tars(tmp_path / "absent" / "*.tar")
    with pytest.raises(DataError, match="names a tar twice"):
        find_tars(tmp_path / "a-{1,*}.tar")
    index_existing(tmp_path / "a-*.tar")
    with pytest.raises(DataError, match="index.json: exists already"):
        index_existing(tmp_path / "a-*.tar")
