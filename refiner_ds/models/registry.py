"""The names timm knows these models by, and their default configurations.

refiner_vit_s, refiner_vit_m, refiner_vit_l    the released architectures
refined_vit                                    the same skeleton with every option open; the paper's by default
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor

from refiner_ds.models.refined_vit import RefinedViT
from refiner_ds.models.released import fit_to

__all__ = ["checkpoint_filter_fn", "refined_vit", "refiner_vit_l", "refiner_vit_m", "refiner_vit_s"]


def _cfg(**changes: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "fixed_input_size": True,
        "pool_size": None,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "first_conv": "patch_embed.conv1",
        "classifier": ("head", "aux_head"),
        **changes,
    }


default_cfgs = generate_default_cfgs(
    {
        "refiner_vit_s": _cfg(),
        "refiner_vit_m": _cfg(crop_pct=1.0),
        # The released evaluation of the large model resizes the image to 1/1.13 of the crop and pads.
        "refiner_vit_l": _cfg(crop_pct=1.13),
        "refined_vit": _cfg(),
    }
)


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: RefinedViT) -> dict[str, Tensor]:
    """timm's filter between a checkpoint and ``model``: unwrapped, fitted to image size, channels and classes."""
    return fit_to(model, state_dict)[0]


def _create(name: str, pretrained: bool, **options: Any) -> RefinedViT:
    model: Any = build_model_with_cfg(
        RefinedViT,
        name,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": options.pop("out_indices", 3), "feature_cls": "getter"},
        **options,
    )
    if not options.get("return_dense", True):
        model.default_cfg["classifier"] = "head"  # a copy of this model's own, pretrained_cfg by another name
    return model


def _released(name: str, pretrained: bool, sizes: dict[str, int], options: dict[str, Any]) -> RefinedViT:
    released = {"mlp_ratio": 3.0, "layout": "released", "refiner": "bottleneck", "expansion_ratio": 3, "kernel_size": 3}
    return _create(name, pretrained, **{**released, **sizes, **options})


@register_model
def refiner_vit_s(pretrained: bool = False, **options: Any) -> RefinedViT:
    """Refiner-ViT-S as released: 16 blocks of width 384, 12 heads, 25,408,656 parameters; 83.6 % top-1 at 224."""
    return _released("refiner_vit_s", pretrained, {"embed_dim": 384, "depth": 16, "num_heads": 12}, options)


@register_model
def refiner_vit_m(pretrained: bool = False, **options: Any) -> RefinedViT:
    """Refiner-ViT-M as released: 32 blocks of width 420, 12 heads, 55,450,932 parameters; 84.6 % top-1 at 224."""
    return _released("refiner_vit_m", pretrained, {"embed_dim": 420, "depth": 32, "num_heads": 12}, options)


@register_model
def refiner_vit_l(pretrained: bool = False, **options: Any) -> RefinedViT:
    """Refiner-ViT-L as released: 32 blocks of width 512, 16 heads, 81,150,192 parameters; 84.9 % top-1 at 224."""
    return _released("refiner_vit_l", pretrained, {"embed_dim": 512, "depth": 32, "num_heads": 16}, options)


@register_model
def refined_vit(pretrained: bool = False, **options: Any) -> RefinedViT:
    """Any Refined-ViT; see ``RefinedViT`` for the options. By default the paper's 16 blocks of 384 with r = 3."""
    return _create("refined_vit", pretrained, **options)
