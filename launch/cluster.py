"""A site's profile: what differs from one cluster to the next and has no place in a recipe.

    partition: gpu
    hours: 24

``launch/clusters/example.yaml`` shows every key. A flag of ``launch/submit.py`` overrides the key of its name.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from refiner_ds.errors import ConfigError

# What the launcher itself decides; a second opinion under ``sbatch:`` would silently win.
OURS = {
    "chdir": "the snapshot of the code is the job's folder",
    "error": "logs lie in the run folder",
    "gpus-per-node": "use gpus_per_node",
    "job-name": "it is the name of the run folder",
    "nodes": "use --nodes",
    "ntasks": "use gpus_per_node or tasks_per_node",
    "ntasks-per-node": "use gpus_per_node or tasks_per_node",
    "open-mode": "a requeued job adds to its log",
    "output": "logs lie in the run folder",
    "signal": "use signal_seconds",
    "time": "use hours",
}


class ClusterProfile(BaseModel):
    """Keys of a cluster profile. Keys left null are left to Slurm."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    partition: str | None = Field(None, description="partition to submit to")
    account: str | None = Field(None, description="account that is charged")
    qos: str | None = Field(None, description="quality of service")
    constraint: str | None = Field(None, description="features a node must have")
    hours: float | None = Field(None, gt=0, description="time limit of one job; a longer run goes on in the next")
    signal_seconds: int = Field(
        120, ge=1, description="seconds before the time limit at which the job is told to save and requeue"
    )
    requeues: int = Field(100, ge=0, description="how often a job may requeue itself before it is left to a person")
    gpus_per_node: int | None = Field(
        None, ge=0, description="GPUs, and so processes, a node; 0: train on CPU; null: what the nodes have"
    )
    tasks_per_node: int = Field(1, ge=1, description="processes a node where there are no GPUs")
    cpus_per_task: int | None = Field(None, gt=0, description="cores a process, its loader workers included")
    mem_gb: float | None = Field(None, gt=0, description="memory a node, GB")
    setup: list[str] = Field([], description="shell lines before the job starts, such as: module load cuda")
    environment: dict[str, str] = Field({}, description="environment variables of the job")
    sbatch: dict[str, str | int | bool] = Field({}, description="further sbatch flags, such as {reservation: maths}")

    @field_validator("environment", mode="before")
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        # NCCL_DEBUG: 1 is a number to YAML and text to a process
        if isinstance(value, dict):
            return {key: str(word) if isinstance(word, int | float) else word for key, word in value.items()}
        return value

    @field_validator("sbatch")
    @classmethod
    def _not_ours(cls, flags: dict[str, str | int | bool]) -> dict[str, str | int | bool]:
        for flag in flags:
            name = flag.lstrip("-").replace("_", "-")
            if name in OURS:
                raise ValueError(f"cannot set {name}: {OURS[name]}")
        return {flag.lstrip("-"): value for flag, value in flags.items()}

    @property
    def minutes(self) -> int | None:
        """The time limit in whole minutes, as Slurm takes it."""
        return None if self.hours is None else max(1, round(self.hours * 60))


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
    try:
        return ClusterProfile.model_validate({**keys, **given})
    except ValidationError as error:
        raise ConfigError(_sentence(error, file, given)) from None


def _read(file: Path) -> dict[str, Any]:
    try:
        keys = yaml.safe_load(file.read_text())
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
        hint = f"did you mean {near[0]}?" if near else f"a cluster profile knows {', '.join(known)}"
        return f"{file}: {key} is not a key; {hint}"
    source = f"--{key.replace('_', '-')}" if key in given or file is None else f"{file}: {key}"
    message = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    shown = "" if first["type"] == "value_error" else f" is {first['input']!r}; it"
    return f"{source}{shown} {message}"
