"""``slurm``: a cluster of four nodes, up once a session and without a job at the start of each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .cluster import SlurmCluster, why_not


@pytest.fixture(scope="session")
def slurm_of_session() -> Iterator[SlurmCluster]:
    """The cluster, started by the first test that asks; the test is skipped where there can be none."""
    reason = why_not()
    if reason:
        pytest.skip(reason)
    with SlurmCluster(nodes=4) as cluster:
        yield cluster


@pytest.fixture
def slurm(slurm_of_session: SlurmCluster) -> Iterator[SlurmCluster]:
    """The cluster, with every node up and free again after the test, however it ended."""
    yield slurm_of_session
    slurm_of_session.cancel_all()
