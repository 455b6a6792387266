"""With any key of DeepSpeed's, a run trains as without it and resumes to the bit, or it is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from refiner_ds.config.sections import key_paths
from tests.training.launched import ranks

ZERO, CPU = "zero_optimization", '{"device": "cpu"}'
OFFLOAD = f"{ZERO}.offload_optimizer={CPU}"
# By key, values that are not the default; several keys where one needs another.
TRIED = {
    f"{ZERO}.contiguous_gradients": ["false"],
    f"{ZERO}.reduce_scatter": ["false"],
    f"{ZERO}.reduce_bucket_size": ["1000"],
    f"{ZERO}.use_multi_rank_bucket_allreduce": ["false"],
    f"{ZERO}.allgather_partitions": ["false"],
    f"{ZERO}.allgather_bucket_size": ["1000"],
    f"{ZERO}.overlap_comm": ["true"],
    f"{ZERO}.parameter_alignment": ["true"],
    f"{ZERO}.ignore_unused_parameters": ["false"],
    f"{ZERO}.offload_optimizer.device": ["cpu"],
    f"{ZERO}.offload_optimizer.pin_memory": ["true"],
    f"{ZERO}.offload_param.device": ["cpu"],
    f"{ZERO}.offload_param.pin_memory": ["true"],
    f"{ZERO}.sub_group_size": ["1000"],
    f"{ZERO}.stage3_prefetch_bucket_size": ["0"],
    f"{ZERO}.stage3_param_persistence_threshold": ["0"],
    f"{ZERO}.stage3_model_persistence_threshold": ["1000"],
    f"{ZERO}.stage3_max_live_parameters": ["10"],
    f"{ZERO}.stage3_max_reuse_distance": ["0"],
    f"{ZERO}.zero_hpz_partition_size": ["2"],
    f"{ZERO}.memory_efficient_linear": ["false"],
    "bf16.immediate_grad_update": ["true"],
    "bf16.check_grad_overflow": ["true"],
    "data_types.grad_accum_dtype": ["fp32", "bf16"],
    "communication_data_type": ["fp32", "bf16"],
    "prescale_gradients": ["true"],
    "gradient_predivide_factor": ["2"],
    "steps_per_print": ["1"],
    "wall_clock_breakdown": ["true"],
    "memory_breakdown": ["true"],
    "dump_state": ["true"],
}  # fmt: skip
WITH = {
    f"{ZERO}.offload_optimizer.pin_memory": [OFFLOAD],
    f"{ZERO}.offload_param.device": [OFFLOAD],
    f"{ZERO}.offload_param.pin_memory": [OFFLOAD, f"{ZERO}.offload_param={CPU}"],
}
TOGETHER = [
    [OFFLOAD, f"{ZERO}.contiguous_gradients=false"],
    [OFFLOAD, f"{ZERO}.overlap_comm=true"],
    [OFFLOAD, f"{ZERO}.sub_group_size=1000"],
    ["flops_profiler.enabled=true", "flops_profiler.profile_step=2"],
    ["comms_logger.enabled=true"],
    ["prescale_gradients=true", f"{ZERO}.reduce_scatter=false"],
    ["prescale_gradients=true", "gradient_predivide_factor=2", f"{ZERO}.reduce_scatter=false"],
]  # fmt: skip
# Each of these tests tries stages, precisions and batches; test_engine clips, test_combinations recomputes.
ELSEWHERE = {
    f"{ZERO}.stage", "bf16.enabled", "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_clipping",
    "extends", "about",
}  # fmt: skip
SECTIONS_ELSEWHERE = ("refiner.", "activation_checkpointing.", "flops_profiler.", "comms_logger.")
NEAR = {"bf16": 0.35, "fp32": 1e-3}  # of the way; test_engine.py says why


def cases() -> list[list[str]]:
    single = [[*WITH.get(key, []), f"{key}={value}"] for key, values in TRIED.items() for value in values]
    return [*single, *TOGETHER]


def test_every_key_is_tried() -> None:
    paths = set(key_paths())
    keys = {key for key in paths if not any(other.startswith(f"{key}.") for other in paths)}
    others = {key for key in keys if key.startswith(SECTIONS_ELSEWHERE)}
    assert keys - others - ELSEWHERE == TRIED.keys()


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_run_with_any_key_trains_as_without_and_resumes_to_the_bit_or_is_refused(tmp_path: Path) -> None:
    script = Path(__file__).with_name("deepspeed_keys_script.py")
    done = ranks(script, tmp_path, json.dumps(cases()), timeout=1700, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found) == 8 * (1 + len(cases()))
    refused = {case: outcome for case, outcome in found.items() if isinstance(outcome, str)}
    assert all("it must be" in sentence and "\n" not in sentence for sentence in refused.values())
    for case, outcome in found.items():
        if case not in refused:
            distance, same = outcome
            lossy = "bf16" in case.partition("|")[0] or case.endswith("bf16")
            assert same and distance < NEAR["bf16" if lossy else "fp32"], (case, outcome)
    assert not any(case.endswith(" | 1 | fp32") and "offload_param" not in case for case in refused)
