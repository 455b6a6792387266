"""Every way of starting a run works, and what cannot be meant is refused in one sentence with nothing written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from refiner_ds.run_folder import RunFolder, read_state
from refiner_ds.train import main
from refiner_ds.training.metrics import read_metrics
from tests.training.launched import ROOT, environment, ranks, run
from tests.training.test_resume import arguments

BIN = Path(sys.executable).parent
SHORT = {"refiner.recipe.epochs": 0.2, "refiner.recipe.warmup_epochs": 0, "refiner.data.val": None}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


WAYS = {
    "python": (["python", "-X", "importtime", "refiner_ds/train.py"], 1),
    "torchrun": (["torchrun", "--standalone", "--nproc_per_node", "2", "refiner_ds/train.py"], 2),
    "deepspeed module": (["deepspeed", "--master_port", "29600", "--module", "refiner_ds.train"], 2),
    "deepspeed count": (
        ["deepspeed", "--master_port", "29600", "--num_accelerators", "2", "refiner_ds/train.py"],
        2,
    ),
}
LONG = {"deepspeed count"}  # training/test_launchers.py starts runs like that, too


def assert_has_trained(done: subprocess.CompletedProcess[str], folder: Path, processes: int) -> None:
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    state = read_state(RunFolder(folder).latest_checkpoint())
    assert (state.world_size, state.step) == (processes, 6)
    assert read_metrics(folder, "train")[-1]["step"] == 6


@pytest.mark.parametrize("way", [pytest.param(way, marks=[pytest.mark.long] if way in LONG else []) for way in WAYS])
def test_every_way_of_starting_trains_with_its_number_of_processes(way: str, cache: str, tmp_path: Path) -> None:
    command, processes = WAYS[way]
    env = environment(REFINER_DS_CACHE=cache, PATH=f"{BIN}:{os.environ['PATH']}")
    done = run(*command, *arguments(tmp_path, **SHORT), env=env)
    assert_has_trained(done, tmp_path / "quickstart", processes)
    if "importtime" in command:  # what compiles nothing does not wait for a compiler to load
        assert "refiner_ds.training.engine" in done.stderr and "torch._inductor.compile_fx" not in done.stderr


def test_the_module_trains_as_the_script_does(cache: str, tmp_path: Path) -> None:
    done = ranks(
        "-m", "refiner_ds.train", *arguments(tmp_path, **SHORT), processes=1, env=environment(REFINER_DS_CACHE=cache)
    )
    assert_has_trained(done, tmp_path / "quickstart", 1)


@pytest.fixture
def train(cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """The command in this process, in a work folder of its own: (arguments) → exit code, output, errors, folder."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("REFINER_DS_CACHE", cache)

    def command(*more: str) -> tuple[int, str, str, Path]:
        code = main(list(more))
        said = capsys.readouterr()
        return code, said.out, said.err.strip(), work

    return command


def broken_data(folder: Path) -> dict[str, tuple[list[str], str]]:
    """Refusals by what the user did: arguments, and what the sentence has to hold."""
    empty = folder / "empty"
    empty.mkdir()
    bare = folder / "bare"
    bare.mkdir()
    (bare / "train-000000.tar").write_bytes(b"\0" * 10240)
    file = folder / "a_file"
    file.write_text("")
    mine = folder / "mine.json"
    mine.write_text(json.dumps({"refiner": {"data": {"train": "package:digits/train"}, "recipe": {"epoch": 3}}}))
    return {
        "misspelt key": (["--config", str(mine)], f"{mine}: refiner.recipe.epoch is not a key; did you mean epochs?"),
        "wrong type": (["--set", "train_batch_size=many"], 'train_batch_size is "many"; it must be a whole number'),
        "no such file": (["--config", str(folder / "mien.json")], "did you mean"),
        "batch": (["--set", "train_micro_batch_size_per_gpu=36"], "does not divide over 1 process × 36"),
        "missing folder": (["--set", f"refiner.data.train={folder}/no"], f"{folder}/no: no such folder"),
        "empty folder": (["--set", f"refiner.data.train={empty}"], f"{empty}: "),
        "no index": (["--set", f"refiner.data.train={bare}"], "index"),
        "unwritable": (["--set", f"refiner.run.output={file}"], f"({file}: not a directory)"),
        "model name": (["--set", "refiner.model.name=refiner_vit_x"], "did you mean refiner_vit_"),
        "another model": (["--set", "refiner.model.name=resnet18"], "refiner.model"),
        "patch": (["--set", "refiner.model.img_size=30"], "refiner.model: "),
        "no patch head": (
            ["--set", "refiner.model={}", "--config", str(deit(folder))],
            'deit_tiny_patch16_224 has no patch head to train on token labels; for a plain ViT take refined_vit',
        ),
    }  # fmt: skip


def deit(folder: Path) -> Path:
    file = folder / "deit.json"
    keys = {"model": {"name": "deit_tiny_patch16_224", "num_classes": 10}, "data": {"train": "package:digits/train"}}
    file.write_text(json.dumps({"refiner": keys, "train_batch_size": 4}))
    return file


def test_bad_input_is_one_sentence_exit_code_2_and_nothing_written(train, tmp_path: Path) -> None:
    for what, (more, sentence) in broken_data(tmp_path).items():
        code, _, said, work = train(*more)
        assert code == 2, (what, said)
        assert said.startswith("error: ") and "\n" not in said and sentence in said, (what, said)
        assert not list(work.iterdir()), what


def test_a_refusal_is_all_a_user_sees(cache: str, tmp_path: Path) -> None:
    command = [BIN / "python", ROOT / "refiner_ds" / "train.py", "--set", "refiner.model.name=refiner_vit_x"]
    done = run(*command, env=environment(REFINER_DS_CACHE=cache), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: "), done.stderr
    assert not list(tmp_path.iterdir())


def test_another_run_under_the_same_name_is_refused(train, tmp_path: Path) -> None:
    folder = tmp_path / "work" / "runs" / "quickstart"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"refiner": {"run": {"seed": 1}}, "train_batch_size": 48}))
    code, _, said, _ = train()
    assert code == 2 and "holds a run with refiner.run.seed 1, not 42" in said


@pytest.mark.parametrize(
    "size, parameters",
    [
        ("s", "25,408,656"),
        pytest.param("m", "55,450,932", marks=pytest.mark.long),
        pytest.param("l", "81,150,192", marks=pytest.mark.long),
    ],
)
def test_check_reckons_the_released_models_without_data_or_gpu(train, size: str, parameters: str) -> None:
    config = ROOT / "ds_configs" / f"refiner_{size}_relabel.json"
    code, out, said, work = train("--config", str(config), "--check", "--world-size", "32")
    assert code == 0, said
    assert f"{parameters} parameters" in out
    assert "1024 images a step = 32 processes × 32 at once × 1 accumulated" in out
    assert "1,252 an epoch of 1,281,167 images" in out
    assert not list(work.iterdir())


def test_print_config_prints_a_run_file(train) -> None:
    _, out, _, _ = train("--print-config", "--set", "refiner.recipe.lr=0.5")
    assert json.loads(out)["refiner"]["recipe"]["lr"] == 0.5
