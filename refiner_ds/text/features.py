"""What refining does inside encoders of text: feature evolution, and how alike the heads' maps are before and after.

    python -m refiner_ds.text.features runs/text/plain runs/text/refined --text reviews.txt

A layer's feature is the mean of its output over tokens, and similarity is linear CKA over all lines of the text, with
the last layer and with the embeddings, as refiner_ds.analysis features has it for images. Lines are not padded: those
of as many tokens go together. Writes text_features.csv and text_features.png. Exit codes: 0 written, 2 refused.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from refiner_ds.command_line import command_parser
from refiner_ds.errors import CheckpointError, DataError, report_errors

__all__ = ["COLUMNS", "layer_features", "main"]

COLUMNS = (
    "model", "layer", "lines", "cka_last", "cka_input", "token_similarity", "head_similarity",
    "refined_head_similarity", "entropy",
)  # fmt: skip
BATCH = 16


@report_errors
def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    given = _parser().parse_args(argv)
    from refiner_ds.analysis.results import write_table
    from refiner_ds.text.loading import tokenizer_at
    from refiner_ds.text.pretrain import read_lines
    from refiner_ds.text.training import quiet

    quiet()
    lines = [line for line in read_lines(given.text) if line]
    rows = []
    for place in given.models:
        words, model = tokenizer_at(place), _load(place)
        length = min(given.length, getattr(model.config, "max_position_embeddings", given.length))
        rows += layer_features(place, model, _batches(lines, words, length, given.lines))
    given.out.mkdir(parents=True, exist_ok=True)
    write_table(rows, COLUMNS, given.out / "text_features.csv")
    draw(rows, given.out / "text_features.png")
    models = f"{len(given.models)} model{'s' * (len(given.models) > 1)}"
    print(f"{given.out}/text_features.csv and text_features.png: {models}, {rows[0]['lines']} lines")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(__doc__, "python -m refiner_ds.text.features")
    parser.add_argument("models", nargs="+", metavar="MODEL", help="folder of a model and its tokenizer")
    parser.add_argument("--text", required=True, type=Path, metavar="PLACE", help="a file, or a folder of .txt files")
    parser.add_argument("--lines", type=int, default=1000, metavar="N", help="lines of the text (1000)")
    parser.add_argument("--length", type=int, default=64, metavar="N", help="longest line, in tokens (64)")
    parser.add_argument("--out", type=Path, default=Path("analysis"), metavar="FOLDER", help="where results go")
    return parser


def _load(place: str) -> Any:
    from transformers import AutoConfig, AutoModel

    from refiner_ds.text.interface import NAME

    try:
        config = AutoConfig.from_pretrained(place)
        refined = getattr(config, "refiner", None) is not None
        return AutoModel.from_pretrained(place, attn_implementation=NAME if refined else "eager").eval()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{place}: holds no model of transformers ({str(error).splitlines()[0]})") from None


def _batches(lines: Sequence[str], tokenizer: Any, length: int, most: int) -> Iterator[Any]:
    """Token numbers [B, N] of lines of one length at a time; lines of fewer than three words are left out."""
    import torch

    by_length: dict[int, list[list[int]]] = {}
    for row in tokenizer(list(lines[:most]), truncation=True, max_length=length)["input_ids"]:
        if len(row) >= 5:
            by_length.setdefault(len(row), []).append(row)
    if sum(map(len, by_length.values())) < 4:
        raise DataError("the text holds fewer than four lines of three words; CKA takes at least four")
    for _, rows in sorted(by_length.items()):
        for start in range(0, len(rows), BATCH):
            yield torch.tensor(rows[start : start + BATCH])


def layer_features(label: str, model: Any, batches: Iterator[Any]) -> list[dict[str, Any]]:
    """A row a layer.

    Args:
        model: an encoder of transformers; its maps are read from its refiners, or where it has none from its outputs.
        batches: token numbers, [B, N], without padding.
    Returns:
        Dicts with the keys ``COLUMNS``: ``head_similarity`` is the mean cosine of two heads' maps before refining,
        ``refined_head_similarity`` after it; ``entropy`` of the rows that multiply the values, nats.
    """
    import torch

    from refiner_ds.analysis.cka import CKA
    from refiner_ds.analysis.map_statistics import attention_entropy, head_similarity, token_similarity

    last: list[CKA] = []
    first: list[CKA] = []
    sums: list[dict[str, float]] = []
    for words_BN in batches:
        count = len(words_BN)
        with torch.inference_mode(), _maps_before(model) as before:
            found = model(input_ids=words_BN, output_hidden_states=True, output_attentions=True)
        states = [state.double() for state in found.hidden_states]
        if not last:
            last, first = [CKA() for _ in states[1:]], [CKA() for _ in states[1:]]
            sums = [dict.fromkeys(COLUMNS[5:], 0.0) for _ in states[1:]]
        for layer, (state, after) in enumerate(zip(states[1:], found.attentions, strict=True)):
            last[layer].update(state.mean(1), states[-1].mean(1))
            first[layer].update(state.mean(1), states[0].mean(1))
            plain = before[layer] if before else after
            for name, value in (
                ("token_similarity", token_similarity(state)),
                ("head_similarity", head_similarity(plain)),
                ("refined_head_similarity", head_similarity(after)),
                ("entropy", float(attention_entropy(after).mean())),
            ):
                sums[layer][name] += count * value
    return [
        {
            "model": label, "layer": layer + 1, "lines": last[layer].samples, "cka_last": last[layer].similarity(),
            "cka_input": first[layer].similarity(),
            **{name: value / last[layer].samples for name, value in sums[layer].items()},
        }
        for layer in range(len(last))
    ]  # fmt: skip


@contextmanager
def _maps_before(model: Any) -> Iterator[list[Any]]:
    """Every layer's maps [B, H, N, N] as they are before refining, in the order in which layers are called."""
    from refiner_ds.attention import DeferredMap, make_map
    from refiner_ds.text.refiners import TextRefiner

    found: list[Any] = []

    def note(module: Any, args: Any) -> None:
        query, key, _, mask, scale, _ = args
        found.append(make_map(DeferredMap(query, key, scale, 0.0, mask)))

    handles = [one.register_forward_pre_hook(note) for one in model.modules() if isinstance(one, TextRefiner)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Three panels over layers: CKA with the last layer, with the embeddings, and heads before and after refining."""
    from refiner_ds.analysis.results import legend_below, line_colors, new_figure, write_figure

    figure, axes = new_figure(columns=3, width=5.2)
    colors = line_colors(list(dict.fromkeys(row["model"] for row in rows)))
    panels = {
        "cka_last": "linear CKA with the last layer",
        "cka_input": "linear CKA with the embeddings",
        "refined_head_similarity": "cosine of two heads' maps",
    }
    for axis, (key, title) in zip(axes[0], panels.items(), strict=True):
        for label, color in colors.items():
            mine = [row for row in rows if row["model"] == label]
            layers = [row["layer"] for row in mine]
            axis.plot(layers, [row[key] for row in mine], marker="o", markersize=3, color=color, label=label)
            if key == "refined_head_similarity" and any(row["head_similarity"] != row[key] for row in mine):
                before = [row["head_similarity"] for row in mine]
                axis.plot(layers, before, linestyle=":", marker="o", markersize=3, color=color, label="before refining")
        axis.set(xlabel="layer", ylabel=title, xticks=sorted({row["layer"] for row in rows}))
        axis.grid(alpha=0.3)
    legend_below(figure, axes[0, -1])
    write_figure(figure, file)


if __name__ == "__main__":
    sys.exit(main())
