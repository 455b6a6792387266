"""A rank that all wait for is named, a loader that starves them is advised, a rank without memory says what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from refiner_ds.config import load
from refiner_ds.config.deepspeed_keys import ZeroKeys
from refiner_ds.training.model_states import model_states
from refiner_ds.training.out_of_memory import GIB, MemoryUse, is_out_of_memory, memory_use, out_of_memory
from refiner_ds.training.stragglers import IN_A_ROW, RankTime, Stragglers, data_advice
from refiner_ds.training.world import World


def times(*forwards: float, waits: tuple[float, ...] = ()) -> list[RankTime]:
    waits = waits or (0.01,) * len(forwards)
    return [RankTime(rank, f"node{rank}", waits[rank], forward) for rank, forward in enumerate(forwards)]


def test_a_rank_that_is_slow_interval_after_interval_is_named_once() -> None:
    stragglers = Stragglers()
    assert [stragglers.judge(times(1.0, 1.0, 2.0, 1.1)) for _ in range(IN_A_ROW - 1)] == [[]] * (IN_A_ROW - 1)
    assert stragglers.judge(times(1.0, 1.0, 2.0, 1.1)) == [
        "rank 2 on node2 is slow: its forward pass takes 2000 ms a step where the median of 4 ranks is 1050 ms;"
        " all wait for it"
    ]
    assert stragglers.judge(times(1.0, 1.0, 2.0, 1.1)) == []


def test_a_slow_interval_now_and_then_and_moments_are_not_worth_a_word() -> None:
    stragglers = Stragglers()
    for _ in range(3):
        assert not stragglers.judge(times(1.0, 1.0, 2.0)) and not stragglers.judge(times(1.0, 2.0, 1.0))
    for _ in range(2 * IN_A_ROW):
        assert not stragglers.judge(times(1.0, 1.0, 1.0, waits=(0.001, 0.001, 0.02)))
    for _ in range(IN_A_ROW):
        said = stragglers.judge(times(1.0, 1.0, 1.0, waits=(0.001, 0.001, 0.5)))
    assert len(said) == 1 and "rank 2 on node2 is slow: its wait for data takes 500 ms" in said[0]


def test_waiting_for_data_is_met_with_what_can_be_done() -> None:
    assert data_advice(1.0, 0.05, 4, 16) is None and data_advice(0.0, 0.0, 4, 16) is None
    assert "40 % of a step" in (said := data_advice(1.0, 0.4, 4, 16) or "") and "workers, which is 4; " in said
    assert "give each rank more cores" in (data_advice(1.0, 0.4, 16, 16) or "")


def use(stage: int = 1, **changes: object) -> MemoryUse:
    known = {
        "peak": 60 * GIB, "trained": 81_000_000, "frozen": 0, "zero": ZeroKeys(stage=stage), "world_size": 8,
        "bf16": True, "micro_batch": 64, "img_size": 224, "checkpointing": "none", "save_for_backward": "activations",
        "blocks": 32,
    }  # fmt: skip
    return MemoryUse(**{**known, **changes})  # type: ignore[arg-type]


def test_a_rank_without_memory_says_where_how_much_and_what_would_help() -> None:
    said = str(out_of_memory(3, 17, "forward", use(), torch.OutOfMemoryError("CUDA out of memory. Tried\nmore")))
    for part in ("rank 3 is out of memory in step 17 (forward) with 64 images of 224 px", "a peak of 60.00 GiB",
                 "(CUDA out of memory. Tried)", "train_micro_batch_size_per_gpu 32 instead of 64 (saves about 30 GiB)",
                 "refiner.model.checkpointing pair (saves about 56 GiB)", "save_for_backward map",
                 "zero_optimization.stage 2 (saves about 0.13 GiB)"):  # fmt: skip
        assert part in said, said
    assert said.index("checkpointing") < said.index("micro_batch") < said.index("stage 2")


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("stage", range(3))
def test_what_a_stage_would_save_is_what_the_planner_counts(stage: int, bf16: bool) -> None:
    counted = {other: model_states(ZeroKeys(stage=other), 81_000_000, 500, bf16, 8).total for other in range(stage, 4)}
    here = use(stage, bf16=bf16, frozen=500, micro_batch=1, checkpointing="pair", save_for_backward="map")
    saved = {other: counted[stage] - bytes_there for other, bytes_there in counted.items()}
    best = sorted((other for other in saved if saved[other] > 0), key=lambda other: -saved[other])
    assert here.remedies() == [
        f"zero_optimization.stage {other} (saves about {saved[other] / GIB:.2g} GiB)" for other in best
    ]
    assert here.activations == 60 * GIB - counted[stage]


def test_parameters_are_counted_whole_where_stage_3_has_spread_them() -> None:
    run = load(None, ["zero_optimization.stage=3"])
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 5))
    model[1].requires_grad_(False)
    spread: list[Any] = list(model.parameters())
    for parameter in spread:
        parameter.ds_numel, parameter.data = parameter.numel(), torch.empty(0)  # as DeepSpeed leaves them
    found = memory_use(run, model, run.batch(2), World(0, 2, 0, torch.device("cpu")))
    assert (found.trained, found.frozen) == (2 * 3 + 3, 3 * 5 + 5)
    assert found.zero.stage == 3 and found.peak > 0 and found.micro_batch == 24


def test_what_is_done_already_is_not_advised() -> None:
    done = use(micro_batch=1, checkpointing="block", save_for_backward="map", stage=3)
    assert done.remedies() == []
    assert use(stage=3, checkpointing="pair").remedies()[0].startswith("train_micro_batch_size_per_gpu 32")


@pytest.mark.parametrize(
    "error, does",
    [(torch.OutOfMemoryError("x"), True), (MemoryError(), True), (RuntimeError("size mismatch"), False),
     (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"), True)],
)  # fmt: skip
def test_every_way_to_be_out_of_memory_is_known(error: BaseException, does: bool) -> None:
    assert is_out_of_memory(error) is does


def test_torch_says_so_on_a_cpu_in_just_these_words() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(refused.value)
