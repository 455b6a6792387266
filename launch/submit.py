"""Submit a run to Slurm, or run it on this machine, as the job it would be.

    python launch/submit.py --nodes 4 --config ds_configs/refiner_s.json --cluster mycluster.yaml
    python launch/submit.py --nodes 4 --gpus-per-node 0 --wait           the quickstart, on the CPUs of four nodes
    python launch/submit.py --local                                      … on this machine
    python launch/submit.py --config ds_configs/refiner_m.json --then ds_configs/refiner_m_384.json     two runs in turn
    python launch/submit.py --config ds_configs/refiner_m.json --then evaluate --then "export --onnx"

The command checks what can be checked, copies the code into the run folder, submits one task per GPU through submitit
and prints where things are. Submitting a run again resumes what its folder holds.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

if not __package__:  # started as a file: its packages are those of the clone it lies in
    sys.path[0], __package__ = str(Path(__file__).resolve().parents[1]), "launch"

from pydantic.fields import FieldInfo

from refiner_ds.command_line import Parser
from refiner_ds.config import RunFile, load
from refiner_ds.errors import LaunchError, report_errors
from refiner_ds.run_folder import RunFolder

from . import chain, checks, local, planned, slurm, submission
from .allocation import Allocation, here, on_slurm
from .attempts import Attempts
from .batch import Executor, submission_environment
from .cluster import ClusterProfile, load_profile
from .commands import Command
from .follow import follow
from .stopwatch import Stopwatch
from .why import why

SOON_SECONDS = 60
FAR_SECONDS = 300 * 86400  # Slurm takes a year for a job that has no time limit
FLAG_TYPES: dict[str, Callable[[str], Any]] = {
    "str | None": str, "str": str, "float | None": float, "int | None": int, "int": int,
    "int | str | None": str, "str | int | None": str, "bool": lambda word: {"true": True, "false": False}[word],
}  # fmt: skip


@report_errors
def main(argv: list[str] | None = None) -> int:
    """Run the command. Exit code: 0, 2 where it refuses, or with ``--wait`` and ``--local`` the job's."""
    watch = Stopwatch()
    watch.lap("starting")
    args = _parser().parse_args(argv)
    profile = load_profile(args.cluster, {key: getattr(args, key) for key in profile_flags()})
    runs = list(
        chain.stages(args.config, args.then, args.set, lambda run, command: allocate(args, profile, run, command))
    )
    for stage in runs:
        allocation = stage.allocation
        allocation.refuse_indivisible()
        what = allocation.batch if allocation.command is None else allocation.command
        print(f"{allocation.run.path}: {allocation}; {what}", file=sys.stderr)
        for line in filter(None, (allocation.resources(), *(f"warning: {text}" for text in allocation.warnings()))):
            print(line, file=sys.stderr)
    watch.lap("run file and cluster")
    if len(runs) > 1:  # a single run is refused where it is complete or has a job; of a chain the rest is submitted
        runs = chain.looked_up(runs)
    missing = [stage for stage in runs if stage.standing.missing]
    jobs = [stage.standing.job for stage in runs if stage.standing.job]
    starts = [check(stage.allocation, stage.check, args.ignore_plan, tell=True, besides=jobs) for stage in missing]
    watch.lap("checks")
    for stage in runs:
        if not stage.standing.missing:
            print(f"{stage.allocation.name}: {stage.standing.words}", flush=True)
    if not missing:
        print("nothing to submit: every job of the chain has finished, waits or runs", flush=True)
    if args.dry_run:
        for stage, start in zip(missing, starts, strict=True):
            _dry_run(stage.allocation, start)
        return 0
    if args.local:
        codes = (_run_here(stage.allocation, watch) for stage in missing)
        return next((code for code in codes if code), 0)
    return _run_on_slurm(runs, jobs, args.wait, watch)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="FILE", help="run file; ds_configs/quickstart.json without")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="override a key of the run file"
    )
    parser.add_argument(
        "--then",
        metavar="NEXT",
        action="append",
        default=[],
        help="run file that follows, from its weights; or evaluate, calibrate or export, with flags; repeatable",
    )
    add_machine_flags(parser)
    parser.add_argument("--local", action="store_true", help="run on this machine, all nodes' processes, and wait")
    parser.add_argument("--wait", action="store_true", help="show the log until the job ends; leave with its exit code")
    parser.add_argument("--dry-run", action="store_true", help="check, and print what would be submitted")
    add_plan_flag(parser)
    return parser


def add_plan_flag(parser: argparse.ArgumentParser) -> None:
    """The flag that overrules the planner."""
    parser.add_argument("--ignore-plan", action="store_true", help="submit a run that the plan says does not fit")


