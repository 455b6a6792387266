"""The run file: one JSON object that is the whole run, and a valid DeepSpeed configuration at the same time.

``load`` reads and checks one; ``python -m refiner_ds.config`` prints the table of keys. Nothing here imports torch.
"""

from refiner_ds.config.batch import BatchPlan
from refiner_ds.config.reading import RunFile, load
from refiner_ds.errors import ConfigError

__all__ = ["BatchPlan", "ConfigError", "RunFile", "load"]
