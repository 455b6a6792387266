"""What may take minutes is no alarm, wherever in a run it comes; in an ordinary step it is one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from subprocess import CompletedProcess

from refiner_ds.config import load
from refiner_ds.data.locate import open_index
from refiner_ds.data.sampler import TrainSampler
from refiner_ds.run_folder import RunFolder, read_state
from tests.training.launched import ROOT, environment, ranks
from tests.training.test_resume import arguments

SCRIPT = Path(__file__).with_name("patience_script.py")
SAVES, POISONED, EVALUATES, STANDS_STILL = 3, 5, 14, 32  # steps
# A sample of step 5 breaks the loss, and the run goes back to step 3; steps 7 and 8 are profiled; an epoch is 30 steps.
RUN = {
    "refiner.recipe.epochs": 2, "refiner.run.checkpoint_epochs": SAVES / 30, "refiner.run.eval_epochs": EVALUATES / 30,
    "refiner.run.picture_epochs": 0.5, "refiner.run.on_divergence": "rollback", "refiner.run.profile_steps": [7, 8],
    "refiner.run.hang_seconds": 30, "refiner.run.timeout_minutes": 30, "refiner.data.workers": 0,
    "refiner.data.eval_batch": 64,
}  # fmt: skip


def poisoned_sample() -> int:
    run = load(None, [])
    count, batch = open_index(run.refiner.data.train, run.refiner.data.cache).count, run.batch(1)
    sampler = TrainSampler(count, batch.global_batch, batch.micro_batch, 0, 1, run.refiner.run.seed)
    return int(sampler[POISONED - 1].samples_B[0])


def train(folder: Path, place: str, step: int) -> tuple[CompletedProcess[str], Counter[str]]:
    """The run in one process, and how often each thing took ten minutes."""
    env = environment(REFINER_POISON=f"sample:{poisoned_sample()}")
    env["PYTHONPATH"] = f"{ROOT / 'tests' / 'drill' / 'poison'}:{ROOT}"
    report = folder / f"{place}.txt"
    done = ranks(SCRIPT, report, place, step, *arguments(folder, **RUN), processes=1, env=env)
    return done, Counter(report.read_text().splitlines())


def test_what_may_take_minutes_is_no_alarm_and_an_ordinary_step_that_does_is_one(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "quickstart")
    done, first = train(tmp_path, "evaluation", EVALUATES)  # stopped in its first evaluation, and saved then
    assert done.returncode == 75 and "asked to stop: saved step 14" in done.stdout, done.stdout + done.stderr[-3000:]
    assert first["start"] == 1 and first["load"] == 2  # the run went back twice: the sample broke the loss again
    assert first["first batch"] == 3 and first["first step"] == 2 + 2 + 1, first  # step 5 is left out at last
    assert first["save"] == 5 and first["end of a save"] > 5 and first["profile"] == 1, first
    done, second = train(tmp_path, "forward", STANDS_STILL)
    said = done.stderr
    assert done.returncode == 75 and said.count("error: no progress for ") == 1, done.stdout + said[-3000:]
    assert "step 32, forward) is stuck there" in said, said
    assert second["load"] == 1 and second["first batch"] == 2, second  # of this start, and of the second epoch
    assert second["weights to evaluate"] >= 2 and second["picture"] >= 2, second
    assert second["first batches of an evaluation"] == 8, second  # of the weights and their EMA, twice
    assert (state := run.latest_checkpoint()) is not None and read_state(state).step == 30