def add_machine_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that say on how many nodes of which cluster a run goes."""
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes (1)")
    parser.add_argument("--min-nodes", type=int, metavar="N", help="nodes it can do with when there are no more")
    site = parser.add_argument_group("the site", "keys of the cluster profile, each of which a flag overrides")
    site.add_argument("--cluster", type=Path, metavar="FILE", help="cluster profile; see launch/clusters/example.yaml")
    for key, field in profile_flags().items():
        flag = f"--{key.replace('_', '-')}"
        site.add_argument(flag, type=FLAG_TYPES[_type(key)], metavar="X", help=field.description)


def _type(key: str) -> str:
    return str(ClusterProfile.__annotations__[key])


def profile_flags() -> dict[str, FieldInfo]:
    """Keys of the cluster profile that a flag can give."""
    return {key: field for key, field in ClusterProfile.model_fields.items() if _type(key) in FLAG_TYPES}


def make_allocation(args: argparse.Namespace, profile: ClusterProfile) -> Allocation:
    """The run that is asked for and the machines it is to have. Raises ConfigError or LaunchError."""
    return allocate(args, profile, load(args.config, args.set))


def allocate(
    args: argparse.Namespace, profile: ClusterProfile, run: RunFile, command: Command | None = None
) -> Allocation:
    """The machines that a run, or a command on it, is to have. Raises LaunchError."""
    if args.nodes < 1:
        raise LaunchError(f"--nodes {args.nodes}: a job has at least one node")
    least = args.min_nodes
    if least is not None and not 1 <= least <= args.nodes:
        raise LaunchError(f"--min-nodes {least}: must be from 1 to --nodes {args.nodes}")
    if getattr(args, "local", False):
        return here(run, profile, args.nodes, len(local.visible_devices()), command)
    slurm.require_slurm()
    gpu_type = str(profile.gpus_per_node).rpartition(":")[0] or None
    return on_slurm(run, profile, args.nodes, slurm.nodes_of(profile.partition, gpu_type), least, command)


def check(
    allocation: Allocation,
    overrides: list[str],
    ignore_plan: bool,
    tell: bool = False,
    besides: Sequence[str] = (),
) -> str:
    """Every check that needs more than the run file, side by side. Returns when Slurm would start the job.

    Args:
        ignore_plan: let pass what does not fit.
        tell: print what the plan says.
        besides: jobs of its chain, which may wait or run.
    Raises:
        ConfigError, LaunchError: the first refusal, Slurm's before the code's, and the planner's last.
    """
    checks.check_resources(allocation, besides)
    if allocation.command is not None:
        allocation.command.check(allocation.run)
    script = None if allocation.local else Executor(allocation).script()
    if allocation.command is not None:
        return _expected_start(allocation, script) if script else "now"
    with ThreadPoolExecutor(2) as pool:
        ready = pool.submit(checks.check_ready, allocation, overrides)
        start = pool.submit(_expected_start, allocation, script) if script else None
        print("checking the code and the data …", file=sys.stderr)
        expected = start.result() if start else "now"
        passed = ready.result()
    if not passed.checked:
        print("nothing has changed since they last passed", file=sys.stderr)
    lines = planned.summary(passed.plan, allocation) if tell else [planned.problem(passed.plan)]
    for line in filter(None, lines):
        print(line, file=sys.stderr)
    if not ignore_plan:
        planned.refuse_too_large(passed.plan, allocation)
    return expected


def _expected_start(allocation: Allocation, script: str) -> str:
    try:
        return slurm.expected_start(script, submission_environment(script))
    except slurm.Refused:
        if allocation.has and allocation.wait and allocation.least <= allocation.has.count:
            return ""  # sbatch takes what its --test-only refuses, since that looks at nodes alone that are up
        raise


def _dry_run(allocation: Allocation, start: str) -> None:
    if allocation.local:
        told = allocation.command or f"train --config {allocation.run.path}"
        print(f"{allocation}: refiner_ds.{told}")
        return
    print(Executor(allocation).script())
    print(f"{allocation.name}: {_why_not_now(allocation, start)}", file=sys.stderr)


def _why_not_now(allocation: Allocation, start: str) -> str:
    """When Slurm would start it, and what it would wait for."""
    if allocation.wait:
        return f"Slurm would not start it now: {allocation.wait}"
    has = allocation.has
    idle = (
        f"; {has.idle} of {has.count} nodes of {has.partition} are idle, of {allocation.nodes} asked for" if has else ""
    )
    try:
        seconds = (datetime.fromisoformat(start) - datetime.now()).total_seconds()
    except ValueError:
        return f"Slurm does not say when it would start it{idle}"
    if seconds < SOON_SECONDS:
        return "Slurm would start it now"
    if seconds > FAR_SECONDS:
        return f"Slurm cannot say when it would start it, since jobs before it have no time limit{idle}"
    return f"Slurm would start it at {start.replace('T', ' ')}{idle}"


def _run_on_slurm(stages: list[chain.Stage], there: list[str], wait: bool, watch: Stopwatch) -> int:
    """Submit what is missing, each after the jobs before it that have not ended; follow the last.

    Args:
        there: jobs of the chain that wait or run.
    """
    after = list[str]()
    last: tuple[RunFolder, str] | None = None
    for stage in stages:
        allocation, number = stage.allocation, stage.standing.job
        if stage.standing.missing:
            number = submission.submit(allocation, after=after, besides=there).job_id
            _print_summary(allocation, number, f"scancel {number}", watch)
        if number:
            after.append(number)
            last = RunFolder(allocation.run.folder), number
    if not wait or last is None:
        return 0
    run_folder, number = last
    try:
        follow(run_folder.jobs / f"{number}_0_log.out", lambda: slurm.has_ended(number), sys.stdout)
    except KeyboardInterrupt:
        print(f"\njob {number} continues; scancel {number} ends it", file=sys.stderr)
        return 128 + signal.SIGINT
    return print_ending(run_folder, number)


def _run_here(allocation: Allocation, watch: Stopwatch) -> int:
    signal.signal(signal.SIGTERM, _leave)
    job, executor = submission.start_here(allocation)
    _print_summary(allocation, job.job_id, f"kill {job.job_id}", watch)
    controller, interrupted = executor.controller, False
    try:
        follow(job.paths.stdout, lambda: controller.poll() is not None, sys.stdout, every=0.2)
    except KeyboardInterrupt:
        interrupted = True  # Ctrl-C reaches the job's processes too
    finally:
        if controller.poll() is None:
            controller.terminate()
            controller.wait()
    if interrupted:
        print(f"job {job.job_id}: INTERRUPTED, exit code {128 + signal.SIGINT}")
        return 128 + signal.SIGINT
    return print_ending(RunFolder(allocation.run.folder), job.job_id, controller.returncode)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


def _print_summary(allocation: Allocation, job_id: str, stop: str, watch: Stopwatch) -> None:
    folder = RunFolder(allocation.run.folder)
    watch.lap("submission")
    target = str(folder) if allocation.command is None else f"{folder}:{allocation.command.label}"
    rows = {
        "run folder": str(folder),
        "log": f"tail -F {shlex.quote(f'{folder.jobs}/{job_id}_0_log.out')}",
        "status": f"{_typed('jobs')} status {shlex.quote(target)}",
        "curves": f"tensorboard --logdir {shlex.quote(str(folder.tensorboard))}",
        "accuracy": f"{_typed('evaluate')} {shlex.quote(str(folder))}",
        "stop": stop,
    }
    if allocation.command is not None:
        kept = {word: rows[word] for word in ("run folder", "log", "status", "stop")}
        rows = {"runs": str(allocation.command), **kept}
    print(f"job {job_id}: {allocation}")
    print(f"  {'submitted':<12}in {watch}")
    for word, command in rows.items():
        print(f"  {word:<12}{command}")
    sys.stdout.flush()


def _typed(command: str) -> str:
    """How another command is typed where this one was, from whichever folder."""
    launch = Path(__file__).resolve().parent
    if __package__ != "launch":
        return f"refiner-{command}"  # installed
    file = launch / "jobs.py" if command == "jobs" else launch.parent / "refiner_ds" / f"{command}.py"
    here = Path.cwd()
    return f"python {shlex.quote(str(file.relative_to(here) if file.is_relative_to(here) else file))}"


def print_ending(run_folder: RunFolder, job_id: str, local_code: int | None = None) -> int:
    """Say how a job ended and why. Returns its exit code.

    Args:
        local_code: exit code of a job on this machine; None asks Slurm.
    """
    records = Attempts.of(run_folder, job_id).records
    ended = [record.exit_code for record in records if record.exit_code is not None]
    state = None
    if local_code is None:
        with suppress(LaunchError):
            state = slurm.job_state(job_id)
        local_code = ended[-1] if ended else 1  # where Slurm does not tell
    if state is None:
        code = local_code if local_code >= 0 else 128 - local_code
        print(f"job {job_id}: {'FAILED' if code else 'COMPLETED'}, exit code {code}", end="")
    else:
        code = 0 if state.state == "COMPLETED" else (ended[-1] if ended and ended[-1] else state.exit_code_or_signal)
        slurms = "" if state.state == "COMPLETED" else f" (Slurm: {state.exit_text})"
        print(f"job {job_id}: {state.state}, exit code {code}{slurms}", end="")
    if code == 0:
        print()
        return 0
    rank = records[-1].rank if records else None
    print(f"; {why(run_folder, job_id, state)}; log {run_folder.jobs}/{job_id}_{rank or 0}_log.out")
    return code


if __name__ == "__main__":
    sys.exit(main())
