"""Submit a run to Slurm, or run it on this machine, as the job it would be.

    python launch/submit.py --nodes 4 --config ds_configs/refiner_s.json --cluster mycluster.yaml
    python launch/submit.py --nodes 4 --gpus-per-node 0 --wait           the quickstart, on the CPUs of four nodes
    python launch/submit.py --local                                      … on this machine

The command checks what can be checked, copies the code into the run folder, submits one task per GPU through submitit
and prints where things are. Submitting a run again resumes what its folder holds.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import NoReturn

if not __package__:  # started as a file: its packages are those of the clone it lies in
    sys.path[0], __package__ = str(Path(__file__).resolve().parents[1]), "launch"

import submitit
from pydantic.fields import FieldInfo

from refiner_ds.config import load
from refiner_ds.errors import LaunchError, report_errors
from refiner_ds.run_folder import RunFolder

from . import checks, local, slurm
from .allocation import Allocation
from .cluster import ClusterProfile, load_profile
from .follow import follow
from .job import Failure, TrainJob
from .snapshot import RUN_FILE, take_snapshot

FLAG_TYPES = {"str | None": str, "float | None": float, "int | None": int, "int": int}


@report_errors
def main(argv: list[str] | None = None) -> int:
    """Run the command. Exit code: 0, 2 where it refuses, or with ``--wait`` and ``--local`` the job's."""
    args = _parser().parse_args(argv)
    return _submit(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="FILE", help="run file; ds_configs/quickstart.json without")
    parser.add_argument(
        "--set", metavar="KEY=VALUE", action="append", default=[], help="override a key of the run file"
    )
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes (1)")
    parser.add_argument("--local", action="store_true", help="run on this machine, all nodes' processes, and wait")
    parser.add_argument("--wait", action="store_true", help="show the log until the job ends; leave with its exit code")
    parser.add_argument("--dry-run", action="store_true", help="check, and print what would be submitted")
    site = parser.add_argument_group("the site", "keys of the cluster profile, each of which a flag overrides")
    site.add_argument("--cluster", type=Path, metavar="FILE", help="cluster profile; see launch/clusters/example.yaml")
    for key, field in _profile_flags().items():
        flag = f"--{key.replace('_', '-')}"
        site.add_argument(flag, type=FLAG_TYPES[_type(key)], metavar="X", help=field.description)
    return parser


def _type(key: str) -> str:
    return str(ClusterProfile.__annotations__[key])


def _profile_flags() -> dict[str, FieldInfo]:
    return {key: field for key, field in ClusterProfile.model_fields.items() if _type(key) in FLAG_TYPES}


def _submit(args: argparse.Namespace) -> int:
    profile = load_profile(args.cluster, {key: getattr(args, key) for key in _profile_flags()})
    allocation = _allocation(args, profile)
    batch = allocation.batch  # refuses one that does not divide
    print(f"{allocation.run.path}: {allocation}; {batch}", file=sys.stderr)
    checks.check_resources(allocation)
    code = RunFolder(allocation.run.folder).code
    batch_script = None if allocation.local else slurm.script(_slurm_executor(allocation, code))
    if batch_script:
        slurm.test_only(batch_script)
    print("checking the code and the data …", file=sys.stderr)
    checks.check_ready(allocation, args.set)
    if args.dry_run:
        print(batch_script or f"{allocation}: refiner_ds.train {' '.join(_arguments(code))}")
        return 0
    take_snapshot(allocation.run)
    return _run_here(allocation, code) if allocation.local else _run_on_slurm(allocation, code, args.wait)


def _allocation(args: argparse.Namespace, profile: ClusterProfile) -> Allocation:
    if args.nodes < 1:
        raise LaunchError(f"--nodes {args.nodes}: a job has at least one node")
    run = load(args.config, args.set)
    gpus = profile.gpus_per_node
    if not args.local:
        slurm.require_slurm()
        gpus = slurm.gpus_of_nodes(profile.partition) if gpus is None else gpus
    elif gpus is None:
        gpus = len(local.visible_devices()) // args.nodes
    return Allocation(run, profile, args.nodes, gpus, args.local)


