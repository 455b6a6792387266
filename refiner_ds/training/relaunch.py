"""Two processes on a CPU machine when the plain ``deepspeed refiner_ds/train.py`` started one.

The deepspeed launcher starts one process a GPU, and on a machine without any it starts a single one. A lone process
that knows it came from that launcher becomes the parent of two. ``python refiner_ds/train.py`` stays one process.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

CPU_PROCESSES = 2


def is_lone_cpu_child_of_deepspeed() -> bool:
    """Whether the deepspeed launcher started exactly this one process on a machine without GPUs."""
    from_deepspeed = "CROSS_SIZE" in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ
    return from_deepspeed and os.environ.get("WORLD_SIZE") == "1" and not torch.cuda.is_available()


def run_processes(script: Path, arguments: list[str], count: int = CPU_PROCESSES) -> int:
    """Run ``script`` in ``count`` processes on this machine, by torchrun's own machinery. Returns their exit code."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    for name in (
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_SIZE",
        "CROSS_RANK",
        "CROSS_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    ):
        os.environ.pop(name, None)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or count) // count)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        run_id="refiner_ds",
        nproc_per_node=count,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.5,
    )
    try:
        elastic_launch(config, sys.executable)("-u", str(script), *arguments)
    except ChildFailedError as error:
        return next(iter(error.failures.values())).exitcode
    return 0
