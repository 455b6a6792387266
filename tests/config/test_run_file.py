"""A run file means what it says, or is refused in one sentence that names file and key."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from refiner_ds.config import ConfigError, load
from refiner_ds.config.__main__ import key_table
from refiner_ds.config.reading import QUICKSTART
from refiner_ds.config.run_file_keys import RunFileKeys
from refiner_ds.config.sections import fixed_keys, key_paths, section_in

SMALL = {"refiner": {"data": {"train": "package:digits/train"}}, "train_batch_size": 48}
ROOT = QUICKSTART.parents[1]


def write(folder: Path, keys: dict, name: str = "mine.json") -> Path:
    file = folder / name
    file.write_text(json.dumps(keys))
    return file


def with_key(dotted: str, value: object) -> dict:
    keys = json.loads(json.dumps(SMALL))
    *path, last = dotted.split(".")
    at = keys
    for part in path:
        at = at.setdefault(part, {})
    at[last] = value
    return keys


@pytest.mark.parametrize(
    "dotted, right",
    [
        ("refiner.recipe.warmup_epoch", "did you mean warmup_epochs?"),
        ("refiner.modle", "did you mean model?"),
        ("gradient_cliping", "did you mean gradient_clipping?"),
        ("zero_optimization.stag", "did you mean stage?"),
        ("zero_optimization.offload_optimizer.divice", "did you mean device?"),
        ("bf16.enable", "did you mean enabled?"),
        ("activation_checkpointing.partition_activation", "did you mean partition_activations?"),
        ("flops_profiler.enabeld", "did you mean enabled?"),
        ("epochs", "did you mean refiner.recipe.epochs?"),
        ("optimizer", "refiner.recipe.lr"),
        ("gradient_accumulation_steps", "train_batch_size"),
    ],
)
def test_unknown_keys_are_refused_everywhere_with_the_right_one(tmp_path: Path, dotted: str, right: str) -> None:
    file = write(tmp_path, with_key(dotted, 1))
    with pytest.raises(ConfigError) as refusal:
        load(file)
    assert str(refusal.value).startswith(f"{file}: {dotted} is not a key")
    assert right in str(refusal.value)


@pytest.mark.parametrize(
    "dotted, value, right",
    [
        ("refiner.recipe.lr", "fast", 'is "fast"; it must be a number'),
        ("refiner.recipe.lr", "0.1", "it must be a number"),
        ("refiner.model.depth", 1.5, "it must be a whole number"),
        ("refiner.model.layout", "relased", "it must be 'released' or 'paper'"),
        ("zero_optimization.stage", 4, "it must be 0, 1, 2 or 3"),
        ("refiner.recipe.hflip", 2, "less than or equal to 1"),
        ("refiner.recipe.epochs", 0, "greater than 0"),
        ("refiner.run", [], "it must be an object"),
        ("refiner.data.train", None, "it must be a string"),
        ("refiner.model.stem_chs", [1, 2], "it must be a list of 3 whole numbers"),
        ("refiner.recipe.crop_scale", [1.0, 0.1], "the smaller first"),
        ("refiner.recipe.warmup_epochs", 400, "fewer than refiner.recipe.epochs"),
        ("zero_optimization.offload_optimizer.device", "nvme", "it must be 'none' or 'cpu'"),
        ("zero_optimization.offload_param.device", "disk", "it must be 'none' or 'cpu'"),
    ],
)
def test_wrong_values_are_refused_with_what_would_be_right(
    tmp_path: Path, dotted: str, value: object, right: str
) -> None:
    file = write(tmp_path, with_key(dotted, value))
    with pytest.raises(ConfigError) as refusal:
        load(file)
    assert str(refusal.value).startswith(f"{file}: {dotted} ")
    assert right in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_default_that_does_not_go_with_a_value_is_shown(tmp_path: Path) -> None:
    file = write(tmp_path, with_key("refiner.recipe.epochs", 3))
    with pytest.raises(
        ConfigError, match="refiner.recipe.warmup_epochs is 5; it must be fewer than refiner.recipe.epochs"
    ):
        load(file)


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path, SMALL)
    with pytest.raises(ConfigError, match=r"mien.json: no such run file; did you mean .*mine.json\?"):
        load(tmp_path / "mien.json")


def test_broken_json_names_the_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text('{\n "refiner": {,}\n}')
    with pytest.raises(ConfigError, match="line 2 is not JSON"):
        load(file)


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text('{"train_batch_size": 1, "train_batch_size": 2}')
    with pytest.raises(ConfigError, match="train_batch_size stands twice"):
        load(file)


def test_extends_chains_and_later_layers_win(tmp_path: Path) -> None:
    write(tmp_path, with_key("refiner.recipe", {"epochs": 1, "lr": 0.5, "warmup_epochs": 0}), "base.json")
    (tmp_path / "deeper").mkdir()
    write(tmp_path, {"extends": "base.json", "refiner": {"recipe": {"epochs": 2}}}, "middle.json")
    top = write(tmp_path / "deeper", {"extends": "../middle.json", "bf16": {"enabled": False}}, "top.json")
    run = load(top, ["refiner.recipe.hflip=0.25", "refiner.run.name=other"])
    recipe = run.refiner.recipe
    assert (recipe.epochs, recipe.lr, recipe.hflip, run.folder.name) == (2, 0.5, 0.25, "other")
    assert run.keys.bf16.enabled is False and run.keys.train_batch_size == 48


def test_a_mistake_is_laid_at_the_door_of_the_file_that_made_it(tmp_path: Path) -> None:
    base = write(tmp_path, with_key("refiner.recipe.lr", "fast"), "base.json")
    top = write(tmp_path, {"extends": "base.json", "train_batch_size": 4}, "top.json")
    with pytest.raises(ConfigError, match=f"^{base}: refiner.recipe.lr"):
        load(top)
    with pytest.raises(ConfigError, match="^--set train_batch_size=x: train_batch_size"):
        load(top, ["refiner.recipe.lr=1", "train_batch_size=x"])


@pytest.mark.parametrize(
    ("stage", "section", "right"),
    [
        (0, "offload_optimizer", "stages 1 to 3 offload the optimizer"),
        (1, "offload_param", "stage 3 offloads parameters"),
        (2, "offload_param", "stage 3 offloads parameters"),
    ],
)
def test_offload_is_refused_at_stages_that_would_ignore_it(stage: int, section: str, right: str) -> None:
    sets = [f"zero_optimization.stage={stage}", f'zero_optimization.{section}={{"device": "cpu"}}']
    with pytest.raises(ConfigError, match=f"{section} is .*; it must be null at stage {stage}; {right}$"):
        load(None, sets)
    load(None, [sets[0], f'zero_optimization.{section}={{"device": "none"}}'])


@pytest.mark.parametrize(
    ("sets", "right"),
    [
        (
            ["zero_optimization.stage=0", "data_types.grad_accum_dtype=bf16", "bf16.enabled=false"],
            "grad_accum_dtype .*must be null at .*stage 0: ",
        ),
        (
            ["zero_optimization.stage=0", "data_types.grad_accum_dtype=fp32"],
            "grad_accum_dtype .*must be null at .*stage 0 in bf16: ",
        ),
        (["zero_optimization.stage=2", "prescale_gradients=true"], "reduce_scatter .*must be false with prescale"),
        (["zero_optimization.stage=3", "gradient_predivide_factor=2"], "reduce_scatter .*must be false with prescale"),
    ],
)
def test_what_deepspeed_would_end_in_a_traceback_for_is_refused(sets: list[str], right: str) -> None:
    with pytest.raises(ConfigError, match=right):
        load(None, sets)


def test_what_deepspeed_can_do_together_is_not_refused() -> None:
    accumulated = load(None, ["zero_optimization.stage=0", "data_types.grad_accum_dtype=fp32", "bf16.enabled=false"])
    assert accumulated.keys.data_types is not None and accumulated.keys.data_types.grad_accum_dtype == "fp32"
    assert load(
        None, ["zero_optimization.stage=1", "prescale_gradients=true", "data_types.grad_accum_dtype=bf16"]
    ).keys.prescale_gradients
    load(None, ["zero_optimization.stage=3", "gradient_predivide_factor=1"])
    load(None, ["zero_optimization.stage=2", "prescale_gradients=true", "zero_optimization.reduce_scatter=false"])


def test_circles_of_extends_are_refused(tmp_path: Path) -> None:
    write(tmp_path, {"extends": "b.json"}, "a.json")
    write(tmp_path, {"extends": "a.json"}, "b.json")
    with pytest.raises(ConfigError, match="circle"):
        load(tmp_path / "a.json")


def test_the_resolved_file_repeats_the_run_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = load(QUICKSTART, ["refiner.recipe.epochs=3", "refiner.run.output=out"])
    file = write(tmp_path, run.resolved(), "config.json")
    monkeypatch.chdir("/")
    again = load(file)
    assert again.folder == run.folder == tmp_path / "out" / "quickstart"
    assert again.resolved() == run.resolved()


@pytest.mark.parametrize("file", sorted(QUICKSTART.parent.glob("*.json")), ids=lambda file: file.stem)
def test_every_shipped_run_file_is_valid(file: Path) -> None:
    assert load(file).keys.about


def test_declared_deepspeed_keys_are_the_installed_deepspeeds() -> None:
    """A key that DeepSpeed does not know would be ignored by it; this fails when a release drops or renames one."""
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime import constants
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    def declared(*path: str) -> set[str]:
        section: type = RunFileKeys
        for key in path:
            section = section_in(section.model_fields[key].annotation)  # type: ignore[attr-defined,assignment]
        return set(section.model_fields)  # type: ignore[attr-defined]

    def known(model: type) -> set[str]:
        fields = model.model_fields  # type: ignore[attr-defined]
        return set(fields) | {field.alias for field in fields.values() if field.alias}

    zero = "zero_optimization"
    assert declared(zero) <= known(DeepSpeedZeroConfig)
    assert declared(zero, "offload_optimizer") <= known(DeepSpeedZeroOffloadOptimizerConfig)
    assert declared(zero, "offload_param") <= known(DeepSpeedZeroOffloadParamConfig)
    assert declared("bf16") <= known(DeepSpeedBF16Config)
    assert declared("comms_logger") <= known(CommsLoggerConfig)
    words = {value for value in vars(constants).values() if isinstance(value, str)}
    words |= {"flops_profiler", "activation_checkpointing", "zero_optimization", "comms_logger"}
    assert declared() - {"extends", "refiner", "about"} <= words


@pytest.mark.parametrize(
    "row",
    [
        "| `eval_epochs` | number | `1` | may change | epochs between evaluations; the end is always evaluated |",
        "| `stage` | 0 or 1 or 2 or 3 | `0` | may change | 0: nothing; 1: optimizer states; 2: and gradients;"
        " 3: and parameters |",
        "| `ema_decay` | number | `0.99996` | may change | decay of the EMA weights at each step; 0: no EMA |",
        "| `val` | string or null | `null` | may change | validation set, named like train; null: no evaluation |",
        "| `mean` | list of 3 numbers | `[0.5, 0.5, 0.5]` | fixed | channel means, images in [0, 1] |",
        '| `enabled` | true or false or "auto" | `"auto"` | may change |'
        " auto: on where the accelerator computes bf16 natively (not on CPUs) |",
        "| `score_maps` | true or false | `false` | fixed | train on the relabel score maps stored beside the images |",
        "| `num_heads` | whole number or null | `null` | fixed | heads H |",
        "| `min_lr` | number | `1e-05` | may change |"
        " learning rate at the end of the cosine and in the cool-down (not scaled) |",
        "| `prof_ops` | list of strings or null | `null` | may change |"
        " names of the collectives to log, such as all_reduce |",
    ],
)
def test_a_row_of_the_key_table_says_what_a_run_file_would_hold(row: str) -> None:
    assert row in key_table().splitlines()


def test_every_key_says_what_it_does() -> None:
    rows = [row.split(" | ") for row in key_table().splitlines() if row.startswith("| `")]
    assert len(rows) > 100
    vague = [row for row in rows if len(row) != 5 or len(row[4].split()) < 3 and row[4] not in SHORT]
    assert not vague


SHORT = {"heads H |", "width D |"}  # meanings that a practitioner needs no more words for


def test_the_documented_keys_are_the_schemas() -> None:
    page = (ROOT / "docs" / "run_file.md").read_text()
    assert key_table().rstrip() in page, "docs/run_file.md is old: make docs"


def test_a_key_is_fixed_unless_the_schema_marks_it() -> None:
    fixed, all_keys = set(fixed_keys()), set(key_paths())
    assert {f"refiner.model.{key}" for key in ("kernel_size", "constraint", "expand", "reduce", "mlp_ratio")} <= fixed
    assert {"refiner.model.stem_chs", "refiner.model.num_classes", "refiner.run.seed", "train_batch_size"} <= fixed
    assert not {"refiner.recipe.lr", "refiner.run.output", "zero_optimization.stage", "bf16.enabled"} & fixed
    assert fixed < all_keys


def test_marked_keys_exist() -> None:
    sections = [RunFileKeys]
    for section in sections:
        assert section.may_change <= set(section.model_fields), section.__name__
        sections += filter(None, (section_in(field.annotation) for field in section.model_fields.values()))
