"""Where the kernels run: in Triton's interpreter on CPU tensors, and on the GPU if there is one.

Triton decides once a process: where there is a GPU, TRITON_INTERPRET=1 before pytest interprets, and nothing compiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

if find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> torch.device:
    """The device whose tensors kernels take here."""
    from refiner_ds.attention.kernels.launch import INTERPRETED

    if request.param == "cpu" and not INTERPRETED:
        pytest.skip("kernels are compiled in this process; TRITON_INTERPRET=1 interprets them")
    if request.param == "cuda" and (INTERPRETED or not torch.cuda.is_available()):
        pytest.skip("there is no GPU, or kernels are interpreted in this process")
    return torch.device(request.param)


@pytest.fixture
def memory_full_of_nan() -> Iterator[None]:
    """New tensors are NaN until somebody writes them."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # which on a GPU some of PyTorch's own products are not
    yield
    torch.use_deterministic_algorithms(False)
