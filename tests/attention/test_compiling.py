"""Unlike CPUs never share code that inductor has generated, unless a user says so."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from refiner_ds.attention.compiling import CACHE, keep_code_by_cpu


def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capability: str, flags: str) -> Path:
    monkeypatch.delenv(CACHE, raising=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    return keep_code_by_cpu(cpuinfo)


def test_each_kind_of_cpu_has_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    kinds = [("AVX512", "fma avx2 avx512f"), ("AVX2", "fma avx2 avx512f"), ("AVX2", "fma avx2"), ("AVX2", "avx2 fma")]
    one, lowered, lesser, same = (folder(monkeypatch, tmp_path, *kind) for kind in kinds)
    assert len({one, lowered, lesser}) == 3 and same == lesser
    assert "-avx512-" in one.name and "-avx2-" in lowered.name
    assert os.environ[CACHE] == str(same) and keep_code_by_cpu(tmp_path / "cpuinfo") == same
    from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir

    monkeypatch.setenv(CACHE, default_cache_dir())  # as torch leaves it, if it was asked first
    assert keep_code_by_cpu(tmp_path / "cpuinfo") == same
    monkeypatch.setenv(CACHE, str(tmp_path / "mine"))
    assert keep_code_by_cpu() == tmp_path / "mine" and cache_dir() == str(tmp_path / "mine")


def test_a_cpu_that_says_nothing_has_a_folder_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(CACHE, raising=False)
    assert keep_code_by_cpu(tmp_path / "missing").name.startswith("torchinductor_")
