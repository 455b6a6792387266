"""The run file: one JSON object that is the whole run, and a valid DeepSpeed configuration at the same time.

``load`` reads and checks one; ``python -m refiner_ds.config`` prints the table of keys. Nothing here imports torch.
"""

from importlib.util import find_spec

if find_spec("pydantic") is None:  # what everything but the models begins with
    missing = "pydantic is missing: install refiner_ds[train], which trains and makes data"
    raise ModuleNotFoundError(missing, name="pydantic")

from refiner_ds.config.batch import BatchSplit
from refiner_ds.config.reading import RunFile, load
from refiner_ds.errors import ConfigError

__all__ = ["BatchSplit", "ConfigError", "RunFile", "load"]
