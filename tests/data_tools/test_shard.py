"""shard.py: the same bytes for any number of processes, nothing half-written, nothing lost unsaid."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_tools import shard
from data_tools.builder import NOTES_NAME
from data_tools.staging import INPUTS_NAME
from data_tools.verify import main as verify
from refiner_ds.data.decoding import decode_image
from refiner_ds.data.index import ShardIndex
from refiner_ds.data.samples import SampleReader
from refiner_ds.data.score_maps import decode
from refiner_ds.errors import DataError
from tests.data.small_disk import SmallDisk, on_small_disk
from tests.data_tools.conftest import (
    children_of,
    digest,
    finished_shards,
    half_written,
    kill_all_of,
    killed_before,
    picture,
    published_maps,
    start_and_wait_until_it_writes,
)

COMMAND = str(Path(shard.__file__))


def run(*arguments: object) -> int:
    return shard.main([str(argument) for argument in ("--shard-mb", 0.02, "--processes", 1, *arguments)])


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert run(*arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    return message


def contents(folder: Path) -> list[tuple[bytes, str]]:
    """Bytes and class of every sample of a set."""
    index = ShardIndex.load(folder)
    reader = SampleReader(index)
    return [(bytes(raw.image), index.classes[raw.label]) for raw in map(reader.read, range(index.count))]


def test_every_file_arrives_byte_for_byte_with_its_class(tree: Path, tmp_path: Path) -> None:
    assert run(tree, tmp_path / "out") == 0
    wanted = sorted((path.read_bytes(), path.parent.name) for path in tree.rglob("*.JPEG"))
    assert sorted(contents(tmp_path / "out")) == wanted
    assert len(ShardIndex.load(tmp_path / "out").shards) > 3
    assert verify([str(tmp_path / "out"), "--processes", "1"]) == 0


@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_processes_writes_the_same_bytes(tree: Path, tmp_path: Path, processes: int) -> None:
    assert run(tree, tmp_path / "one") == 0
    assert run(tree, tmp_path / "many", "--processes", processes) == 0
    assert digest(tmp_path / "one") == digest(tmp_path / "many")


def test_shards_are_about_as_large_as_asked_for(tree: Path, tmp_path: Path) -> None:
    """Headers, padding and maps included, which are most of it where pictures are small."""
    assert run(tree, tmp_path / "out") == 0
    sizes = [shard.bytes for shard in ShardIndex.load(tmp_path / "out").shards]
    assert len(sizes) > 3 and 13_000 < min(sizes) and max(sizes) < 24_000
    maps = published_maps(tree, tmp_path / "maps", rows=60)
    assert run(tree, tmp_path / "mapped", "--maps", maps) == 0
    assert max(shard.bytes for shard in ShardIndex.load(tmp_path / "mapped").shards) < 24_000


def test_notes_are_the_same_for_every_run(tree: Path, tmp_path: Path) -> None:
    """With files of every broken kind, names that are not UTF-8, and any number of processes."""
    for number, data in enumerate((b"<html>", b"", picture(1)[:300], b"\x89PNG\r\n\x1a\n" + bytes(30), b"GIF89a")):
        (tree / "n01" / f"broken{number}.png").write_bytes(data)
    (tree / "n02" / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"broken")
    (tree / "n02" / os.fsdecode(b"na\xefve.jpg")).write_bytes(picture(5))
    (tree / "n03" / "gone.jpg").symlink_to(tree / "nowhere")
    (tree / "__MACOSX").mkdir()
    (tree / "montage.jpg").write_bytes(picture(6))
    assert run(tree, tmp_path / "one") == run(tree, tmp_path / "two", "--processes", 2) == 0
    assert digest(tmp_path / "one") == digest(tmp_path / "two")
    assert ShardIndex.load(tmp_path / "one").count == 41
    notes = (tmp_path / "one" / NOTES_NAME).read_text().splitlines()
    assert "left out: n02/caf\\xe9.jpg: not an image in a format that is known" in notes
    assert "ignored: n03/gone.jpg: a link to nothing" in notes
    assert "ignored: __MACOSX/: left behind by macOS" in notes
    assert "ignored: montage.jpg: an image in no class folder" in notes


def test_class_without_a_sample_is_named_loudly(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tree / "n04").mkdir()
    (tree / "n04" / "broken.jpg").write_bytes(b"broken")
    assert run(tree, tmp_path / "out") == 0
    assert capsys.readouterr().err == "warning: 1 class without a sample: n04\n"


def test_where_no_image_can_be_read_the_notes_say_why(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    notes = tmp_path / "out.partial" / NOTES_NAME
    assert f"not one image can be read; see {notes}" in refusal(
        capsys, tree, tmp_path / "out", "--max-megapixels", 0.0001
    )
    assert notes.read_text().count("left out: ") == 40 and not (tmp_path / "out").exists()


def test_image_above_the_limit_of_pixels_is_left_out_whatever_its_format(tree: Path, tmp_path: Path) -> None:
    for kind in ("JPEG", "PNG"):
        (tree / "n01" / f"large.{kind}").write_bytes(picture(1, kind=kind, size=(120, 100)))
    assert run(tree, tmp_path / "out", "--max-megapixels", 0.01) == 0
    notes = (tmp_path / "out" / NOTES_NAME).read_text().splitlines()
    assert sorted(note.split(":")[1].strip() for note in notes) == ["n01/large.JPEG", "n01/large.PNG"]
    assert all(note.endswith(": 120×100 pixels, more than 0.01 megapixels") for note in notes)
    assert verify([str(tmp_path / "out"), "--processes", "1", "--max-megapixels", "0.01"]) == 0
    assert verify([str(tmp_path / "out"), "--processes", "1", "--max-megapixels", "0.0001"]) == 1


def test_labels_follow_the_classes_of_another_set(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A validation set that lacks a class keeps the numbers of the others."""
    assert run(tree, tmp_path / "train") == 0
    shutil.rmtree(tree / "n02")
    assert run(tree, tmp_path / "val", "--like", tmp_path / "train") == 0
    index = ShardIndex.load(tmp_path / "val")
    assert index.classes == ["n01", "n02", "n03"] and set(index.members["label"].tolist()) == {0, 2}
    assert "warning: 1 class without a sample: n02" in capsys.readouterr().err
    (tree / "n03").rename(tree / "n05")
    assert "class n05, which is not in" in refusal(capsys, tree, tmp_path / "other", "--like", tmp_path / "train")


