"""Small GLUE folders in the layouts in which the benchmark distributes its nine tasks."""

from __future__ import annotations

import random
from pathlib import Path

WORDS = "good film bad plot a the of fine dull warm cold cast story".split()

# Task -> its folder, header, and a line of sentence a, sentence b and label.
LAYOUTS = {
    "cola": ("CoLA", "", "gj04\t{y}\t\t{a}"),
    "sst2": ("SST-2", "sentence\tlabel", "{a}\t{y}"),
    "mrpc": ("MRPC", "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", "{y}\t70\t71\t{a}\t{b}"),
    "stsb": (
        "STS-B", "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        "0\tmain\tMSR\t2012\t0001\tnone\tnone\t{a}\t{b}\t{y}.500",
    ),
    "qqp": ("QQP", "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "1\t2\t3\t{a}\t{b}\t{y}"),
    "mnli": (
        "MNLI", "index\tpromptID\tpairID\tgenre\ts1p\ts2p\ts1s\ts2s\tsentence1\tsentence2\tlabel1\tgold_label",
        "0\t1\t1n\tfiction\t-\t-\t-\t-\t{a}\t{b}\tneutral\t{y}",
    ),
    "qnli": ("QNLI", "index\tquestion\tsentence\tlabel", "0\t{a}\t{b}\t{y}"),
    "rte": ("RTE", "index\tsentence1\tsentence2\tlabel", "0\t{a}\t{b}\t{y}"),
    "wnli": ("WNLI", "index\tsentence1\tsentence2\tlabel", "0\t{a}\t{b}\t{y}"),
}  # fmt: skip


def write_task(folder: Path, name: str, labels: tuple[str, ...] = ("0", "1"), lines: int = 16) -> Path:
    """Write a task's training and development files; returns its folder."""
    title, header, layout = LAYOUTS[name]
    (folder / title).mkdir(parents=True, exist_ok=True)
    draw = random.Random(0)
    for split in ("train", *(("dev_matched", "dev_mismatched") if name == "mnli" else ("dev",))):
        rows = [header] if header else []
        for index in range(lines):
            label = index % len(labels)
            words = [" ".join(draw.choices(WORDS, k=draw.randint(2, 9))) for _ in range(2)]
            rows.append(layout.format(a=f'{WORDS[label]} "{words[0]}', b=words[1], y=labels[label]))
        (folder / title / f"{split}.tsv").write_text("\n".join(rows) + "\n")
    return folder / title
