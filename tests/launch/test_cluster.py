"""A cluster profile says what a site needs, and a mistake in it is named."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import pytest

from launch import flags
from launch.cluster import ClusterProfile, load_profile
from launch.environment import variables_on
from refiner_ds.config import ConfigError

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "launch/clusters/example.yaml"


@pytest.fixture
def refused(tmp_path: Path):  # type: ignore[no-untyped-def]
    """What a profile of this text, or these flags, is refused with, its own path left out."""

    def sentence(text: str, **flags: Any) -> str:
        file = tmp_path / "mine.yaml"
        file.write_text(text)
        with pytest.raises(ConfigError) as found:
            load_profile(file, flags)
        assert "\n" not in str(found.value)
        return str(found.value).replace(f"{tmp_path}/", "")

    return sentence


def test_the_example_shows_every_key_at_its_default() -> None:
    example = load_profile(EXAMPLE, {})
    assert example == ClusterProfile(hours=24)  # the one key a site must think about
    assert example.model_fields_set == set(ClusterProfile.model_fields)


def test_the_profile_in_the_docs_is_one(tmp_path: Path) -> None:
    page = (ROOT / "docs/cluster.md").read_text()
    block = page[page.index("    partition: gpu\n") :].partition("\n\n")[0]
    file = tmp_path / "documented.yaml"
    file.write_text(textwrap.dedent(block))
    profile = load_profile(file, {})
    assert (profile.gpus_per_node, profile.sbatch) == (8, {"reservation": "maths"})


def test_a_flag_wins_over_the_file_and_an_absent_flag_does_not(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("partition: gpu\nhours: 12\n")
    profile = load_profile(file, {"partition": "debug", "hours": None})
    assert (profile.partition, profile.hours, profile.minutes) == ("debug", 12, 720)


def test_numbers_of_an_environment_become_text(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("environment: {NCCL_DEBUG: 1, NCCL_SOCKET_IFNAME: ib0}\n")
    assert load_profile(file, {}).environment == {"NCCL_DEBUG": "1", "NCCL_SOCKET_IFNAME": "ib0"}


def test_an_unknown_key_is_refused_with_the_nearest(refused) -> None:  # type: ignore[no-untyped-def]
    assert refused("partitoin: gpu\n") == "mine.yaml: partitoin is not a key; did you mean partition?"
    assert "the keys of a cluster profile are partition, account" in refused("colour: blue\n")


def test_a_wrong_value_is_refused_with_what_would_be_right(refused) -> None:  # type: ignore[no-untyped-def]
    said = "must be a number, or a type and a number such as h100:8"
    assert refused("gpus_per_node: eight\n") == f"mine.yaml: gpus_per_node is 'eight'; it {said}"
    assert refused("hours: 0\n") == "mine.yaml: hours is 0; it must be greater than 0"
    assert refused("", cpus_per_task=0) == "--cpus-per-task is 0; it must be greater than 0"


def test_what_the_launcher_decides_cannot_be_set_beside_it(refused) -> None:  # type: ignore[no-untyped-def]
    assert refused("sbatch: {nodes: 3}\n") == "mine.yaml: sbatch cannot set nodes: use --nodes"
    assert "use hours" in refused("sbatch: {--time: 60}\n")
    for flag in (
        "array",
        "no-requeue",
        "tasks-per-node",
        "tasks_per_node",
        "-N",
        "p",
        "no-req",
        "gpus",
        "wrap",
        "hold",
        "-a",
        "--array",
        "ntasks",
        "nodes=3",
        "exclusive --array=1-3",
        "Array",
    ):
        assert "sbatch cannot set" in refused(f"sbatch: {{{flag}: 1}}\n"), flag
    for flag in ("ntasks", "n", "kill-on-bad-exit", "output", "multi-prog", "nodelist"):
        assert "srun cannot set" in refused(f"srun: {{{flag}: 1}}\n"), flag
    assert "must be on one line" in refused('sbatch: {comment: "x\\n#SBATCH --array=1-3"}\n')


def test_other_flags_are_passed_on_under_their_long_names() -> None:
    profile = ClusterProfile(sbatch={"--reservation": "maths", "x": "node7", "exclusive": False}, srun={"l": True})
    assert profile.sbatch == {"reservation": "maths", "exclude": "node7", "exclusive": False}
    srun = {"cpu-bind": "cores", "mpi": "pmix", "container-image": "/images/a.sqsh", "gpu-bind": "single:1"}
    assert ClusterProfile(srun=srun).srun == srun
    assert flags.words({**profile.sbatch, **profile.srun}) == ["--reservation=maths", "--exclude=node7", "--label"]


@pytest.mark.parametrize(
    "text, minutes",
    [
        ("time: 1-00:00:00", 1440), ("time: 12:30:00", 750), ("time: 90", 90), ("time: 2-12", 3600),
        ("time: 1-2:30", 1590), ("time: 0:30", 1), ("hours: 0.5", 30), ("hours: 24", 1440), ("{}", None),
    ],
)  # fmt: skip
def test_the_time_limit_is_taken_as_slurm_writes_it(text: str, minutes: int | None, tmp_path: Path) -> None:
    """12:30:00 is a number of seconds to YAML 1.1."""
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    assert load_profile(file, {}).minutes == minutes


def test_two_time_limits_are_refused_and_a_flag_overrides_either(refused, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    assert "hours and time both give the time limit" in refused("hours: 1\ntime: 60\n")
    assert "such as 1-00:00:00" in refused("time: a day\n")
    assert "such as 1-00:00:00" in refused("time: 0\n")
    (tmp_path / "day.yaml").write_text("time: 1-00:00:00\n")
    assert load_profile(tmp_path / "day.yaml", {"hours": 2.0}).minutes == 120


def test_gpus_can_have_a_type() -> None:
    assert (ClusterProfile(gpus_per_node="h100:8").gpus, ClusterProfile(gpus_per_node="4").gpus_per_node) == (8, 4)
    assert (ClusterProfile(gpus_per_node=0).gpus, ClusterProfile().gpus) == (0, None)


def test_nodes_of_another_make_have_variables_of_their_own() -> None:
    profile = ClusterProfile(node_environment={"dgx*": {"NCCL_SOCKET_IFNAME": "ib0"}, "dgx7": {"NCCL_DEBUG": "INFO"}})
    assert variables_on("dgx7", profile.node_environment) == {"NCCL_SOCKET_IFNAME": "ib0", "NCCL_DEBUG": "INFO"}
    assert variables_on("hgx1", profile.node_environment) == {}


def test_a_file_that_is_no_profile_is_refused(refused, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    assert "line 2 is not YAML" in refused("partition: gpu\n setup: [\n")
    assert "keys and values" in refused("- gpu\n")
    with pytest.raises(ConfigError, match="no such cluster profile"):
        load_profile(tmp_path / "absent.yaml", {})
