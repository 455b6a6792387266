"""What was counted of a micro-batch is known to the next start of the planner, as long as the code is the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from refiner_ds.config import RunFile, load
from refiner_ds.plan import kept, trace
from refiner_ds.plan.checking import plan_for
from refiner_ds.plan.kept import kept_on_disk

MACHINES = {"gpu": "h200", "nodes": 1, "per_node": 2}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Images of every micro-batch that was counted, in a process that has counted none before."""
    images: list[int] = []
    real = trace._trace

    def noting(run: RunFile, classes: int, count: int, *rest: object) -> trace.Trace:
        images.append(count)
        return real(run, classes, count, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(trace, "_trace", noting)
    before = dict(trace.TRACED)
    trace.TRACED.clear()
    yield images
    trace.TRACED.clear()
    trace.TRACED.update(before)


def tiny(*sets: str) -> RunFile:
    model = ("refiner.model.depth=2", "refiner.model.embed_dim=48", "refiner.model.num_heads=2")
    return load(None, [*model, "refiner.model.img_size=28", *sets])


def test_a_submission_counts_one_micro_batch_and_none_where_only_the_recipe_has_changed(
    counted: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFINER_DS_CACHE", str(tmp_path))
    run = tiny()
    first = plan_for(run, MACHINES)
    assert counted == [run.batch(2).micro_batch] and first["memory"]["fits"]
    trace.TRACED.clear()  # as in another process
    again = plan_for(tiny("refiner.recipe.lr=1e-4", "refiner.run.name=other", "zero_optimization.stage=2"), MACHINES)
    assert len(counted) == 1 and again["memory"]["activations"] == first["memory"]["activations"]
    assert again["step"]["flops"] == first["step"]["flops"] > 0
    assert again["step"]["parts"]["backward"] == first["step"]["parts"]["backward"] > 0
    plan_for(tiny("refiner.model.depth=3"), MACHINES)
    assert len(counted) == 2


def test_what_other_code_counted_or_a_damaged_file_holds_is_counted_anew(
    counted: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, file = tiny(), tmp_path / "cache" / "micro_batches.json"

    def count() -> int:
        before = len(counted)
        trace.TRACED.clear()
        with kept_on_disk(file):
            trace.trace(run, 10, 2, True, "eager", 80 << 30)
        return len(counted) - before

    assert [count(), count()] == [1, 0]
    entries = json.loads(file.read_text())
    ((name, (code, key, counts)),) = entries.items()
    for damaged in (
        "",
        "[]",
        "{",
        json.dumps({name: [code, key]}),
        json.dumps({name: [code, key, {**counts, "operations": [[1]]}]}),
    ):
        file.write_text(damaged)
        assert count() == 1, damaged
    monkeypatch.setattr(kept, "_signature", lambda: "other code")
    assert count() == 1
    assert len(json.loads(file.read_text())) == 2
    file.unlink()
    file.mkdir()  # cannot be written
    assert count() == 1