def _job(allocation: Allocation, code: Path) -> TrainJob:
    return TrainJob(_arguments(code), str(allocation.run.folder), allocation.gpus > 0, allocation.profile.requeues)


def _arguments(code: Path) -> list[str]:
    return ["--config", str(code / RUN_FILE)]


def _slurm_executor(allocation: Allocation, code: Path) -> submitit.SlurmExecutor:
    return slurm.executor(
        allocation.profile,
        nodes=allocation.nodes,
        gpus=allocation.gpus,
        tasks=allocation.tasks,
        run_folder=allocation.run.folder,
        code=code,
    )


def _run_on_slurm(allocation: Allocation, code: Path, wait: bool) -> int:
    try:
        job = _slurm_executor(allocation, code).submit(_job(allocation, code))
    except submitit.core.utils.FailedJobError as error:
        raise LaunchError(f"Slurm refuses the job: {str(error).strip().splitlines()[-1]}") from None
    _print_summary(allocation, job.job_id, stop=f"scancel {job.job_id}")
    if not wait:
        return 0
    try:
        state, exit_code = follow(job.paths.stdout, lambda: slurm.ending(job.job_id), sys.stdout)
    except KeyboardInterrupt:
        print(f"\njob {job.job_id} goes on; scancel {job.job_id} ends it", file=sys.stderr)
        return 128 + signal.SIGINT
    return _print_ending(allocation, job.job_id, state, exit_code)


def _run_here(allocation: Allocation, code: Path) -> int:
    executor = local.LocalExecutor(
        RunFolder(allocation.run.folder).jobs,
        tasks=allocation.world_size,
        devices=",".join(local.visible_devices()[: allocation.world_size]) if allocation.gpus else "",
        environment=allocation.profile.environment,
        code=code,
        minutes=allocation.profile.minutes,
        signal_seconds=allocation.profile.signal_seconds,
    )
    signal.signal(signal.SIGTERM, _leave)
    job = executor.submit(_job(allocation, code))
    _print_summary(allocation, job.job_id, stop=f"kill {job.job_id}")
    try:
        state, exit_code = follow(job.paths.stdout, lambda: _left(executor.controller.poll()), sys.stdout, every=0.2)
    except KeyboardInterrupt:
        state, exit_code = "INTERRUPTED", 128 + signal.SIGINT  # Ctrl-C reaches the job's processes too
    finally:
        if executor.controller.poll() is None:
            executor.controller.terminate()
            executor.controller.wait()
    return _print_ending(allocation, job.job_id, state, exit_code)


def _left(exit_code: int | None) -> tuple[str, int] | None:
    if exit_code is None:
        return None
    return ("FAILED" if exit_code else "COMPLETED"), exit_code if exit_code >= 0 else 128 - exit_code


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(128 + number)


def _print_summary(allocation: Allocation, job_id: str, stop: str) -> None:
    folder = allocation.run.folder
    rows = {
        "run folder": str(folder),
        "log": f"tail -F {folder}/jobs/{job_id}_0_log.out",
        "curves": f"tensorboard --logdir {folder}/tensorboard",
        "accuracy": f"python refiner_ds/evaluate.py {folder}",
        "stop": stop,
    }
    print(f"job {job_id}: {allocation}")
    for word, command in rows.items():
        print(f"  {word:<12}{command}")
    sys.stdout.flush()


def _print_ending(allocation: Allocation, job_id: str, state: str, exit_code: int) -> int:
    failure = Failure.noted(Failure.file(allocation.run.folder, job_id)) if exit_code else None
    if failure:
        exit_code = failure.exit_code
    where = f", first on rank {failure.rank} ({failure.host})" if failure else ""
    log = RunFolder(allocation.run.folder).jobs / f"{job_id}_{failure.rank if failure else '*'}_log.out"
    print(f"job {job_id}: {state}, exit code {exit_code}{where}; log {log}")
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
