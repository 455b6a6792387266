"""Sections of the page, each made from a run folder, its checkpoints and its validation set."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

from refiner_ds.analysis import features, maps, refiner_weights
from refiner_ds.analysis.loading import LoadedModel
from refiner_ds.analysis.results import new_figure, write_figure
from refiner_ds.checkpoint.files import integrity_errors, read_weights
from refiner_ds.config import RunFile
from refiner_ds.data.augment import AugmentSettings
from refiner_ds.data.classes import match_classes
from refiner_ds.data.index import ShardIndex, find_maps
from refiner_ds.data.loader import train_batches
from refiner_ds.data.locate import open_index
from refiner_ds.errors import DataError
from refiner_ds.evaluation.metrics import Answers, confusions, figures
from refiner_ds.files import has_numbers
from refiner_ds.models import RefinedViT
from refiner_ds.page import Heading, Part, Picture, Table, Text
from refiner_ds.report.curves import curves_svg
from refiner_ds.run_folder import RunFolder, read_state
from refiner_ds.seeds import derived_seed
from refiner_ds.training.inputs import InputMaker
from refiner_ds.training.metrics import read_metrics
from refiner_ds.training.pictures import MOST_VIEWS, Views, views_picture

SHEET_ROWS = 2  # of training views
SHOWN_IMAGES = (0, 1, 2)  # whose attention maps are drawn
NAMED_CLASSES = 30  # a confusion matrix of more has no names
CONFUSED = 8  # pairs listed


def gallery_parts(loaded: LoadedModel, run: RunFile, folder: RunFolder, images: int, weights: str) -> list[Part]:
    """Everything on the page; a section whose data is not here says so.

    Args:
        images: of the validation set, at most, that figures and confusions are of.
        weights: "ema" or "model".
    """
    about = "; ".join(line for line in (run.keys.about or "", f"{weights} weights of {folder.path.name}") if line)
    parts: list[Part] = [Text(about)]
    with TemporaryDirectory() as place:
        sections: list[tuple[str, Callable[[], list[Part]]]] = [
            ("Training views with their labels", lambda: _training_views(loaded, run)),
            ("Learning curves", lambda: _curves(folder)),
            ("Attention maps", lambda: _attention(loaded, images, Path(place))),
            ("Learned kernels and head mixing", lambda: _kernels(loaded, folder, weights, Path(place))),
            ("Feature evolution", lambda: _features(loaded, images, Path(place))),
            ("What is taken for what", lambda: _confusion(loaded, images, Path(place))),
        ]
        for title, section in sections:
            parts.append(Heading(title))
            try:
                parts += section()
            except DataError as error:  # a run folder outlives its data
                parts.append(Text(f"Not shown: {error}"))
    return parts


def _training_views(loaded: LoadedModel, run: RunFile) -> list[Part]:
    """The first views of the run, as its first micro-batches hold them, mixing included."""
    keys, index = run.refiner, open_index(run.refiner.data.train, run.refiner.data.cache)
    model = _refined_vit(loaded)
    elsewhere = keys.data.maps
    batches = train_batches(
        index,
        AugmentSettings(keys.model.img_size, keys.recipe, keys.data.mean, keys.data.std),
        global_batch=MOST_VIEWS,
        micro_batch=MOST_VIEWS,
        rank=0,
        world_size=1,
        seed=keys.run.seed,
        position=0,
        workers=0,
        on_bad_sample=keys.data.on_bad_sample,
        maps=find_maps(index, open_index(elsewhere, keys.data.cache) if elsewhere else None)
        if keys.data.score_maps
        else None,
        decode=keys.data,
        repeats=keys.recipe.aug_repeats,
    )
    make = InputMaker(keys, len(index.classes), model.patch_grid, torch.float32)
    parts: list[Part] = []
    for number, batch in zip(range(SHEET_ROWS), batches, strict=False):
        inputs = make(batch, derived_seed(keys.run.seed, number, 0, 0))
        views = Views.of(inputs, keys.data.mean, keys.data.std)
        sheet = views_picture(views, index.classes, model.patch_grid)
        parts.append(Picture("Views as the model is given them; below, the labels of their patches", _png(sheet)))
    return parts


def _curves(folder: RunFolder) -> list[Part]:
    lines = [line for line in read_metrics(folder.path) if has_numbers(line, "epoch")]
    if not lines:
        return [Text("Not shown: the run has logged nothing.")]
    loss = [(line["epoch"], line["loss"]) for line in lines if line["kind"] == "train" and has_numbers(line, "loss")]
    rated = [line for line in lines if has_numbers(line, "top1")]
    top1 = {
        which: [[(line["epoch"], line["top1"]) for line in rated if line.get("weights") == which]]
        for which in ("model", "ema")
    }
    found = [("Training loss", curves_svg({"loss": [loss]}, "training loss"))]
    found.append(("Top-1 on the validation set, percent", curves_svg(top1, "top-1, percent,")))
    return [Picture(caption, svg) for caption, svg in found if svg] or [Text("Not shown: nothing has been logged.")]


def _attention(loaded: LoadedModel, images: int, place: Path) -> list[Part]:
    index = _validation_set(loaded)
    shown = [number for number in SHOWN_IMAGES if number < index.count]
    pictures = torch.cat([x for x, _ in loaded.batches(index, max(shown) + 1)])[shown]
    maps.draw_maps(loaded, pictures, place / "maps.png", None, None)
    rows = maps.map_rows(loaded, loaded.batches(index, min(images, 200)))
    maps.draw_numbers(rows, place / "numbers.png")
    return [
        Picture("Where the class token looks, and the whole map, before and after refining", _bytes(place, "maps")),
        Picture(f"What maps are like, means over {rows[0]['images']} images", _bytes(place, "numbers")),
    ]


def _kernels(loaded: LoadedModel, folder: RunFolder, weights: str, place: Path) -> list[Part]:
    assert loaded.checkpoint is not None
    found = refiner_weights.refiner_weights(read_weights(loaded.checkpoint, weights))
    if not found:
        return [Text("Not shown: the model has no refiner with one kernel over the whole map.")]
    refiner_weights.draw_weights(found, place / "kernels.png")
    rows = []
    for checkpoint in folder.saved_checkpoints():
        if not integrity_errors(checkpoint):
            one = refiner_weights.refiner_weights(read_weights(checkpoint, weights))
            rows += refiner_weights.summaries(one, read_state(checkpoint).step)
    refiner_weights.draw_summaries(rows, place / "summaries.png")
    return [
        Picture("Kernels, expansion and reduction of refining blocks", _bytes(place, "kernels")),
        Picture("How they came to be: a line a checkpoint, the newest darkest", _bytes(place, "summaries")),
    ]


def _features(loaded: LoadedModel, images: int, place: Path) -> list[Part]:
    rows = features.feature_evolution(loaded, loaded.batches(_validation_set(loaded), images))
    features.draw(rows, place / "features.png")
    caption = f"Similarity of each block's output with the last block's and with the input, {rows[0]['images']} images"
    return [Picture(caption, _bytes(place, "features"))]


def _confusion(loaded: LoadedModel, images: int, place: Path) -> list[Part]:
    index, classes = _validation_set(loaded), loaded.classes or []
    answers = _answers(loaded, index, images)
    count = len(classes)
    guesses_N = answers.guesses_NK[:, 0]
    matrix_CC = np.zeros((count, count))
    known_N = guesses_N < count
    np.add.at(matrix_CC, (answers.labels_N[known_N], guesses_N[known_N]), 1)
    matrix_CC /= np.maximum(matrix_CC.sum(1, keepdims=True), 1)
    figure, axes = new_figure(width=6.4, height=5.6)
    drawn = axes[0, 0].imshow(matrix_CC, cmap="Blues", vmin=0, vmax=1)
    axes[0, 0].set(xlabel="taken for", ylabel="class")
    if count <= NAMED_CLASSES:
        axes[0, 0].set_xticks(range(count), classes, rotation=90, fontsize=7)
        axes[0, 0].set_yticks(range(count), classes, fontsize=7)
    figure.colorbar(drawn, ax=axes[0, 0], label="share of the class's images")
    write_figure(figure, place / "confusion.png")
    reached = figures(answers)
    low, high = reached["top1_interval"]
    names = [*classes, *(f"output {number}" for number in range(count, int(guesses_N.max(initial=0)) + 1))]
    pairs = confusions(answers, names, CONFUSED)
    rows = [[pair["class"], pair["taken_for"], str(pair["images"]), f"{pair['share']:.1f} %"] for pair in pairs]
    return [
        Text(f"Top-1 {reached['top1']:.2f} % ({low:.2f} to {high:.2f}) of {reached['images']} images."),
        Picture("Confusion matrix, a row a class", _bytes(place, "confusion")),
        Table(("class", "taken for", "images", "of its images"), rows),
    ]


@torch.inference_mode()
def _answers(loaded: LoadedModel, index: ShardIndex, images: int) -> Answers:
    """What the model says about the first images of a set, whose labels are already its own."""
    columns = []
    for images_B3HW, labels_B in loaded.batches(index, images):
        log_p_BC = loaded.model(images_B3HW).float().log_softmax(-1)
        loss_B = -log_p_BC.gather(1, labels_B[:, None])[:, 0]
        guesses_BK = log_p_BC.topk(min(5, log_p_BC.shape[1])).indices
        columns.append((labels_B, guesses_BK, log_p_BC.amax(1).exp(), loss_B))
    labels_N, guesses_NK, confidence_N, loss_N = (torch.cat(column).numpy() for column in zip(*columns, strict=True))
    return Answers(np.arange(len(labels_N)), labels_N, guesses_NK, confidence_N, loss_N)


def _validation_set(loaded: LoadedModel) -> ShardIndex:
    """The run's validation set with labels as the model numbers classes. Raises DataError where there is none."""
    assert loaded.run is not None
    if loaded.data is None:
        raise DataError("the run has no validation set (refiner.data.val is null)")
    index = open_index(loaded.data, loaded.run.refiner.data.cache)
    if not index.count:
        raise DataError(f"{index.folder}: holds no images")
    match = match_classes(index.classes, loaded.classes or [], str(index.folder))
    return index.with_classes(loaded.classes or [], match.labels)


def _refined_vit(loaded: LoadedModel) -> RefinedViT:
    assert isinstance(loaded.model, RefinedViT)
    return loaded.model


def _png(pixels_HWC: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels_HWC).save(buffer, "PNG")
    return buffer.getvalue()


def _bytes(place: Path, name: str) -> bytes:
    return (place / f"{name}.png").read_bytes()


def link_from_tensorboard(folder: RunFolder, out: Path, step: int) -> None:
    """Name the page in TensorBoard's text tab, where the run has one."""
    if folder.tensorboard.is_dir():
        with SummaryWriter(str(folder.tensorboard)) as board:
            board.add_text("gallery", f"[{out.name}]({out.resolve().as_uri()})", step)
