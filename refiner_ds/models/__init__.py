"""Refined-ViT and the plain ViT with its skeleton. Importing this registers them with timm.

registry.py     names and default configurations        refined_vit.py   the model
stem.py blocks.py attention.py refiners.py mlp.py       its layers, one idea a file
options.py direct.py                                    what can be built; which weights may be read directly
mix_token.py cos_reg.py                                 what training adds
released.py fuse.py                                     loading released weights; folding norms for inference
"""

from refiner_ds.models.mix_token import NO_BOX, Box, draw_mix_box
from refiner_ds.models.refined_vit import RefinedViT
from refiner_ds.models.registry import checkpoint_filter_fn, refined_vit, refiner_vit_l, refiner_vit_m, refiner_vit_s
from refiner_ds.models.released import load_released_weights
from refiner_ds.models.sync_batch_norm import SyncBatchNorm

__all__ = [
    "NO_BOX",
    "Box",
    "RefinedViT",
    "SyncBatchNorm",
    "checkpoint_filter_fn",
    "draw_mix_box",
    "load_released_weights",
    "refined_vit",
    "refiner_vit_l",
    "refiner_vit_m",
    "refiner_vit_s",
]
