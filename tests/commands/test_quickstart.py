"""What the README promises of its first command: it learns real data in minutes and leaves a run folder as designed.

One run of the command, of a third of its epochs, serves every test here; one of all is among the long tests.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from refiner_ds.checkpoint.files import integrity_errors, read_classes
from refiner_ds.data.index import ShardIndex
from refiner_ds.plan import __main__ as plan
from refiner_ds.run_folder import RunFolder
from refiner_ds.training.metrics import read_metrics
from tests.training.launched import ROOT, environment, ranks, run

BIN = Path(sys.executable).parent
TRAIN = ROOT / "refiner_ds" / "train.py"
SHORT = ("--set", "refiner.recipe.epochs=4", "--set", "refiner.run.checkpoint_epochs=1")
STEPS, LONG_STEPS = 150, 390  # with the epoch that cools down


class Quickstart:
    """The finished command and where it ran."""

    def __init__(self, place: Path, *words: str) -> None:
        self.place = place
        # A user's shell: no PYTHONPATH, no thread count; only the caches are kept apart.
        self.env = {
            name: value for name, value in environment().items() if name not in ("PYTHONPATH", "OMP_NUM_THREADS")
        }
        self.env |= {"REFINER_DS_CACHE": str(place / "cache"), "PATH": f"{BIN}:{os.environ['PATH']}"}
        self.shared_memory_before = set(os.listdir("/dev/shm"))
        self.done = self.type("deepspeed", TRAIN, *words, timeout=400)
        self.shared_memory_made = set(os.listdir("/dev/shm")) - self.shared_memory_before
        self.folder = place / "runs" / "quickstart"

    def type(self, *command: str | Path, timeout: float = 120) -> subprocess.CompletedProcess:
        return run(*command, cwd=self.place, env=self.env, timeout=timeout)


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Quickstart:
    return Quickstart(tmp_path_factory.mktemp("quickstart"), *SHORT)


pytestmark = pytest.mark.timeout(500)


def assert_has_learnt(quickstart: Quickstart, percent: float) -> None:
    assert quickstart.done.returncode == 0, quickstart.done.stdout[-2000:] + quickstart.done.stderr[-4000:]
    last = {line["weights"]: line for line in read_metrics(quickstart.folder, "eval")}
    assert last["ema"]["top1"] >= percent and last["model"]["top1"] >= percent
    held_out = ShardIndex.load(quickstart.place / "cache" / "digits-v1" / "val").count
    assert held_out >= 1797 / 5


@pytest.mark.long
def test_the_plain_command_learns_digits_to_97_percent(tmp_path: Path) -> None:
    plain = Quickstart(tmp_path)
    assert_has_learnt(plain, 97)
    assert f"step {LONG_STEPS}/{LONG_STEPS}" in plain.done.stdout


def test_it_learns_digits_to_90_percent_in_a_third_of_its_epochs(quickstart: Quickstart) -> None:
    assert_has_learnt(quickstart, 90)


def test_it_says_what_it_does_and_what_to_type_next(quickstart: Quickstart) -> None:
    out = quickstart.done.stdout
    assert "2 processes on" in out
    told = [line for line in out.splitlines() if line.startswith("epoch") and "images/s" in line and "left" in line]
    assert len(told) == STEPS // 10
    for hint in ("tensorboard --logdir", "evaluate.py", "run folder", "go on"):
        assert hint in out
    about = ("model", "batch", "engine", "attention", "training", "validation", "steps", "run folder")
    assert all(any(line.startswith(word) for line in out.splitlines()) for word in about)
    ours = (*about, "after 50 steps", "epoch", "finished", "watch", "evaluate", "go on")
    strangers = [line for line in out.splitlines() if line and not line.startswith(ours) and "[INFO]" not in line]
    assert len(strangers) <= 3, strangers
    assert "Warning" not in quickstart.done.stderr


def test_the_run_folder_is_as_designed(quickstart: Quickstart) -> None:
    folder = quickstart.folder
    for name in (
        "config.json",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "latest",
        "logs/rank_0.log",
        "logs/rank_1.log",
    ):
        assert (folder / name).exists(), name
    config = json.loads((folder / "config.json").read_text())
    assert config["refiner"]["recipe"]["lr"] == 3e-3 and config["zero_optimization"] == {"stage": 1}
    newest = RunFolder(folder).latest_checkpoint()
    assert not integrity_errors(newest)
    run_keys = config["refiner"]["run"]
    assert 0 <= len(list((folder / "checkpoints").iterdir())) - run_keys["keep_checkpoints"] <= run_keys["keep_best"]
    assert read_classes(newest) == [str(digit) for digit in range(10)]
    keys = {"kind", "step", "epoch", "samples", "time", "loss", "loss_cls", "loss_patch", "lr", "grad_norm"}
    keys |= {"images_per_second", "step_seconds", "data_wait_seconds", "peak_memory_gib", "mfu", "skipped_steps"}
    for line in read_metrics(folder, "train"):
        assert set(line) == keys | {"bad_samples", "checkpoint_seconds"}
        assert line["samples"] == 48 * line["step"] and line["grad_norm"] > 0


def test_tensorboard_holds_the_same_numbers_and_a_picture(quickstart: Quickstart) -> None:
    events = EventAccumulator(str(quickstart.folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    for name in ("loss", "loss_cls", "loss_patch", "lr", "grad_norm", "images_per_second", "peak_memory_gib"):
        drawn = [(point.step, pytest.approx(point.value, rel=1e-5)) for point in events.Scalars(f"train/{name}")]
        assert drawn == [(line["step"], line[name]) for line in read_metrics(quickstart.folder, "train")]
    drawn = [point.value for point in events.Scalars("eval/ema/top1")]
    wanted = [line["top1"] for line in read_metrics(quickstart.folder, "eval") if line["weights"] == "ema"]
    assert drawn == pytest.approx(wanted, rel=1e-5)
    pictures = events.Images("attention")
    assert pictures and pictures[-1].width > 300 and len(pictures[-1].encoded_image_string) > 3000


def test_the_same_command_again_says_that_the_run_is_complete(quickstart: Quickstart) -> None:
    before = sorted(quickstart.folder.rglob("*"))
    again = ranks(TRAIN, *SHORT, cwd=quickstart.place, env=quickstart.env)
    assert again.returncode == 0
    assert f"quickstart is complete: {STEPS} steps, top-1" in again.stdout
    assert "--set refiner.run.name=" in again.stdout
    assert sorted(quickstart.folder.rglob("*")) == before


def test_its_plan_goes_by_the_steps_that_it_has_measured(
    quickstart: Quickstart, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFINER_DS_CACHE", quickstart.env["REFINER_DS_CACHE"])
    (start,) = (json.loads(line) for line in RunFolder(quickstart.folder).history.read_text().splitlines())
    assert plan.main(["--gpu", "cpu", "--gpus-per-node", str(start["world_size"]), *SHORT, "--json"]) == 0
    step = json.loads(capsys.readouterr().out)["step"]
    logged = [line["step_seconds"] for line in read_metrics(quickstart.folder, "train")]
    assert step["basis"] == "measured" and step["measured"]["exact"] and step["measured"]["same_code"]
    assert 0.2 * min(logged) < step["seconds"] < 5 * max(logged)  # a median of steps, and means of intervals
    assert 0 <= step["measured"]["data_wait_seconds"] < step["seconds"]


@pytest.mark.parametrize("processes", [1, 3])
def test_evaluation_is_exact_to_the_image_for_any_number_of_processes(quickstart: Quickstart, processes: int) -> None:
    evaluate = (ROOT / "refiner_ds" / "evaluate.py", quickstart.folder, "--json", "--batch", "50")
    done = ranks(*evaluate, processes=processes, cwd=quickstart.place, env=quickstart.env)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    last = [line for line in read_metrics(quickstart.folder, "eval") if line["weights"] == "ema"][-1]
    assert found["images"] == ShardIndex.load(quickstart.place / "cache" / "digits-v1" / "val").count
    assert found["top1"] == last["top1"] == pytest.approx(100 * found["right1"] / found["images"])
    assert found["loss"] == pytest.approx(last["loss"], rel=1e-4)


def test_nothing_is_left_behind_in_shared_memory(quickstart: Quickstart) -> None:
    # Tests beside this one make segments too: theirs go when they end, or are in use.
    for _ in range(60):
        left = quickstart.shared_memory_made & set(os.listdir("/dev/shm"))
        maps = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                maps.append((process / "maps").read_text())
        left = {name for name in left if not any(f"/dev/shm/{name}" in text for text in maps)}
        if not left:
            break
        time.sleep(1)
    assert not left


def test_a_checkpoint_folder_can_be_evaluated_on_its_own(quickstart: Quickstart, tmp_path: Path) -> None:
    newest = RunFolder(quickstart.folder).latest_checkpoint()
    shutil.copytree(newest, tmp_path / "mine")
    done = quickstart.type(BIN / "python", ROOT / "refiner_ds" / "evaluate.py", tmp_path / "mine", "--weights", "model")
    assert done.returncode == 0 and f"last weights of step {STEPS}" in done.stdout, done.stderr


def test_analysis_of_the_run_writes_tables_and_pictures(quickstart: Quickstart, tmp_path: Path) -> None:
    commands = {
        "features": ("features.csv", "features.png"),
        "maps": ("maps.csv", "maps.png", "maps_quickstart.png"),
        "weights": ("refiner_weights.csv", "refiner_weights.png", "kernels.png"),
    }
    for command, files in commands.items():
        limit = ("--all-steps",) if command == "weights" else ("--images", "40")
        script = ("-m", "refiner_ds.analysis", command, quickstart.folder, *limit, "--out", tmp_path)
        done = ranks(*script, processes=1, env=environment(REFINER_DS_CACHE=quickstart.env["REFINER_DS_CACHE"]))
        assert done.returncode == 0, done.stderr
        assert all((tmp_path / file).stat().st_size > 100 for file in files)
    rows = (tmp_path / "features.csv").read_text().splitlines()
    assert len(rows) == 1 + 4 and rows[-1].split(",")[3:6] == ["1", rows[-1].split(",")[4], "40"]
    checkpoints = len(list((quickstart.folder / "checkpoints").iterdir()))  # of two refining blocks
    assert len((tmp_path / "refiner_weights.csv").read_text().splitlines()) == 1 + 2 * checkpoints


def test_an_export_is_the_checkpoint_with_its_class_names(quickstart: Quickstart, tmp_path: Path) -> None:
    env = environment(REFINER_DS_CACHE=quickstart.env["REFINER_DS_CACHE"])
    for _ in range(2):  # an export takes the place of the one before
        done = ranks("-m", "refiner_ds.export", quickstart.folder, processes=1, env=env)
        assert done.returncode == 0, done.stderr
    place = quickstart.folder / "export"
    config = json.loads((place / "config.json").read_text())
    assert config["label_names"] == [str(digit) for digit in range(10)]
    assert config["pretrained_cfg"]["input_size"] == [3, 28, 28] and config["pretrained_cfg"]["crop_pct"] == 1.0
    program = tmp_path / "compare.py"
    program.write_text("""
import sys, timm, torch, refiner_ds.models
from pathlib import Path
from refiner_ds.checkpoint.files import find_checkpoint, read_weights
exported = timm.create_model(f"local-dir:{sys.argv[1]}/export", pretrained=True).eval()
saved = timm.create_model(f"local-dir:{sys.argv[1]}/export", pretrained=False).eval()
saved.load_state_dict(read_weights(find_checkpoint(Path(sys.argv[1])), "ema"))
images = torch.rand(4, 3, 28, 28)
assert torch.equal(exported(images), saved(images))
""")
    done = ranks(program, quickstart.folder, processes=1, env=env)
    assert done.returncode == 0, done.stderr
    done = ranks("-m", "refiner_ds.export", quickstart.folder, "--out", quickstart.place, processes=1, env=env)
    assert done.returncode == 2 and "exists and is no export" in done.stderr and done.stderr.count("\n") == 1
