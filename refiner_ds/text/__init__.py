"""Refiners in the encoders of Hugging Face transformers, on its own libraries (the extra "text").

    options.py     kind, ratio, kernel, initial values         refiners.py   one layer's refiner as a module
    encoders.py    which layers are refined, and refusals      interface.py  what transformers calls
    adding.py      refiners in a model's layers                loaded.py     what a checkpoint brought for them
    mean_statistics.py   of bottlenecks on several processes

Importing this room makes ``attn_implementation="refiner"`` known to transformers, whose ``from_pretrained`` then loads
refined checkpoints too. Models of other implementations are as before.
"""

try:
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError('refiner_ds.text needs transformers: pip install "refiner_ds[text]"') from error

from refiner_ds.text.adding import add_refiner, register_building
from refiner_ds.text.interface import register_interface
from refiner_ds.text.options import RefinerOptions

__all__ = ["RefinerOptions", "add_refiner"]

register_interface()
register_building()
