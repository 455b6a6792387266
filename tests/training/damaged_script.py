"""Train two steps into a run folder, damage what it holds, and resume: forks of one process.

damaged_script.py REPORT       {"run": folder of the two steps, "resumed": {damage: [exit code, what was said]}}
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import matplotlib.pyplot  # noqa: F401  (once, not in every fork)

import refiner_ds.training.session  # noqa: F401
from refiner_ds import train
from refiner_ds.exit_codes import CRASHED
from tests.training.test_resume import arguments

DAMAGES = {
    "a list": lambda content: b"[]", "an object": lambda content: b"{}", "null": lambda content: b"null",
    "a number": lambda content: b"5", "another object": lambda content: b'{"step": "x", "incidents": 1}',
    "nothing": lambda content: b"", "NUL bytes": lambda content: bytes(len(content) or 8),
    "its first half": lambda content: content[: len(content) // 2],
    "not UTF-8": lambda content: b"\xff\xfe\x80" + content,
}  # fmt: skip
RESUMED = ("a list", "another object", "NUL bytes", "its first half")  # a training each
# What a run folder holds that a resumed run can do without, or finds elsewhere.
FILES = (
    "config.json", "history.jsonl", "attention.json", "data.json", "metrics.jsonl", "divergence.json", "complete.json",
    "latest", "lock", "heartbeats/rank_00000.json", "heartbeats/verdict.json",
)  # fmt: skip
KEYS = {
    "refiner.data.workers": 0, "refiner.run.checkpoint_epochs": None, "refiner.run.checkpoint_steps": 1,
    "refiner.run.picture_epochs": None, "refiner.run.on_divergence": "rollback", "train_batch_size": 96,
    "refiner.recipe.warmup_epochs": 0,
}  # fmt: skip
STEPS_AN_EPOCH = 15


def trained(output: Path, steps: int) -> tuple[int, str]:
    """Exit code and words of a training in a process forked from this one: DeepSpeed opens one group a process."""
    said, epochs = output.with_name("said"), (steps + 0.1) / STEPS_AN_EPOCH
    pid = os.fork()
    if pid == 0:
        code = CRASHED
        with said.open("w") as file, redirect_stdout(file), redirect_stderr(file):
            try:
                code = train.main(arguments(output, **{**KEYS, "refiner.recipe.epochs": epochs}))
            except BaseException:
                traceback.print_exc()
        os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return code, said.read_text()


def furnish(run: Path) -> None:
    """What other starts of a run leave behind."""
    incident = {"step": 1, "why": "the loss is nan", "tries": 1, "verdict": "transient", "suspects": []}
    (run / "divergence.json").write_text(json.dumps({"rollbacks": 1, "incidents": [incident]}))
    (run / "lock").write_text(json.dumps({"host": "gone", "pid": 1, "began": "1", "machine": "x", "token": "y"}))
    for name in ("rank_00000.json", "verdict.json"):
        (run / "heartbeats" / name).write_text("{}")


def main() -> None:
    report = Path(sys.argv[1])
    base, work = report.with_name("base"), report.with_name("work")
    code, said = trained(base, 2)
    assert code == 0, said
    furnish(base / "quickstart")
    resumed = {}
    for damage in RESUMED:
        shutil.copytree(base, work)
        for file in (work / "quickstart" / name for name in FILES):
            file.write_bytes(DAMAGES[damage](file.read_bytes()))
        (work / "quickstart" / "heartbeats" / "rank_00001.json").mkdir()
        os.utime(work / "quickstart" / "lock", (1, 1))  # its holder has been silent for long
        resumed[damage] = trained(work, 3)
        if not resumed[damage][0]:
            data = [(place / "quickstart" / "data.json").read_text() for place in (base, work)]
            assert data[0] == data[1], f"{damage}: data.json was not written again"
        shutil.rmtree(work)
    report.write_text(json.dumps({"run": str(base / "quickstart"), "resumed": resumed}))


if __name__ == "__main__":
    main()
