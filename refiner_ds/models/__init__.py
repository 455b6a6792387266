"""Refined-ViT and its plain twin. Importing this registers them with timm.

registry.py     names and default configurations    refined_vit.py  the model
stem.py blocks.py attention.py refiners.py          its layers, one idea a file
lean_mlp.py                                         an MLP that keeps less for backward
mixing.py cos_reg.py checkpointing.py               what training adds
released.py fuse.py                                 loading released weights; folding norms for inference
"""

from refiner_ds.models.mixing import NO_BOX, Box, draw_mix_box
from refiner_ds.models.refined_vit import RefinedViT
from refiner_ds.models.registry import refined_vit, refiner_vit_l, refiner_vit_m, refiner_vit_s
from refiner_ds.models.released import load_released_weights

__all__ = [
    "NO_BOX",
    "Box",
    "RefinedViT",
    "draw_mix_box",
    "load_released_weights",
    "refined_vit",
    "refiner_vit_l",
    "refiner_vit_m",
    "refiner_vit_s",
]
