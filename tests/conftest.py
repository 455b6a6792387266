"""What every test can rely on: one torch thread, and a package that needs no installation to be found."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # several threads on a busy two-core box slow torch down many times over

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton asks when kernels are defined: before anything imports it

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_randomness_each_test() -> None:
    """Start every test from the same torch generator, so that order does not matter."""
    torch.manual_seed(0)
