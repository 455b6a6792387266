"""Plan a run: memory a GPU by part, whether it fits, step time, communication, checkpoints, hours and money.

    python -m refiner_ds.plan --config ds_configs/refiner_l.json --nodes 4 --gpus-per-node 8 --gpu h200 --price 3.50
    python -m refiner_ds.plan ds_configs/paper/expansion.json --gpus-per-node 8      every run of a table, and their sum

No GPU is needed. ``--gpu cpu`` plans for the CPUs of this machine. ``--json`` prints one object.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from refiner_ds import garbage
from refiner_ds.amounts import amount
from refiner_ds.command_line import Parser
from refiner_ds.config import load
from refiner_ds.errors import ConfigError, report_errors
from refiner_ds.gpus import gpu
from refiner_ds.sweep_table import read_table
from refiner_ds.training.logs import silence_libraries

GIB = 2**30


@report_errors
def main(argv: list[str] | None = None) -> int:
    """Run the command; returns 0, whether or not the run fits."""
    silence_libraries()
    lines = __doc__.split("\n")
    parser = Parser(prog="python -m refiner_ds.plan", description=lines[0])
    parser.add_argument("table", nargs="?", type=Path, metavar="TABLE", help="a table of runs, instead of a run file")
    parser.add_argument("--config", metavar="FILE", help="run file (default: ds_configs/quickstart.json)")
    parser.add_argument("--grid", action="append", default=[], metavar="KEY=V1,V2", help="with a table; repeatable")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one key; repeatable")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus-per-node", type=int, default=1, help="processes a node")
    parser.add_argument("--gpu", default="h100", help="name of the GPU, or cpu (default: h100)")
    parser.add_argument("--network", type=float, default=50, metavar="GB/S", help="of a node, one way (default: 50)")
    parser.add_argument("--disk", type=float, default=1, metavar="GB/S", help="to the run folder (default: 1)")
    parser.add_argument("--price", type=float, metavar="MONEY", help="of a GPU-hour")
    parser.add_argument("--step-seconds", type=float, metavar="S", help="of a step, whatever was measured")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args(argv)
    for name in ("nodes", "gpus_per_node", "network", "disk", "price", "step_seconds"):
        value = getattr(given, name)
        if value is not None and value <= 0:
            raise ConfigError(f"--{name.replace('_', '-')} {value:g}: must be above 0")
    card = None if given.gpu.lower() == "cpu" else gpu(given.gpu)
    if given.table and given.config:
        raise ConfigError("give a table or --config, not both")
    if given.grid and not given.table:
        raise ConfigError("--grid goes with a table; change keys of a run file by --set")
    table = read_table(given.table).across(given.grid) if given.table else None

    with garbage.paused():
        from refiner_ds.plan.checking import full_plan
        from refiner_ds.plan.machines import Machines
        from refiner_ds.plan.tables import plan_table, table_text

    machines = Machines(
        card, given.nodes, given.gpus_per_node, given.network, given.disk, given.price, given.step_seconds
    )
    if table is not None:
        found = plan_table(table, given.set, machines)
        print(json.dumps(found) if given.json else table_text(found))
    else:
        plan = full_plan(load(given.config, given.set), machines)
        print(json.dumps(plan) if given.json else text(plan))
    return 0


def text(plan: dict[str, Any]) -> str:
    """The plan for a person."""
    memory, step, cost, run = plan["memory"], plan["step"], plan["cost"], plan["run"]
    lines = [
        f"{plan['config']} on {plan['processes']} × {plan['gpu']}, {plan['precision']}, attention {plan['attention']}",
        f"model         {run['model']} at {run['img_size']} px, {plan['parameters']:,} parameters",
        f"              {run['flops_an_image'] / 1e9:.1f} GFLOP an image, forward and backward",
        f"batch         {run['batch']}",
    ]
    if run["images"] is not None:
        lines += [
            f"steps         {run['steps_an_epoch']:,} an epoch of {run['images']:,} images, {cost['steps']:,} in all",
            f"lr            {run['lr']:.3g} at its peak",
        ]
    else:
        lines.append("steps         unknown: set refiner.data.images, or put the shards where refiner.data.train says")
    lines += [f"data          {run['data']}", f"run folder    {run['folder']}", "memory of a process, GiB"]
    for name, size in memory["parts"].items():
        lines.append(f"  {name.replace('_', ' '):<30}{size / GIB:>9.2f}")
        if name == "activations":
            lines += [f"    {kind:<28}{part / GIB:>9.2f}" for kind, part in memory["activations"].items()]
    verdict = "fits" if memory["fits"] else "does not fit"
    lines.append(f"  {'needed':<30}{memory['needed'] / GIB:>9.2f} of {memory['capacity'] / GIB:.2f}: {verdict}")
    lines.append(
        f"  micro-batch: at most about {memory['largest_micro_batch']}; the largest that divides the batch is"
        f" {memory['largest_dividing_micro_batch']}"
    )
    for remedy in memory["remedies"]:
        enough = ", then it fits" if remedy["fits"] else ""
        lines.append(f"  --set {remedy['set']} saves {remedy['saves'] / GIB:.2f} GiB{enough}")
    lines += _step_lines(step, plan["processes"])
    if "sent" in step:
        lines.append(f"sent          {step['sent'] / 1e9:.2f} GB a step by each process")
    checkpoint = plan["checkpoint"]
    lines.append(f"checkpoint    {checkpoint['bytes'] / 1e9:.2f} GB, {checkpoint['seconds']:.1f} s")
    if cost["hours"] is not None:
        money = "" if cost["money"] is None else f", {cost['money']:,.2f} at this price"
        lines.append(
            f"cost          {cost['steps']:,} steps, {amount(cost['hours'])} hours,"
            f" {amount(cost['gpu_hours'])} GPU-hours{money}"
        )
    elif cost["steps"] is not None:
        lines.append(f"cost          {cost['steps']:,} steps; give --step-seconds for hours")
    return "\n".join(lines)


def _step_lines(step: dict[str, Any], processes: int) -> list[str]:
    """How long a step takes, by what, and its lower bound."""
    parts = ", ".join(f"{name} {1000 * value:.1f}" for name, value in step.get("parts", {}).items())
    bound = f"{1000 * sum(step['parts'].values()):.1f} ms at data-sheet rates ({parts})" if parts else ""
    if step["basis"] is None:
        return []
    if step["basis"] == "data sheet":
        return [f"step          at least {bound}"]
    lines = [f"step          {1000 * step['seconds']:.1f} ms"]
    if (one := step["measured"]) is None:
        lines[0] += " as given"
    else:
        split = f"{one['processes']} × {one['device']}, {one['micro_batch']} × {one['accumulation']} images each"
        lines[0] += f" measured on {split}, on {one['date']}"
        if not one["same_code"]:
            lines[0] += " by another version of this code"
        lines.append(f"              {one['data_wait_seconds'] / one['seconds']:.0%} of it waiting for data")
        if not one["exact"]:
            lines.append(
                f"              ({1000 * one['seconds']:.1f} ms there; communication as of {processes} processes)"
            )
    return [*lines, *([f"              at least {bound}"] if bound else [])]


if __name__ == "__main__":
    sys.exit(main())
