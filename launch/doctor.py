"""Examine this machine, or nodes of a cluster, for what makes training fail or slow; in under a minute.

    python launch/doctor.py                                        this machine
    python launch/doctor.py --nodes 4 --cluster mycluster.yaml     four nodes that Slurm gives
    python launch/doctor.py --nodes 4 --cluster mycluster.yaml --config ds_configs/refiner_s.json

Looked at: GPUs and drivers, a real all-reduce with its bandwidth within and between nodes, whether the run folder is
shared (files appear, replaced files change, locks hold), clocks, cores, memory, /dev/shm, disks and quota, decoding
speed, whether all nodes have the same versions, Slurm's accounting. The run file says where run folders and data are,
and how many loader workers there will be. Exit code: 0 nothing serious, 1 something is, 2 refused.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median

if not __package__:  # started as a file: its packages are those of the clone it lies in
    sys.path[0], __package__ = str(Path(__file__).resolve().parents[1]), "launch"

from refiner_ds.command_line import Parser
from refiner_ds.config.addresses import is_address
from refiner_ds.errors import report_errors

from . import local
from .allocation import Allocation
from .cluster import load_profile
from .flags import words
from .health.findings import Finding, Requirements, examine
from .health.gather import Reports, run_here, run_on_slurm
from .submit import add_machine_flags, make_allocation, profile_flags

QUEUE_SECONDS = 600
MINUTES = 3  # of the job; the tasks take less than one


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config", metavar="FILE", help="run file; ds_configs/quickstart.json without")
    add("--set", metavar="KEY=VALUE", action="append", default=[], help="override a key of the run file")
    add("--images-per-second", type=float, default=0.0, metavar="X", help="that one process is to train on, if known")
    add("--queue-seconds", type=int, default=QUEUE_SECONDS, metavar="S", help="how long to wait for nodes (600)")
    add_machine_flags(parser)
    parser.set_defaults(nodes=None)
    return parser


@report_errors
def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    given = _parser().parse_args(argv)
    profile = load_profile(given.cluster, {key: getattr(given, key) for key in profile_flags()})
    given.local, given.nodes = given.nodes is None, 1 if given.nodes is None else given.nodes
    allocation = make_allocation(given, profile)
    reports = _here(allocation) if allocation.local else _on_slurm(allocation, given.queue_seconds)
    workers = allocation.run.refiner.data.workers
    findings = examine(reports, Requirements(allocation.gpus or None, workers, given.images_per_second))
    findings += [] if allocation.local else _accounting()
    print(_summary(reports))
    for finding in findings:
        print(finding)
    print(f"{len(findings) or 'no'} finding{'s' * (len(findings) != 1)}")
    return int(any(finding.serious for finding in findings))


def _here(allocation: Allocation) -> Reports:
    tasks = allocation.gpus or max(2, allocation.tasks)  # one process alone reduces with nobody
    gpus = local.visible_devices()[: allocation.gpus]
    return run_here(tasks, _options(allocation), gpus, allocation.profile.environment)


def _on_slurm(allocation: Allocation, queue_seconds: int) -> Reports:
    profile, options = allocation.profile, _options(allocation)
    flags = _srun_flags(allocation, queue_seconds)
    return run_on_slurm(flags, allocation.world_size, options, profile.setup, profile.environment)


def _options(allocation: Allocation) -> list[str]:
    run, profile = allocation.run, allocation.profile
    data = run.refiner.data.train or ""
    named = [] if not data or data.startswith("package:") or is_address(data) else ["--data", data]
    site = ["--master-addr", profile.master_addr, "--node-environment", json.dumps(profile.node_environment)]
    return ["--folder", str(run.folder.parent), *site, *named, *(["--gpu"] if allocation.gpus else [])]


def _srun_flags(allocation: Allocation, queue_seconds: int) -> list[str]:
    profile, memory = allocation.profile, allocation.mem_mb
    wanted: dict[str, str | int | bool | None] = {
        "nodes": allocation.nodes,
        "ntasks-per-node": allocation.tasks,
        "gpus-per-node": profile.gpus_per_node if profile.gpus else allocation.gpus or None,
        "cpus-per-task": allocation.cpus_per_task,
        "mem": None if memory is None else f"{memory}M" if memory else "0",
        "time": MINUTES,
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "constraint": profile.constraint,
        "job-name": "doctor",
        "immediate": queue_seconds,
        **profile.sbatch,
        **profile.srun,
        "kill-on-bad-exit": 0,  # the others have something to say too
    }
    return words({flag: value for flag, value in wanted.items() if value is not None})


def _accounting() -> list[Finding]:
    """Whether sacct answers: submitit reads the states of jobs from it."""
    if shutil.which("sacct") is None:
        return [Finding(False, (), "sacct is not here; without accounting a job that has ended is soon forgotten")]
    try:
        answer = subprocess.run(("sacct", "--noheader", "-j", "1"), capture_output=True, text=True, timeout=15)
    except subprocess.TimeoutExpired:
        return [Finding(False, (), "sacct does not answer; ask for Slurm's accounting to be looked at")]
    if answer.returncode:
        said = (answer.stderr.strip() or f"exit code {answer.returncode}").splitlines()[-1]
        return [Finding(False, (), f"sacct fails ({said}); ask for Slurm's accounting to be looked at")]
    return []


def _summary(reports: Reports) -> str:
    """What was measured, in a few lines."""
    nodes = [reports.nodes[rank] for rank in sorted(reports.nodes)]
    hosts = list(dict.fromkeys(node.host for node in nodes))
    lines = [f"{len(hosts)} node{'s' * (len(hosts) != 1)} ({', '.join(hosts)}), {reports.tasks} tasks"]
    if nodes:
        gpus = ", ".join(sorted({gpu.name for node in nodes for gpu in node.gpus})) or "no GPU"
        lines.append(f"{gpus}; decoding {median(node.decode_rate for node in nodes):,.0f} images/s a core")
        writing = [node.folder.write_rate / 1e6 for node in nodes if node.folder.write_rate > 0]
        if writing:
            lines.append(f"{nodes[0].folder.path}: writing {median(writing):,.0f} MB/s a task")
    meeting = json.loads(reports.meeting or "{}")
    if meeting.get("address"):
        lines.append(f"ranks meet at {meeting['address']}, port {meeting['port']}")
    for name, where in (("within", "within a node"), ("between", "between nodes")):
        rates = [one.rates[name] for one in reports.shared.values() if name in one.rates]
        if rates:
            backend = next(one.backend for one in reports.shared.values() if one.backend)
            lines.append(f"all-reduce {where} ({backend}): {min(rates) / 1e9:.2f} GB/s")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
