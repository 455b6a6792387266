"""On every rank: train with keys of DeepSpeed's, save, train on; load what was saved and train on from there.

    deepspeed_keys_script.py FOLDER KEYS            a list of lists of keys, in JSON

FOLDER/found.json gets, by "keys | stage | precision": how far the weights ended from those without the keys, relative
to the way that was come, and whether weights, EMA and moments were the same to the bit in both lives; or the sentence
of a refusal.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from torch import Tensor

from refiner_ds.checkpoint.files import read_weights
from refiner_ds.checkpoint.tensors import TensorReader
from refiner_ds.errors import ConfigError
from refiner_ds.run_folder import RunFolder
from refiner_ds.training.logs import silence_libraries
from refiner_ds.training.world import World, init, shutdown
from tests.training.elastic_script import CASES, two_lives
from tests.training.engine_script import fresh_model, run_file


def everything_in(checkpoint: Path) -> dict[str, Tensor]:
    readers = {stem: TensorReader(checkpoint, stem) for stem in ("model", "ema", "optimizer")}
    return {f"{stem} {name}": reader[name] for stem, reader in readers.items() for name in reader.names()}


def end_of(folder: Path, stage: int, bf16: bool, world: World, keys: list[str]) -> tuple[Tensor, bool]:
    """The weights after three steps, and whether a life that began with the second checkpoint ends the same."""
    two_lives(stage, bf16, folder / "one", world, others=keys).engine.close()
    end = RunFolder(folder / "one").checkpoint(3)
    found, again = everything_in(end), everything_in(RunFolder(folder / "one-again").checkpoint(3))
    same = found.keys() == again.keys() and all(torch.equal(found[name], again[name]) for name in found)
    world.barrier()  # the main process removes it
    return flat(read_weights(end, "model")), same


def flat(weights: dict[str, Tensor]) -> Tensor:
    return torch.cat(
        [weights[name].flatten().double() for name in sorted(weights) if weights[name].is_floating_point()]
    )


def main() -> None:
    silence_libraries()
    torch.set_num_threads(1)
    world, folder = init(), Path(sys.argv[1])
    start = flat(fresh_model(run_file(0, False)).state_dict())
    found: dict[str, tuple[float, bool] | str] = {}
    for stage, bf16 in CASES:
        plain: Tensor | None = None
        for keys in [[], *json.loads(sys.argv[2])]:
            name = f"{' '.join(keys)} | {stage} | {'bf16' if bf16 else 'fp32'}"
            try:
                run_file(stage, bf16, others=keys)
            except ConfigError as refusal:
                found[name] = str(refusal)
                continue
            end, same = end_of(folder / "lives", stage, bf16, world, keys)
            plain = end if plain is None else plain
            found[name] = float((end - plain).norm() / (plain - start).norm()), same
            world.barrier()
            if world.is_main:
                shutil.rmtree(folder / "lives")
            world.barrier()
    if world.is_main:
        (folder / "found.json").write_text(json.dumps(found))
    shutdown()


if __name__ == "__main__":
    main()
