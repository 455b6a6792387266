"""The parts of the report on a GPU: what each runs, and what the report shows of what it printed."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from refiner_ds.benchmark.running import Digest, Outcome, Step, Unsound
from refiner_ds.data.locate import open_index
from refiner_ds.data.samples import SampleReader
from refiner_ds.data.writer import SetWriter
from refiner_ds.page import Part, Table, Text
from refiner_ds.training.metrics import read_metrics

__all__ = ["Sizes", "Step", "bars", "stages_side_by_side", "steps_of"]

STAGES = (0, 1, 2, 3)
APART = 0.05  # of ZeRO stages: relative difference of the last loss that bf16's rounding does not explain


@dataclass(frozen=True)
class Sizes:
    """Where the parts run and how large they are: tiny on a CPU.

    Attributes:
        cards: processes of what trains.
    """

    device: str
    cards: int
    long: bool

    @property
    def tiny(self) -> bool:
        """Whether the report itself is being tried."""
        return self.device == "cpu"


def steps_of(sizes: Sizes, out: Path) -> list[Step]:
    """All parts in the order they run: what is wrong first, then what is slow."""
    benchmark = [sys.executable, "-m", "refiner_ds.benchmark"]
    interpreted: dict[str, str | None] = {"TRITON_INTERPRET": "1" if sizes.tiny else None}
    wanted = ["tests/attention/triton/test_moments.py"] if sizes.tiny else ["-m", "gpu", "tests/attention/triton"]
    times = 20 if sizes.tiny else 5 if sizes.long else 1
    steps = [
        Step("self-check", "The check that a process makes before it uses the kernels.",
             [*benchmark, "selfcheck", "--device", sizes.device, *(["--tokens", "9"] if sizes.tiny else [])],
             40 * times, _selfcheck, interpreted),
        Step("tests", "The compiled kernels against float64.",
             [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={out}/tests.xml", *wanted],
             120 * times, _tests, interpreted),
    ]  # fmt: skip
    on = ["--device", sizes.device]
    for kind, about, command, cases, seconds, read in (
        ("kernels", "Each kernel: predicted from its machine code beside measured, milliseconds.",
         ["kernels"], _kernel_sizes(sizes), 50, _kernels),
        ("layer", "One layer of refined attention by every backend.",
         ["attention", *on], _layer_sizes(sizes), 60, _layer),
        ("model", "A whole model by every backend, beside a vanilla ViT of its size.",
         ["model", *on], _model_sizes(sizes), 60, _model),
    ):  # fmt: skip
        steps += [
            Step(f"{kind} {name}", about, [*benchmark, *command, "--json", *options], seconds * times, read(name),
                 {"TRITON_INTERPRET": None})
            for name, options in cases
        ]  # fmt: skip
    steps.append(
        Step("quickstart", "The command a user types first, on all cards.", _training(sizes, out, "quickstart"),
             70 * times, _quickstart, _on(sizes))
    )  # fmt: skip
    for stage in STAGES:
        name = f"ZeRO stage {stage}"
        keys = [f"zero_optimization.stage={stage}", f"refiner.recipe.epochs={0.2 if sizes.tiny else 2}",
                f"train_batch_size={48 * sizes.cards}", "refiner.data.val=null", "refiner.run.log_steps=1",
                "refiner.recipe.warmup_epochs=0", "refiner.recipe.cooldown_epochs=0"]  # fmt: skip
        steps.append(
            Step(name, "The quickstart's model, trained for a short while on all cards.",
                 _training(sizes, out, f"stage_{stage}", keys), 25 * times, _stage(stage), _on(sizes))
        )  # fmt: skip
    saved = ["--model", "refiner_vit_l", "--batch", "16", "--steps", "8", "--rounds", "3", "--folder", str(out)]
    if sizes.tiny:
        saved[1:] = ["refined_vit", "--rounds", "3", "--set", "refiner.model.depth=2", "--folder", str(out)]
    size = ["--size", "64", "--batch", "4"] if sizes.tiny else ["--size", "288", "--device", "cuda", "--bf16"]
    return [
        *steps,
        Step("checkpoint", "What saving L costs training, on all cards: beside the steps, and waited for.",
             [*_on_all(sizes), "-m", "refiner_ds.benchmark", "checkpoint", *saved], 40 * times, _printed, _on(sizes)),
        Step("loader", "The data loader beside the usual one and the floor, on this machine's CPU.",
             [*benchmark, "loader", "--rounds", "1" if sizes.tiny else "2", "--workers", "0" if sizes.tiny else "4"],
             40 * times, _printed, {}),
        Step("annotator", "Score maps of 364 pictures, by the annotator that comes in a package.",
             [sys.executable, "data_tools/annotate.py", f"{out}/pictures", "--beside", f"{out}/annotated", *size],
             40 * times, _printed, _on(sizes), _lay_out_pictures),
    ]  # fmt: skip


def _lay_out_pictures(out: Path) -> None:
    """Pictures of digits as a set of a thousand classes, as many as the annotator tells apart."""
    index = open_index("package:digits/val")
    reader = SampleReader(index)
    with SetWriter(out / "pictures", [f"class {number}" for number in range(1000)], 128) as writer:
        for sample in range(index.count):
            raw = reader.read(sample)
            writer.add(raw.key, bytes(raw.image), raw.name.rpartition(".")[2], raw.label)
    reader.close()


def _on(sizes: Sizes) -> dict[str, str | None]:
    return {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": None} if sizes.tiny else {"TRITON_INTERPRET": None}


def _kernel_sizes(sizes: Sizes) -> list[tuple[str, list[str]]]:
    found = [("S at 224", ["--architecture", "90", "--batch", "2"] if sizes.tiny else [])]
    if sizes.long:
        found.append(("L at 224", ["--heads", "16", "--pairs", "16"]))
        found.append(("L at 448", ["--heads", "16", "--tokens", "785", "--batch", "8", "--pairs", "16"]))
    return found


def _layer_sizes(sizes: Sizes) -> list[tuple[str, list[str]]]:
    if sizes.tiny:
        small = ["--tokens", "9", "17", "--batch", "2", "--heads", "2", "--width", "4", "--rounds", "1"]
        return [("tiny", small)]
    found = [("S at 224", ["--dtype", "bf16", "--batch", "64", "--tokens", "197"])]
    if sizes.long:
        found.append(("L", ["--dtype", "bf16", "--heads", "16", "--tokens", "197", "785"]))
    return found


def _model_sizes(sizes: Sizes) -> list[tuple[str, list[str]]]:
    if sizes.tiny:
        return [("tiny", ["--depth", "2", "--img-size", "32", "--batch", "1", "--rounds", "1"])]
    compiled = ["--dtype", "bf16", *(["--compile"] if sizes.long else [])]
    large = ["--model", "refiner_vit_l"]
    found = [("S at 224", [*compiled, "--batch", "128"]), ("L at 224", [*compiled, *large, "--batch", "32"])]
    if sizes.long:
        found.append(("L at 448", [*compiled, *large, "--batch", "8", "--img-size", "448"]))
    return found


def _training(sizes: Sizes, out: Path, name: str, keys: Sequence[str] = ()) -> list[str]:
    """The training command on all cards, its run in the report's folder."""
    if sizes.tiny and not keys:
        keys = ["refiner.recipe.epochs=2", "refiner.run.eval_epochs=2"]
    settings = [f"refiner.run.output={out}/runs", f"refiner.run.name={name}", *keys]
    return [*_on_all(sizes), "refiner_ds/train.py", *(word for key in settings for word in ("--set", key))]


