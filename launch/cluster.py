"""A site's profile: what differs from one cluster to the next and has no place in a recipe.

    partition: gpu
    hours: 24

``launch/clusters/example.yaml`` shows every key. A flag of ``launch/submit.py`` overrides the key of its name.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from refiner_ds.errors import ConfigError
from refiner_ds.gpus import gpu

from .flags import Flags, refuse_sbatch_flags, refuse_srun_flags
from .slurm_time import minutes_of

GPU_COUNT = re.compile(r"(?:([A-Za-z][\w.+-]*):)?(\d+)")  # 8, or h100:8 where a cluster has several types


class ClusterProfile(BaseModel):
    """Keys of a cluster profile. Keys left null are left to Slurm, or follow from what the partition's nodes have."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    partition: str | None = Field(None, description="partition to submit to")
    account: str | None = Field(None, description="account that is charged")
    qos: str | None = Field(None, description="quality of service")
    constraint: str | None = Field(None, description="features a node must have")
    hours: float | None = Field(None, gt=0, description="time limit of one job in hours; a longer run is requeued")
    time: str | int | None = Field(None, description="the same as Slurm writes it: 1-00:00:00, 12:30:00, or minutes")
    signal_seconds: int = Field(120, ge=1, description="seconds before the time limit at which the job saves")
    requeue: bool = Field(True, description="false: the job ends where it would be requeued")
    grow_minutes: float = Field(
        10, gt=0, description="how often a job that has fewer nodes than it asked for looks for free ones"
    )
    requeues: int = Field(100, ge=0, description="how often a job may requeue itself before it is left to a person")
    gpus_per_node: int | str | None = Field(
        None, description="GPUs, and so processes, a node; h100:8 names a type; 0: train on CPU; null: what nodes have"
    )
    gpu: str | None = Field(None, description="name of the GPU, for the plan, such as h200; null: the type Slurm names")
    tasks_per_node: int = Field(1, ge=1, description="processes a node where there are no GPUs")
    cpus_per_task: int | None = Field(None, gt=0, description="cores a process; null: its share of a node's")
    mem_gb: float | None = Field(None, gt=0, description="memory a node, GB; null: the share of its GPUs")
    master_addr: str = Field(
        "name", description="how the first node is reached: its name, its address, or an interface such as ib0"
    )
    health_check: bool = Field(True, description="check every node's GPUs, disks and shared memory before training")
    notify: str | None = Field(
        None, description="shell command at start, requeue, failure and end; REFINER_EVENT and REFINER_MESSAGE are set"
    )
    setup: list[str] = Field([], description="shell lines before the job starts, such as: module load cuda")
    environment: dict[str, str] = Field({}, description="environment variables of the job")
    node_environment: dict[str, dict[str, str]] = Field(
        {}, description="further variables for nodes whose name matches a pattern, such as dgx*"
    )
    sbatch: Flags = Field({}, description="further sbatch flags, such as {reservation: maths}")
    srun: Flags = Field({}, description="further srun flags, such as {cpu-bind: cores}")

    @field_validator("environment", "node_environment", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        # NCCL_DEBUG: 1 is a number to YAML and text to a process
        if isinstance(value, dict):
            return {key: cls._as_text(word) for key, word in value.items()}
        return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value

    @field_validator("gpus_per_node")
    @classmethod
    def _gpu_count(cls, value: int | str | None) -> int | str | None:
        if value is not None and not GPU_COUNT.fullmatch(str(value)):
            raise ValueError(f"is {value!r}; it must be a number, or a type and a number such as h100:8")
        return int(str(value)) if str(value).isdigit() else value

    @field_validator("gpu")
    @classmethod
    def _known_gpu(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                gpu(value)
            except ConfigError as error:
                raise ValueError(f"is {value!r}: {error}") from None
        return value

    @field_validator("time")
    @classmethod
    def _slurm_time(cls, value: str | int | None) -> str | None:
        if value is not None and not minutes_of(str(value)):
            raise ValueError(f"is {value!r}; it must be a time as Slurm writes it, such as 1-00:00:00, 12:30:00 or 90")
        return None if value is None else str(value)

    @field_validator("sbatch")
    @classmethod
    def _sbatch_flags(cls, flags: Flags) -> Flags:
        return refuse_sbatch_flags(flags)

    @field_validator("srun")
    @classmethod
    def _srun_flags(cls, flags: Flags) -> Flags:
        return refuse_srun_flags(flags)

    @model_validator(mode="after")
    def _one_time(self) -> Self:
        if self.hours is not None and self.time is not None:
            raise ValueError("hours and time both give the time limit; keep one")
        return self

    @property
    def minutes(self) -> int | None:
        """The time limit in whole minutes, as Slurm takes it."""
        if self.time is not None:
            return minutes_of(str(self.time))
        return None if self.hours is None else max(1, round(self.hours * 60))

    @property
    def gpus(self) -> int | None:
        """GPUs a node, without their type; None where the profile leaves it to the partition."""
        found = GPU_COUNT.fullmatch(str(self.gpus_per_node))
        return int(found[2]) if found else None


def load_profile(file: Path | None, overrides: dict[str, Any]) -> ClusterProfile:
    """Read a profile and put command-line flags over it.

    Args:
        file: YAML; None: Slurm's own defaults.
        overrides: keys given as flags; None means not given.
    Raises:
        ConfigError: the file cannot be read, or a key is unknown or of the wrong kind.
    """
    keys = _read(file) if file else {}
    given = {key: value for key, value in overrides.items() if value is not None}
    if given.keys() & {"hours", "time"}:  # a flag overrides the file's limit in whichever form it stands
        keys = {key: value for key, value in keys.items() if key not in ("hours", "time")}
    try:
        return ClusterProfile.model_validate({**keys, **given})
    except ValidationError as error:
        raise ConfigError(_sentence(error, file, given)) from None


class _Loader(yaml.SafeLoader):
    """YAML in which 12:30:00 is a text: the sexagesimal integers of YAML 1.1 would make it 45000."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:int"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?\d+$"), list("-+0123456789"))


def _read(file: Path) -> dict[str, Any]:
    try:
        keys = yaml.load(file.read_text(), _Loader)
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such cluster profile; launch/clusters/example.yaml is one to copy") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read as a cluster profile: {error}") from None
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f"line {where.line + 1} " if where else ""
        raise ConfigError(f"{file}: {line}is not YAML: {getattr(error, 'problem', error)}") from None
    if keys is None:
        return {}
    if not isinstance(keys, dict):
        raise ConfigError(f"{file}: a cluster profile is keys and values, such as partition: gpu")
    return keys


def _sentence(error: ValidationError, file: Path | None, given: dict[str, Any]) -> str:
    # A misspelt key also leaves its right name unset: the misspelling is the thing to name.
    first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
    key = ".".join(str(part) for part in first["loc"] if part not in ("str", "int", "bool"))
    if first["type"] == "extra_forbidden":
        known = ClusterProfile.model_fields
        near = difflib.get_close_matches(key, known, 1)
        hint = f"did you mean {near[0]}?" if near else f"the keys of a cluster profile are {', '.join(known)}"
        return f"{file}: {key} is not a key; {hint}"
    named = f": {key}" if key else ""
    source = f"--{key.replace('_', '-')}" if key in given or file is None else f"{file}{named}"
    message = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    shown = "" if first["type"] == "value_error" else f" is {first['input']!r}; it"
    colon = ":" if first["type"] == "value_error" and not key else ""
    return f"{source}{colon}{shown} {message}"
