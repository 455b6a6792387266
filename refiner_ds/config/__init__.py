"""The run file: one JSON object that is the whole run, and a valid DeepSpeed configuration at the same time.

``load`` reads and checks one; ``python -m refiner_ds.config`` prints the table of keys. Nothing here imports torch.
"""

from ..errors import ConfigError
from .batch import BatchPlan
from .reading import RunFile, load

__all__ = ["BatchPlan", "ConfigError", "RunFile", "load"]