def _on_all(sizes: Sizes) -> list[str]:
    """Launch a process for each card."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={sizes.cards}"]


# -- what the report shows ---------------------------------------------------------------------------------------------


def _selfcheck(out: Path, printed: str) -> tuple[str, list[Part]]:
    said = [line for line in printed.splitlines() if line.startswith("the kernels ")]
    if not said:
        raise Unsound("it did not come to an end; see logs/self-check.err.txt")
    return said[-1], []


def _tests(out: Path, printed: str) -> tuple[str, list[Part]]:
    suites = ElementTree.parse(out / "tests.xml").getroot()
    cases = list(suites.iter("testcase"))
    broken = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    passed = len(cases) - len(broken) - len(skipped)
    told = f"{passed} passed, {len(broken)} failed, {len(skipped)} skipped"
    if not passed:
        raise Unsound(f"{told}: nothing was tested")
    rows = [(f"{case.get('classname')}::{case.get('name')}", _first_line(case)) for case in broken]
    return told, [Table(("failed test", "why"), rows)] if rows else []


def _first_line(case: ElementTree.Element) -> str:
    found = case.find("failure")
    found = case.find("error") if found is None else found
    return "" if found is None else str(found.get("message", "")).split("\n")[0][:160]


def _kernels(name: str) -> Digest:
    def digest(out: Path, printed: str) -> tuple[str, list[Part]]:
        rows = _json(printed)["rows"]
        bare = [row for row in rows if row["predicted"] is None]
        lines = [
            (row["step"], row["kernel"], f"{row['bytes_entry']:.1f}", _figure(row["predicted"], ".3f"), row["bound"],
             _figure(row["milliseconds"] or None, ".3f"), f"{row['share']:.0%}" if row["share"] else "",
             str(row["registers"]), str(row["spilled"]))
            for row in rows
        ]  # fmt: skip
        spilled = sum(bool(row["spilled"]) for row in rows)
        measured = [row for row in rows if row["milliseconds"]]
        told = f"{len(rows)} kernels, {spilled} of them spill; "
        if measured and not bare:
            ratio = sum(row["milliseconds"] for row in measured) / sum(row["predicted"] for row in measured)
            told += f"all of them take {ratio:.2f} times what is predicted"
        else:
            told += f"{len(measured)} were timed"
        groups = {
            "predicted": [row["predicted"] or 0.0 for row in rows], "measured": [row["milliseconds"] for row in rows]
        }  # fmt: skip
        labels = [f"{row['kernel']} ({row['step']})" for row in rows]
        picture = bars(out, f"kernels, {name}", labels, groups, "milliseconds")
        header = (
            "step",
            "kernel",
            "bytes an entry",
            "predicted",
            "bound by",
            "measured",
            "of a copy",
            "registers",
            "spilled",
        )
        return told, [Table(header, lines), picture]

    return digest


def _layer(name: str) -> Digest:
    def digest(out: Path, printed: str) -> tuple[str, list[Part]]:
        rows = _json(printed)["rows"]
        labels = [f"{row['case']}, {row['backend']}, N = {row['tokens']}" for row in rows]
        lines = [
            (label, f"{row['training_ms']:.3f}", f"{row['evaluation_ms']:.3f}", f"{row['saved_mib_image']:.2f}",
             f"{row['output_error']:.1e}", f"{row['gradient_error']:.1e}")
            for label, row in zip(labels, rows, strict=True)
        ]  # fmt: skip
        chosen = ", ".join(f"{row['case']} {row['backend']}" for row in rows if row["backend"].startswith("auto"))
        groups = {
            "training": [row["training_ms"] for row in rows],
            "evaluation": [row["evaluation_ms"] for row in rows],
        }
        picture = bars(out, f"layer, {name}", labels, groups, "milliseconds an image")
        header = (
            "case",
            "training, ms an image",
            "evaluation",
            "saved for backward, MiB an image",
            "output error",
            "gradients",
        )
        return f"chosen: {chosen}", [Table(header, lines), picture]

    return digest


def _model(name: str) -> Digest:
    def digest(out: Path, printed: str) -> tuple[str, list[Part]]:
        rows = _json(printed)["rows"]
        eager = next(row for row in rows if row["model"] == "eager")
        lines = [
            (row["model"], f"{row['training_ms']:.3f}", f"{eager['training_ms'] / row['training_ms']:.2f}",
             f"{row['forward_ms']:.3f}", f"{row['saved_mib_image']:.1f}", f"{row['peak_mib']:.0f}")
            for row in rows
        ]  # fmt: skip
        fastest = min((row for row in rows if row["model"].partition(",")[0] in ("eager", "tiled", "triton")),
                      key=lambda row: row["training_ms"])  # fmt: skip
        told = f"{fastest['model']} trains {eager['training_ms'] / fastest['training_ms']:.2f} times as fast as eager"
        groups = {"training": [row["training_ms"] for row in rows], "forward": [row["forward_ms"] for row in rows]}
        picture = bars(out, f"model, {name}", [row["model"] for row in rows], groups, "milliseconds an image")
        header = (
            "model",
            "training, ms an image",
            "times as fast as eager",
            "forward",
            "saved, MiB an image",
            "peak, MiB",
        )
        return told, [Table(header, lines), picture]

    return digest


def _quickstart(out: Path, printed: str) -> tuple[str, list[Part]]:
    run = out / "runs" / "quickstart"
    trained, evaluated = read_metrics(run, "train"), read_metrics(run, "eval")
    if not evaluated:
        raise Unsound("it was not evaluated")
    best = max(line["top1"] for line in evaluated)
    rate = trained[-1]["images_per_second"]
    header = [line for line in printed.splitlines() if re.match(r"(model|engine|attention|batch) {2,}", line)]
    picture = _curve(out, "quickstart", trained, evaluated)
    shown = Table(("the run says", ""), [line.split(None, 1) for line in header])
    return f"top-1 {best:.2f} %, {rate:.0f} images/s at the end", [shown, picture]


def _stage(stage: int) -> Digest:
    def digest(out: Path, printed: str) -> tuple[str, list[Part]]:
        last = read_metrics(out / "runs" / f"stage_{stage}", "train")[-1]
        return f"loss {last['loss']:.4f} after {last['step']} steps, {last['images_per_second']:.0f} images/s", []

    return digest


def stages_side_by_side(out: Path, outcomes: Sequence[Outcome]) -> list[Outcome]:
    """ZeRO stages compared: they train the same; nothing where fewer than two of them passed."""
    lasts: dict[str, Mapping[str, Any]] = {}
    for one in outcomes:
        if one.step.name.startswith("ZeRO stage") and one.state == "passed":
            stage = one.step.name.rpartition(" ")[2]
            lasts[stage] = read_metrics(out / "runs" / f"stage_{stage}", "train")[-1]
    if len(lasts) < 2:
        return []
    first = next(iter(lasts.values()))["loss"]
    apart = max(abs(last["loss"] - first) / abs(first) for last in lasts.values())
    rows = [
        (stage, f"{last['loss']:.4f}", f"{last['images_per_second']:.0f}", f"{last['step_seconds'] * 1000:.1f}",
         f"{last['peak_memory_gib']:.2f}")
        for stage, last in lasts.items()
    ]  # fmt: skip
    table = Table(("stage", "last loss", "images/s", "ms a step", "peak memory, GiB"), rows)
    picture = bars(
        out, "ZeRO stages", [f"stage {stage}" for stage in lasts],
        {"images/s": [last["images_per_second"] for last in lasts.values()]}, "images a second",
    )  # fmt: skip
    model = next(one.step for one in outcomes if one.step.name.startswith("ZeRO stage"))
    step = replace(model, name="ZeRO stages together", about="They train the same: losses agree to bf16's rounding.")
    state = "passed" if apart <= APART else "failed"
    return [Outcome(step, state, 0.0, f"last losses differ by {apart:.1%} at most", [table, picture])]


def _printed(out: Path, printed: str) -> tuple[str, list[Part]]:
    """What a command prints for people, as it stands."""
    lines = [line for line in printed.splitlines() if line.strip()]
    if not lines:
        raise Unsound("it printed nothing")
    return lines[-1].strip(), [Text("```\n" + "\n".join(lines) + "\n```")]


def _json(printed: str) -> dict[str, Any]:
    return dict(json.loads(next(line for line in printed.splitlines() if line.startswith("{"))))


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


# -- pictures ----------------------------------------------------------------------------------------------------------


def bars(out: Path, title: str, labels: Sequence[str], groups: Mapping[str, Sequence[float]], unit: str) -> Text:
    """Horizontal bars, a row a label and a colour a group, as a PNG beside the report; the text that shows it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.4 + 0.17 * len(labels) * (1 + len(groups))), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(groups)
    for number, (group, values) in enumerate(groups.items()):
        axes.barh([place + number * height for place in range(len(labels))], values, height, label=group)
    axes.set_yticks([place + 0.4 - height / 2 for place in range(len(labels))], labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.grid(axis="x", alpha=0.3)
    if len(groups) > 1:
        axes.legend(fontsize="small")
    return _saved(out, figure, title)


def _curve(out: Path, title: str, trained: list[dict[str, Any]], evaluated: list[dict[str, Any]]) -> Text:
    """The loss and the accuracy of a run against its steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([line["step"] for line in trained], [line["loss"] for line in trained])
    left.set(xlabel="step", ylabel="loss")
    for which in dict.fromkeys(line["weights"] for line in evaluated):
        mine = [line for line in evaluated if line["weights"] == which]
        right.plot([line["step"] for line in mine], [line["top1"] for line in mine], marker="o", label=which)
    right.set(xlabel="step", ylabel="top-1, %")
    right.legend(fontsize="small")
    return _saved(out, figure, title)


def _saved(out: Path, figure: Any, title: str) -> Text:
    name = re.sub(r"\W+", "_", title.lower()) + ".png"
    figure.suptitle(title)
    figure.savefig(out / name, dpi=110)
    return Text(f"![{title}]({name})")
