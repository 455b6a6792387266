"""Training Refined-ViT image models under DeepSpeed.

Axis legend for the whole package: B batch, H heads, E expanded maps, N tokens (class token first), P patches, D width,
d head width, C classes, K top-k, h×w a score map's grid.
"""

__version__ = "0.1.0"
