"""Every key of the project's own part of a run file: its type, default, unit and meaning.

    {"extends": "other.json", "refiner": {"model": …, "data": …, "recipe": …, "run": …}, …DeepSpeed's own keys…}

The table of keys in the docs is printed from here (``python -m refiner_ds.config``).
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

Fraction = Annotated[float, Field(ge=0, le=1)]
Pair = tuple[float, float]


def _rising(pair: Pair) -> Pair:
    if not 0 < pair[0] <= pair[1]:
        raise ValueError("must be two numbers above 0, the smaller first")
    return pair


def _steps_in_turn(pair: tuple[int, int]) -> tuple[int, int]:
    if not 0 < pair[0] <= pair[1]:
        raise ValueError("must be two steps counted from 1, the first not after the last")
    return pair


Range = Annotated[Pair, AfterValidator(_rising)]
Triple = tuple[float, float, float]


class Section(BaseModel):
    """One object of a run file; an unknown key is refused.

    A run folder is continued only with the values that it was begun with, apart from the keys in ``may_change``: those
    that leave it the same run.
    """

    may_change: ClassVar[frozenset[str]] = frozenset()
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelKeys(Section):
    """``refiner.model``: which network. Keys left null keep what the named model defines."""

    may_change = frozenset(
        {
            "drop_path",
            "drop",
            "attn_drop",
            "cos_reg",
            "cos_reg_pairs",
            "attention",
            "save_for_backward",
            "checkpointing",
            "compile",
        }  # fmt: skip
    )

    name: str = Field("refiner_vit_s", description="timm name of the model, e.g. refiner_vit_s, refined_vit")
    img_size: int = Field(224, gt=0, description="side of the square input, pixels")
    num_classes: int | None = Field(None, gt=0, description="classes; null: as many as the training set names")
    drop_path: Fraction = Field(0.0, description="stochastic depth rate of the last block; rises linearly from 0")
    drop: Fraction = Field(0.0, description="dropout rate after projections and in MLPs")
    attn_drop: Fraction = Field(0.0, description="dropout rate on the attention maps of blocks that compute their own")
    depth: int | None = Field(None, gt=0, description="number of blocks")
    embed_dim: int | None = Field(None, gt=0, description="width D")
    num_heads: int | None = Field(None, gt=0, description="heads H")
    mlp_ratio: float | None = Field(None, gt=0, description="hidden width of an MLP, as a multiple of D")
    patch_size: int | None = Field(None, gt=0, description="side of a patch, pixels")
    stem_chs: tuple[int, int, int] | None = Field(None, description="channels of the stem's three convolutions")
    layout: Literal["released", "paper"] | None = Field(
        None,
        description="released: blocks compute and refine maps in turn; paper: every block refines its own",
    )
    refiner: Literal["none", "linear", "bottleneck"] | None = Field(
        None, description="how attention maps are refined; none: a plain ViT"
    )
    expansion_ratio: float | None = Field(None, gt=0, description="expansion ratio r: expanded maps per head")
    kernel_size: int | None = Field(None, gt=0, description="side k of the kernel of distributed local attention")
    expand: bool | None = Field(None, description="false: distributed local attention alone, without head expansion")
    reduce: bool | None = Field(None, description="reduce expanded maps to H before they multiply the values")
    constraint: Literal["none", "spatial", "row+col"] | None = Field(
        None,
        description="none: kernels over queries and keys; spatial: k×k over the patch grid; row+col: 1×k and k×1 there",
    )
    init_from: str | None = Field(
        None,
        description="weights a fresh run starts from, fitted to img_size and classes: a run folder or checkpoint (its"
        " EMA weights), a .safetensors file or a released one; null: random",
    )
    init_layers: list[str] | None = Field(
        None,
        description='with init_from: what is taken from it, by name, prefix or pattern: ["patch_embed"]; the rest'
        " starts afresh; null: everything",
    )
    reset_head: bool = Field(False, description="with init_from: leave the heads as freshly initialised")
    freeze: list[str] = Field(
        [],
        description='parameters that are not trained, by name, prefix or pattern: ["patch_embed", "blocks.[0-3]"];'
        " batch norms frozen whole use their running statistics",
    )
    return_dense: bool | None = Field(
        None,
        description="train a dense (auxiliary) head on patches beside the class head; false: the class head alone;"
        " null: true",
    )
    sync_batch_norm: bool = Field(
        False,
        description="in training, batch norms take the statistics of the micro-batches of all ranks; refiners are then"
        " computed by eager",
    )
    cos_reg: float = Field(
        0.0, ge=0, description="weight of the cosine similarity of neighbouring blocks' maps along heads; released: 0.1"
    )
    cos_reg_pairs: int | None = Field(
        None, gt=0, description="neighbouring pairs of blocks that cos_reg compares, from the first on; null: all"
    )
    attention: Literal["auto", "eager", "eager compiled", "tiled", "triton"] | None = Field(
        "auto",
        description="backend of refined attention; $REFINER_ATTENTION overrides it; auto: the fastest on the run's"
        " shapes, timed when the run begins; eager compiled: eager through torch.compile; null: triton on a GPU, else"
        " tiled, and nothing is timed",
    )
    save_for_backward: Literal["auto", "map", "activations"] = Field(
        "auto",
        description="what a tiled or triton refiner saves for backward: the attention map alone, or two activations"
        " of the refiner too (five times the bytes, less to recompute); auto decides by the device's memory",
    )
    checkpointing: Literal["none", "pair", "block", "refiner"] = Field(
        "none", description="what is recomputed in backward: a pair of blocks, each block, only the refiner"
    )
    compile: Literal["none", "inductor", "aot_eager"] = Field(
        "none",
        description="backend of torch.compile for the model in training; inductor fuses and generates code, aot_eager"
        " only traces; ZeRO stages 0 to 2",
    )

    @model_validator(mode="after")
    def _takes_from_somewhere(self) -> Self:
        if self.init_from is None and self.init_layers is not None:
            raise ValueError("init_layers must be null where init_from is null")
        if self.init_from is None and self.reset_head:
            raise ValueError("reset_head must be false where init_from is null")
        return self


class SetKeys(Section):
    """The part of ``refiner.data`` about the sets, and how evaluation looks at them."""

    train: str = Field(
        ..., description="training set: folder of shards, class folders, an address, or package:digits/train"
    )
    images: int | None = Field(
        None, gt=0, description="number of training images, for --check without the shards; must agree with the index"
    )
    val: str | None = Field(None, description="validation set, named like train; null: no evaluation")
    score_maps: bool = Field(False, description="train on the relabel score maps stored beside the images")
    maps: str | None = Field(
        None, description="folder or address of the score maps; null: beside the images, or in the folder <train>.maps"
    )
    workers: int = Field(4, ge=0, description="loader processes per rank; 0 loads in the training process")
    cache: str | None = Field(
        None, description="folder for downloaded and generated sets; null: $REFINER_DS_CACHE, or ~/.cache/refiner_ds"
    )
    eval_crop_ratio: float = Field(
        0.9, gt=0, description="evaluation: side of the centre crop over side of the resized image; above 1 pads"
    )
    eval_batch: int | None = Field(
        None, gt=0, description="images per rank and batch in evaluation; null: the micro-batch"
    )
    mean: Triple = Field((0.5, 0.5, 0.5), description="channel means, images in [0, 1]")
    std: Triple = Field((0.5, 0.5, 0.5), description="channel standard deviations, images in [0, 1]")
    on_bad_sample: Literal["error", "skip"] = Field(
        "error", description="what a damaged sample does: end the run, or be skipped and counted"
    )

    @model_validator(mode="after")
    def _maps_are_used(self) -> Self:
        if self.maps is not None and not self.score_maps:
            raise ValueError("maps must be null where score_maps is false")
        return self


class DecodeKeys(Section):
    """The part of ``refiner.data`` about decoding images; `refiner_ds.data.decoding` reads it as it is."""

    max_megapixels: float = Field(
        178.95697,
        gt=0,
        description="images with more pixels are damaged samples (decompression bombs); the default is Pillow's limit",
    )
    exif_orientation: bool = Field(
        False, description="turn images as their EXIF orientation says; torchvision and timm do not"
    )


class DataKeys(DecodeKeys, SetKeys):
    """``refiner.data``: where samples come from and how evaluation looks at them."""

    may_change = frozenset(
        {
            "train", "maps", "images", "val", "workers", "cache", "eval_crop_ratio", "eval_batch", "on_bad_sample",
            "max_megapixels",
        }
    )  # fmt: skip

    @model_validator(mode="after")
    def _maps_fit_their_images(self) -> Self:
        if self.exif_orientation and self.score_maps:
            raise ValueError("exif_orientation must be false where score_maps is true: maps are of images as stored")
        return self


class OptimizerKeys(Section):
    """The part of ``refiner.recipe`` about optimisation."""

    epochs: float = Field(300, gt=0, description="epochs of the schedule, warm-up included; cooldown_epochs follow")
    lr: float = Field(5e-4, gt=0, description="peak learning rate for a global batch of lr_batch images")
    lr_batch: int | None = Field(
        512, gt=0, description="lr is scaled by global batch / lr_batch; null: lr as it stands"
    )
    schedule: Literal["cosine", "constant"] = Field("cosine", description="learning rate after warm-up")
    min_lr: float = Field(
        1e-5, ge=0, description="learning rate at the end of the cosine and in the cool-down (not scaled)"
    )
    warmup_epochs: float = Field(5, ge=0, description="linear warm-up, epochs")
    warmup_lr: float = Field(1e-6, ge=0, description="learning rate warm-up starts at (not scaled)")
    cooldown_epochs: float = Field(10, ge=0, description="epochs at min_lr at the end")
    weight_decay: float = Field(
        0.05,
        ge=0,
        description="AdamW's decoupled weight decay; 1-D parameters, position embedding and class token have none",
    )
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="learning rate of a layer over that of the next one (layer-wise decay); null: all alike"
    )
    betas: Pair = Field((0.9, 0.999), description="decay rates of AdamW's first and second moments")
    eps: float = Field(1e-8, gt=0, description="added to the denominator of AdamW's update")
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.99996, description="decay of the EMA weights at each step; 0: no EMA"
    )
    ema_warmup: bool = Field(
        True, description="decay of step n is at most (1+n)/(10+n), so that fresh weights and statistics are forgotten"
    )

    @property
    def all_epochs(self) -> float:
        """Epochs of a whole run, cool-down included."""
        return self.epochs + self.cooldown_epochs


class AugmentKeys(Section):
    """The part of ``refiner.recipe`` about one training view; `refiner_ds.data.augment` reads it as it is."""

    crop_scale: Range = Field(
        (0.08, 1.0), description="range of the area of a random resized crop, as a share of the image"
    )
    crop_ratio: Range = Field((3 / 4, 4 / 3), description="range of the aspect ratio of a random resized crop")
    hflip: Fraction = Field(0.5, description="probability of a horizontal flip")
    auto_augment: str = Field("rand-m9-mstd0.5-inc1", description="timm's auto-augment string; empty: none")
    color_jitter: float = Field(0.4, ge=0, description="colour jitter, inactive when auto_augment is set")
    interpolation: Literal["random", "bilinear", "bicubic"] = Field(
        "random", description="resampling of training crops"
    )
    random_erasing: Fraction = Field(0.25, description="probability of random erasing")
    random_erasing_mode: Literal["const", "rand", "pixel"] = Field(
        "pixel", description="fill of erased areas: the mean colour, one random colour, or random pixels"
    )


class MixKeys(Section):
    """The part of ``refiner.recipe`` about mixing the images of a batch."""

    mixup: float = Field(0.8, ge=0, description="Beta parameter of mixup; 0: off")
    cutmix: float = Field(1.0, ge=0, description="Beta parameter of CutMix; 0: off")
    mix_probability: Fraction = Field(1.0, description="probability that a batch is mixed at all")
    mixup_off_epoch: float = Field(0, ge=0, description="epoch from which mixup and CutMix are off; 0: never")
    mix_switch: Fraction = Field(0.5, description="probability of CutMix rather than mixup where both are on")


class RecipeKeys(MixKeys, AugmentKeys, OptimizerKeys):
    """``refiner.recipe``: optimisation, augmentation and labels. Defaults are the released recipe."""

    aug_repeats: int = Field(
        1,
        gt=0,
        description="repeated augmentation: views of an image that a batch holds (DeiT: 3); an epoch then sees only so"
        " many times fewer images; 1: off",
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.1, description="y·(1−ε+ε/C)+ε/C on dense targets, timm's on labels"
    )
    mix_token: bool = Field(
        False, description="mix the patch tokens of two images after the stem, and their labels (MixToken)"
    )
    dense_weight: float = Field(
        0.5, ge=0, description="weight of the dense (patch) loss; without a dense head there is none"
    )
    cls_weight: float = Field(1.0, ge=0, description="weight of the class loss")

    @model_validator(mode="after")
    def _warm_up_ends(self) -> Self:
        if self.warmup_epochs and self.warmup_epochs >= self.epochs:
            raise ValueError("warmup_epochs must be fewer than refiner.recipe.epochs")
        return self


class RunKeys(Section):
    """``refiner.run``: where results go and how often."""

    may_change = frozenset(
        {
            "output",
            "name",
            "log_steps",
            "eval_epochs",
            "picture_epochs",
            "peak_tflops",
            "profile_steps",
            "checkpoint_epochs",
            "checkpoint_steps",
            "checkpoint_minutes",
            "checkpoint_split_gib",
            "keep_checkpoints",
            "keep_best",
            "best_metric",
            "keep_epochs",
            "timeout_minutes",
            "hang_seconds",
            "on_divergence",
            "rollbacks",
            "spike_sigmas",
            "spike_window",
        }
    )

    output: str = Field("runs", description="folder that holds run folders")
    name: str | None = Field(None, description="name of the run folder; null: the run file's own name")
    seed: int = Field(42, ge=0, description="seed of everything random")
    log_steps: int = Field(50, gt=0, description="optimizer steps between lines of metrics.jsonl")
    eval_epochs: float = Field(1, gt=0, description="epochs between evaluations; the end is always evaluated")
    checkpoint_epochs: float | None = Field(
        1, gt=0, description="epochs between checkpoints; null: epochs do not matter; the end is always saved"
    )
    checkpoint_steps: int | None = Field(None, gt=0, description="optimizer steps between checkpoints, as well")
    checkpoint_minutes: float | None = Field(None, gt=0, description="minutes between checkpoints, as well")
    checkpoint_split_gib: float = Field(
        8, gt=0, description="size of a checkpoint, GiB, above which each rank writes a part of it"
    )
    keep_checkpoints: int = Field(3, gt=0, description="number of newest checkpoints kept")
    keep_best: int = Field(1, ge=0, description="number of best checkpoints kept besides, by best_metric")
    best_metric: Literal["ema/top1", "ema/top5", "ema/loss", "model/top1", "model/top5", "model/loss"] = Field(
        "ema/top1", description="weights and metric that decide which checkpoints are best, among those evaluated"
    )
    keep_epochs: float | None = Field(
        None, gt=0, description="epochs between checkpoints that are kept for good; null: none are"
    )
    picture_epochs: float | None = Field(
        10,
        gt=0,
        description="epochs between pictures in TensorBoard: training views with labels, attention maps; null: none",
    )
    peak_tflops: float | None = Field(
        None,
        gt=0,
        description="dense bf16 peak of a device, TFLOP/s, that MFU is a share of; null: what its data sheet says",
    )
    profile_steps: Annotated[tuple[int, int], AfterValidator(_steps_in_turn)] | None = Field(
        None,
        description="first and last step whose trace by torch.profiler is written to profiles/; null: none, but a live"
        " run can be asked for one",
    )
    timeout_minutes: float = Field(
        30, gt=0, description="minutes that a collective, a save or the first step may take before it is an error"
    )
    hang_seconds: float = Field(
        25,
        ge=0,
        description="standstill of a step, seconds and at least four recent steps, after which the rank that all wait"
        " for is named and all leave with exit code 75; 0: never",
    )
    on_divergence: Literal["stop", "rollback", "skip"] = Field(
        "stop",
        description="what follows a step whose loss or gradient norm is not finite or a spike: exit code 3; back to the"
        " newest checkpoint, and its samples left out if it goes wrong again; or the step skipped, each then waiting"
        " for the device",
    )
    rollbacks: int = Field(3, ge=0, description="number of times a run may go back for on_divergence")
    spike_sigmas: float | None = Field(
        None, gt=0, description="standard deviations above the mean of recent steps that make a spike; null: none does"
    )
    spike_window: int = Field(100, ge=10, description="number of recent steps that spike_sigmas looks at")

    @field_validator("output", "name")
    @classmethod
    def _on_one_line(cls, value: str | None) -> str | None:
        if value is not None and not value.isprintable():
            raise ValueError("be on one line, without control characters")
        return value


class RefinerKeys(Section):
    """``refiner``: the project's own part of a run file."""

    may_change = frozenset({"recipe"})

    model: ModelKeys = Field(default_factory=ModelKeys)
    data: DataKeys
    recipe: RecipeKeys = Field(default_factory=RecipeKeys)
    run: RunKeys = Field(default_factory=RunKeys)

    @model_validator(mode="after")
    def _patches_have_a_head(self) -> Self:
        if self.recipe.mix_token and self.model.return_dense is False:
            raise ValueError("recipe.mix_token mixes labels of patches: set refiner.model.return_dense to true")
        return self
