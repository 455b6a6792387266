"""Where the kernels run: on the GPU if there is one, otherwise in Triton's interpreter (see tests/conftest.py)."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def device() -> torch.device:
    """The device whose tensors kernels take here."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
