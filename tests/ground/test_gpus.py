"""The table of GPUs: people and drivers name the same GPU in many ways, and an unknown one is never guessed."""

from __future__ import annotations

import pytest

from refiner_ds.errors import ConfigError
from refiner_ds.gpus import GPUS, gpu, recognise

DRIVERS_NAMES = {
    "NVIDIA A100-SXM4-40GB": "a100-40gb",
    "NVIDIA A100-PCIE-40GB": "a100-40gb",
    "NVIDIA A100-SXM4-80GB": "a100-80gb",
    "NVIDIA A100 80GB PCIe": "a100-80gb-pcie",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H100 PCIe": "h100-pcie",
    "NVIDIA H100 NVL": "h100-nvl",
    "NVIDIA H200": "h200",
    "NVIDIA GH200 480GB": "gh200",
    "NVIDIA H20": "h20",
    "NVIDIA B200": "b200",
    "NVIDIA L4": "l4",
    "NVIDIA L40S": "l40s",
    "NVIDIA A10G": "a10g",
    "NVIDIA A10": "a10",
    "NVIDIA RTX A6000": "rtx-a6000",
    "NVIDIA RTX 6000 Ada Generation": "rtx-6000-ada",
    "NVIDIA GeForce RTX 4090": "rtx-4090",
    "Tesla V100-SXM2-32GB": "v100-32gb",
    "AMD Instinct MI300X": "mi300x",
}


def test_a_gpu_is_recognised_by_the_name_its_driver_gives() -> None:
    found = {name: recognise(name) for name in DRIVERS_NAMES}
    assert {name: one and one.name for name, one in found.items()} == DRIVERS_NAMES


@pytest.mark.parametrize(
    "name",
    ["NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce GTX 1080", "", "A1000"],
)
def test_a_part_of_a_gpu_and_a_stranger_are_not_taken_for_one_of_the_table(name: str) -> None:
    assert recognise(name) is None


def test_a_person_may_name_a_gpu_in_any_case_and_in_short() -> None:
    assert gpu("H200").name == gpu(" h200 ").name == "h200"
    assert gpu("a100") is gpu("A100 80GB") is gpu("NVIDIA A100-SXM4-80GB")
    assert gpu("h100 pcie").name == "h100-pcie"
    for one in GPUS:
        assert gpu(one.name) is one


def test_an_unknown_gpu_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"^GPU mi300 is not in the table; did you mean mi300x\?$"):
        gpu("mi300")
    with pytest.raises(ConfigError, match="there are a100-40gb, "):
        gpu("banana")


def test_every_row_is_in_the_units_of_its_columns() -> None:
    assert len({one.name for one in GPUS}) == len({one.words for one in GPUS}) == len(GPUS)
    for one in GPUS:
        assert one.fp32_tflops < (one.bf16_tflops or 1e9) < 3000 or one.bf16_tflops is None
        assert 10 < one.memory_gib < 300 <= one.bandwidth < 9000
        assert 20 <= one.link < one.bandwidth
