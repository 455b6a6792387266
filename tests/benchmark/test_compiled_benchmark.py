"""Kernels are compiled for cards that are not here, and stay within their shared memory."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from refiner_ds.attention.kernels.configurations import CONFIGURATIONS
from refiner_ds.benchmark import compiled
from refiner_ds.benchmark.compiled import SHARED, compile_all, table


@pytest.mark.slow
def test_the_linear_kernels_fit_into_the_shared_memory_of_a_card_with_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled in processes of their own, for one shape: an L40S has 99 KiB where an A100 has 163."""
    rows = {row.kernel: row for row in compile_all(["89"], ["S"], [112], processes=1)}
    assert {"softmax_map", "expand_local", "bwd_expand_local", "mix_and_shift"} <= rows.keys()
    for row in rows.values():
        assert 0 < row.registers <= 255 and row.shared <= SHARED["89"] and row.too_large == 0, row


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "card_sizes", "dtype"), [("90", False, "bf16"), ("gfx942", True, "bf16"), ("gfx942", True, "fp32")]
)
def test_no_configuration_of_tiles_and_no_form_for_padding_spills_on_hopper_and_no_kernel_on_an_mi300(
    architecture: str, card_sizes: bool, dtype: str
) -> None:
    """S at 224, in a process that compiles: on an MI300 with that card's sizes, in both dtypes of the self-check."""
    rows = compile_all([architecture], ["S"], [224], 1, not card_sizes, dtype, padded=True)
    names = {f"{kernel}[{name}]" for kinds in CONFIGURATIONS.values() for name, ks in kinds.items() for kernel in ks}
    found = {row.kernel for row in rows if "[" in row.kernel}
    assert found == (set() if card_sizes else names)
    padded = {row.kernel.removesuffix(", padded") for row in rows if row.kernel.endswith(", padded")}
    assert {"softmax_map", "map_moments", "reduce", "bwd_reduce", "bwd_expand_local", "refine_folded"} < padded
    for row in rows:
        assert row.spilled == 0 and row.too_large == 0, row


def test_the_table_names_what_spills_and_what_is_too_large() -> None:
    rows = [
        compiled.Row("80", "one", 9, 255, 2048, 24, 3, 0),
        compiled.Row("gfx942", "one", 9, 100, 70 << 10, 0, 0, 1),
    ]
    heading, line = table(rows).splitlines()
    assert heading.split() == ["kernel", "sm_80", "gfx942"]
    assert "255 / 24 (3/9) / 2" in line and "100 / 0 / 70 !" in line