def test_options_that_nothing_would_read_are_refused(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "classes.txt").write_text("n01\nn02\nn03\n")
    message = refusal(capsys, tree, tmp_path / "out", "--classes", tmp_path / "classes.txt")
    assert "--classes: not used, class folders name the classes" in message
    assert "--count-from: not used" in refusal(capsys, tree, tmp_path / "out", "--count-from", 1)
    assert "--label-column: not used" in refusal(capsys, tree, tmp_path / "out", "--label-column", "label")
    assert not list(tmp_path.glob("out*"))


def test_seed_decides_the_order(tree: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        assert run(tree, tmp_path / name, "--seed", seed) == 0
    one, other = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert one != other and sorted(one) == sorted(other)
    assert [name for _, name in one] != sorted(name for _, name in one)


def test_run_killed_at_any_change_of_the_disk_goes_on_to_the_same_bytes(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before every folder, fsync, rename and removal in turn; the target never shows before it is whole."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # takes most of the time; a kill loses nothing without
    out, arguments = tmp_path / "out", [tree, tmp_path / "out", "--shard-mb", 0.05]
    assert run(tree, tmp_path / "whole", "--shard-mb", 0.05) == 0
    whole = digest(tmp_path / "whole")
    for operation in itertools.count():
        if not killed_before(operation, lambda: run(*arguments)):
            break
        if out.exists():
            assert digest(out) == whole
        else:
            assert run(*arguments) == 0 and digest(out) == whole
        assert not out.with_name("out.partial").exists()
        shutil.rmtree(out)
    assert operation > 3 + 4 * len(ShardIndex.load(out).shards) and digest(out) == whole


def test_run_killed_outright_in_the_middle_goes_on_and_does_nothing_twice(tree: Path, tmp_path: Path) -> None:
    """All its processes at once, a shard finished and others half-written."""
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    arguments = [tree, out, "--shard-mb", 0.01, "--processes", 2]
    process = start_and_wait_until_it_writes("data_tools.shard", arguments, out)
    kill_all_of(process)
    assert half_written(partial) and not out.exists()
    with pytest.raises(DataError, match="not finished"):
        ShardIndex.load(out)
    done = finished_shards(partial)
    assert run(tree, tmp_path / "whole", "--shard-mb", 0.01) == 0
    whole = digest(tmp_path / "whole")
    assert {name: digest(partial)[name] for name in done} == {name: whole[name] for name in done}
    assert 0 < len(done) < len(ShardIndex.load(tmp_path / "whole").shards)
    kept = {name: done[name] for name in done if (partial / f"{name}.json").exists()}
    assert run(*arguments) == 0
    assert digest(out) == whole and not partial.exists()
    assert kept and kept.items() <= finished_shards(out).items()


def test_processes_end_with_the_one_that_began_them(tree: Path, tmp_path: Path) -> None:
    """Orphans would hold the folder for ever, and the command could not be repeated."""
    arguments = [tree, tmp_path / "out", "--shard-mb", 0.01, "--processes", 2]
    process = start_and_wait_until_it_writes("data_tools.shard", arguments, tmp_path / "out")
    children = children_of(process.pid)
    assert len(children) >= 2
    process.kill()
    process.wait()
    deadline = time.monotonic() + 120
    while any(alive(child) for child in children):
        assert time.monotonic() < deadline, "its processes go on without it"
        time.sleep(0.01)
    assert run(*arguments) == 0


def alive(process: int) -> bool:
    """Whether a process runs; one that has ended and not been buried yet does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize(
    "said", ["error: interrupted; run the same command again", "error: a worker process was killed"]
)
def test_stopped_command_says_so_in_one_sentence_and_goes_on(
    said: str, tree: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C reaches every process, and one answers, at once; a kill may meet a single one."""
    arguments = [tree, tmp_path / "out", "--shard-mb", 0.01, "--processes", 2]
    process = start_and_wait_until_it_writes("data_tools.shard", arguments, tmp_path / "out")
    if "interrupted" in said:
        os.killpg(process.pid, signal.SIGINT)
    else:
        os.kill(children_of(process.pid)[0], signal.SIGKILL)
    assert process.wait(timeout=30) == 2
    told = capfd.readouterr().err
    assert said in told and "Traceback" not in told
    assert run(*arguments) == 0


def test_run_begun_from_other_files_is_not_mixed_in(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / INPUTS_NAME).write_text("{}")
    assert "started from other files" in refusal(capsys, tree, tmp_path / "out")


def test_two_runs_do_not_write_one_set(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out.partial").mkdir()
    with subprocess.Popen(["flock", str(tmp_path / "out.partial"), "sleep", "20"]) as other:
        try:
            time.sleep(0.3)
            assert "another process" in refusal(capsys, tree, tmp_path / "out")
        finally:
            other.kill()


def test_unusual_files_are_kept_and_broken_ones_left_out_and_both_are_listed(tree: Path, tmp_path: Path) -> None:
    """Grey, CMYK, a PNG under a JPEG's name; cut off, empty, text; and a file that is no image by its name."""
    good = picture(1, size=(64, 48))
    strange = {
        "grey.JPEG": picture(1, mode="L"),
        "cmyk.JPEG": picture(2, mode="CMYK"),
        "really_png.JPEG": picture(3, kind="PNG"),
        "trailing.JPEG": good + bytes(9),
        "cut.JPEG": good[: len(good) * 2 // 3],
        "empty.JPEG": b"",
        "text.JPEG": b"<html>404</html>",
        "readme.txt": b"hello",
    }
    for name, data in strange.items():
        (tree / "n01" / name).write_bytes(data)
    assert run(tree, tmp_path / "out") == 0
    notes = (tmp_path / "out" / NOTES_NAME).read_text().splitlines()
    said = {note.split(": ")[1].rpartition("/")[2]: note for note in notes}
    assert set(said) == set(strange) - {"trailing.JPEG"}
    assert {name for name, note in said.items() if note.startswith("left out")} == {
        "cut.JPEG",
        "empty.JPEG",
        "text.JPEG",
    }
    assert "named .jpeg, is a png" in said["really_png.JPEG"]
    assert "CMYK" in said["cmyk.JPEG"] and "Gray" in said["grey.JPEG"]
    assert ShardIndex.load(tmp_path / "out").count == 40 + 4
    assert verify([str(tmp_path / "out"), "--processes", "1"]) == 0
    reader = SampleReader(ShardIndex.load(tmp_path / "out"))
    assert all(decode_image(reader.read(number)).shape[2] == 3 for number in range(44))


def test_decode_finds_what_a_quick_look_cannot(tree: Path, tmp_path: Path) -> None:
    """Pixels missing in the middle, though the end is there."""
    whole = picture(1, size=(200, 150))
    (tree / "n01" / "hollow.JPEG").write_bytes(whole[: len(whole) // 2] + whole[-2:])
    assert run(tree, tmp_path / "out", "--decode") == 0
    (note,) = (tmp_path / "out" / NOTES_NAME).read_text().splitlines()
    assert note.startswith("kept: n01/hollow.JPEG: damaged, though it decodes")


def test_same_file_names_in_different_classes_keep_keys_unique(tree: Path, tmp_path: Path) -> None:
    for name in ("n01", "n02"):
        (tree / name / "same.name.with.dots.JPEG").write_bytes(picture(7))
    assert run(tree, tmp_path / "out") == 0
    assert verify([str(tmp_path / "out"), "--processes", "1"]) == 0


def test_flat_files_with_a_label_list(tree: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    classes = []
    for path in sorted(tree.rglob("*.JPEG")):
        shutil.copy(path, flat)
        classes.append((path.name, path.parent.name))
    pairs, numbers, synsets = tmp_path / "pairs.txt", tmp_path / "numbers.txt", tmp_path / "synsets.txt"
    pairs.write_text("".join(f"{name} {label}\n" for name, label in classes))
    numbers.write_text("".join(f"{int(label[1:])}\n" for _, label in classes))
    synsets.write_text("n01\nn02\nn03\n")
    assert run(tree, tmp_path / "tree") == 0
    assert run(flat, tmp_path / "a", "--labels", pairs) == 0
    assert run(flat, tmp_path / "b", "--labels", numbers, "--classes", synsets) == 0
    assert sorted(contents(tmp_path / "a")) == sorted(contents(tmp_path / "b")) == sorted(contents(tmp_path / "tree"))


def test_published_maps_ride_beside_their_images(tree: Path, tmp_path: Path) -> None:
    maps = published_maps(tree, tmp_path / "maps")
    assert (
        run(tree, tmp_path / "out", "--maps", maps)
        == run(tree, tmp_path / "two", "--maps", maps, "--processes", 2)
        == 0
    )
    assert digest(tmp_path / "out") == digest(tmp_path / "two")
    index = ShardIndex.load(tmp_path / "out")
    assert index.maps is not None and (index.maps.k, index.maps.rows, index.maps.columns) == (2, 4, 5)
    reader = SampleReader(index)
    files = {path.read_bytes(): number for number, path in enumerate(sorted(tree.rglob("*.JPEG")))}
    for number in range(index.count):
        raw = reader.read(number)
        score_map = decode(raw.score_map, raw.location)
        assert score_map.values_Khw.max() == files[bytes(raw.image)]
        assert score_map.label == raw.label == score_map.classes_Khw[0, 0, 0]
    assert verify([str(tmp_path / "out"), "--processes", "1"]) == 0


@pytest.mark.parametrize(
    "where, says", [("maps/n01/n01_3.pt", "1 of 40 images have no map"), ("images/n01/n01_3.JPEG", "has no image")]
)
def test_image_without_map_or_map_without_image_is_told_before_anything_is_written(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], where: str, says: str
) -> None:
    maps = published_maps(tree, tmp_path / "maps")
    (tmp_path / where).unlink()
    message = refusal(capsys, tree, tmp_path / "out", "--maps", maps)
    assert says in message and "n01_3.pt" in message
    assert not list(tmp_path.glob("out*"))


def test_map_of_another_grid_is_refused(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    maps = published_maps(tree, tmp_path / "maps")
    other = published_maps(tree, tmp_path / "other", rows=6)
    shutil.copy(other / "n02" / "n02_5.pt", maps / "n02" / "n02_5.pt")
    message = refusal(capsys, tree, tmp_path / "out", "--maps", maps)
    assert "n02_5.pt" in message and "all must be alike" in message
    assert not (tmp_path / "out").exists()


def test_refusals(tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no such folder" in refusal(capsys, tmp_path / "absent", tmp_path / "out")
    assert "no class folders" in refusal(capsys, tree / "n01", tmp_path / "out")
    assert "already exists" in refusal(capsys, tree, tree)
    assert "lies in" in refusal(capsys, tree, tree / "out")
    (tmp_path / "all.tar").write_bytes(b"")
    assert "index it with shard.py index" in refusal(capsys, tmp_path / "all.tar", tmp_path / "out")
    (tmp_path / "wds").mkdir()
    (tmp_path / "wds" / "0.tar").write_bytes(b"")
    assert "holds tars; index them with shard.py index" in refusal(capsys, tmp_path / "wds", tmp_path / "out")
    (tmp_path / "wds" / "index.json").write_text("{}")
    assert "is a shard set already" in refusal(capsys, tmp_path / "wds", tmp_path / "out")
    (tree / "n04").mkdir()
    assert "n04: no images" in refusal(capsys, tree, tmp_path / "out")
    assert "cannot be read" in refusal(capsys, tree, tmp_path / "out", "--labels", tmp_path / "absent.txt")
    labels = tmp_path / "labels.txt"
    labels.write_text("a.JPEG n01\n")
    assert "names a.JPEG, which is not among" in refusal(capsys, tree / "n01", tmp_path / "out", "--labels", labels)
    assert not list(tmp_path.glob("out*"))


def test_full_disk_is_one_sentence_and_leaves_no_set(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    assert "no room left" in refusal(capsys, tree, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_disk_that_is_really_full_is_one_sentence_and_the_command_goes_on_when_there_is_room(
    tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every number of bytes and of files from none to enough, so that each write is once the one that fails."""
    arguments = [tree, tmp_path / "disk" / "out", "--shard-mb", 0.05]
    assert run(tree, tmp_path / "whole", "--shard-mb", 0.05) == 0
    whole = digest(tmp_path / "whole")

    def fill(disk: SmallDisk) -> None:
        out, refused = disk.folder / "out", 0
        for room in [{"size": 4096 * n} for n in range(1, 40)] + [{"files": n} for n in range(1, 20)]:
            disk.resize(**room)
            if code := run(*arguments):
                told = capsys.readouterr().err
                assert code == 2 and "no room left on its disk" in told and told.count("\n") == 1
                assert not out.exists() and not list(disk.folder.rglob("*.tmp"))
                refused += 1
                disk.resize()
                assert run(*arguments) == 0
            assert digest(out) == whole
            disk.resize()
            shutil.rmtree(out)
        assert 20 < refused < 55

    on_small_disk(tmp_path / "disk", fill)


def test_command_explains_itself() -> None:
    told = subprocess.run([sys.executable, COMMAND, "--help"], capture_output=True, text=True, check=True, timeout=60)
    assert "--shard-mb" in told.stdout and "ground_truth" in told.stdout
