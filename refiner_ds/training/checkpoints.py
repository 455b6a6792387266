"""Saving beside training, and loading, together on all ranks. What lies on disk is in checkpoint/files.py.

step n │ forward, backward of n+1 │ update │ step n+2, n+3 …                            │ the outcome is known
       └▶ a thread a rank:  copy ─┘ gather → hash and write → complete.json → rename → latest → remove old ones
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from refiner_ds.checkpoint.files import CLASSES, CONFIG, DATA, integrity_errors, newest_valid
from refiner_ds.checkpoint.retention import Retention
from refiner_ds.checkpoint.tensors import Spec, TensorReader, TensorWriter, Written, file_name, index_of
from refiner_ds.checkpoint.writing import Draft, checkpoint_bytes, remove_old
from refiner_ds.errors import CheckpointError
from refiner_ds.run_folder import STATE, RunFolder, State, read_state
from refiner_ds.training.ema import ModelEma
from refiner_ds.training.engine import Engine
from refiner_ds.training.snapshot import EMA, FIRST, SECOND, WEIGHTS, Snapshot
from refiner_ds.training.world import World

STEMS = {"model": (WEIGHTS,), "ema": (EMA,), "optimizer": (FIRST, SECOND)}
GATHER_MINUTES = 10.0  # after which a rank that no longer answers fails a save


class Contents(NamedTuple):
    """What a checkpoint holds beside tensors.

    Attributes:
        data: what the run is trained on, as its ``data.json`` has it; empty where that is no set.
        values: the metric that the best checkpoints are kept by, by step.
    """

    state: State
    config: dict[str, Any]
    classes: list[str]
    data: dict[str, Any]
    values: Mapping[int, float]


class Outcome(NamedTuple):
    """How a save ended, the same on every rank.

    Attributes:
        folder: where it is; None where it failed.
        failure: one sentence; empty where it did not.
        finite: False where a weight, a moment or an average is not: nobody could go on from that.
        seconds: from its beginning to its end, of this rank.
    """

    step: int
    folder: Path | None
    failure: str
    finite: bool
    seconds: float


class Checkpoints:
    """The checkpoints of one run.

    Args:
        split_bytes: above so many bytes of tensors, each rank writes a part.
    Attributes:
        saved_step: optimizer steps at the newest save that was begun or loaded.
        not_finite: whether a save has found a weight that is not finite; some ranks may know it a step before others.
    """

    def __init__(
        self, run: RunFolder, retention: Retention, engine: Engine, ema: ModelEma, world: World, split_bytes: float
    ) -> None:
        self._run, self._retention = run, retention
        self._engine, self._ema, self._world = engine, ema, world
        self._group: Any = None  # a process group of the saving threads' own
        if world.size > 1:
            self._group = dist.new_group(backend="gloo", timeout=timedelta(minutes=GATHER_MINUTES))
        self._bytes = checkpoint_bytes(engine.shapes.values())
        writers = world.size if self._bytes > split_bytes else 1
        self._writers = writers
        self._snapshot: Snapshot | None = None
        self._thread: threading.Thread | None = None
        self._outcome: Outcome | None = None
        self._waited = 0.0
        self.saved_step = 0
        self.not_finite = False

    # -- saving ------------------------------------------------------------------------------------------------------

    def begin(self, contents: Contents) -> None:
        """Write the state as it is beside training. Waits for the save before, if that is under way.

        Every rank must call it, between two steps, having asked `outcome` of the save before.
        """
        self._join()
        if self._snapshot is None:
            self._snapshot = Snapshot(self._engine, self._ema, self._world, self._writers, self._group)
            self._engine.await_copies = self._await_copies
        began = time.monotonic()
        self._snapshot.take()
        self.saved_step = contents.state.step
        self._thread = threading.Thread(target=self._write, args=(self._snapshot, contents, began), daemon=True)
        self._thread.start()

    def outcome(self, wait: bool = False) -> Outcome | None:
        """How the save under way has ended, once; None while it goes on, and where there is none."""
        if wait:
            self._join()
        elif self._thread is not None and self._thread.is_alive():
            return None
        self._thread, outcome, self._outcome = None, self._outcome, None
        return outcome

    def waited(self) -> float:
        """Seconds that updates have waited for a copy since this was last asked; on a GPU the host never does."""
        seconds, self._waited = self._waited, 0.0
        return seconds

    def _await_copies(self) -> None:
        assert self._snapshot is not None
        began = time.perf_counter()
        self._snapshot.wait()
        self._waited += time.perf_counter() - began

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def _write(self, snapshot: Snapshot, contents: Contents, began: float) -> None:
        draft = Draft(self._run, contents.state.step, self._bytes)
        written: dict[str, Written] = {}
        failure, finite, folder = "", True, None
        try:
            snapshot.copy()
            failure = self._from_main(lambda: draft.open(), draft)
            for stem, kinds in STEMS.items():
                part = self._write_part(draft, snapshot, stem, kinds, bool(failure))
                written |= part.files
                finite, failure = finite and part.finite, failure or part.failure
            reports = self._all((written, failure, finite))
            failure = next((one[1] for one in reports if one[1]), "")
            finite = all(one[2] for one in reports)
            if not failure and finite:
                files = {name: one for report in reports for name, one in report[0].items()}
                failure = self._from_main(lambda: self._publish(draft, files, snapshot, contents), draft)
            if failure or not finite:
                draft.discard()
            else:
                folder = self._run.checkpoint(contents.state.step)
        except Exception as error:  # a rank has gone, say: the step's own collectives will tell of that
            failure = f"{self._run.checkpoint(contents.state.step)}: was not saved ({type(error).__name__}: {error})"
            if self._world.is_main:
                draft.discard()
        self.not_finite |= not finite
        self._outcome = Outcome(contents.state.step, folder, failure, finite, time.monotonic() - began)

    def _write_part(self, draft: Draft, snapshot: Snapshot, stem: str, kinds: tuple[str, ...], idle: bool) -> _Part:
        """This rank's file of one stem; ``idle`` takes part in the gathering and writes nothing."""
        rank, failure, finite = self._world.rank, "", True
        specs = self._specs(snapshot, stem, rank)
        name = file_name(stem, rank, self._writers)
        tensors = self._tensors(snapshot, stem, kinds)
        writes = rank < self._writers and not idle
        files: dict[str, Written] = {}
        if writes:
            try:
                with TensorWriter(draft.folder / name, specs) as file:
                    for key, tensor in tensors:
                        finite &= _is_finite(tensor)
                        file.add(key, tensor)
                    files[name] = file.finish()
            except OSError as error:
                failure = draft.failure(error)
        for _ in tensors:  # what a failed write has left: the others are still sending
            pass
        return _Part(files, failure, finite)

    def _tensors(self, snapshot: Snapshot, stem: str, kinds: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
        for kind in kinds:
            whole = snapshot.gather(kind)
            if stem == "optimizer":
                yield from ((f"{kind}/{name}", tensor) for name, tensor in whole.items())
                continue
            if self._world.rank < self._writers:
                whole = {**snapshot.frozen, **whole}
                yield from ((name, whole[name]) for name in snapshot.names(self._world.rank))
            if self._world.is_main:
                yield from snapshot.buffers[kind].items()

    def _specs(self, snapshot: Snapshot, stem: str, rank: int) -> dict[str, Spec]:
        shapes = self._engine.shapes
        names = snapshot.names(rank)
        if stem == "optimizer":
            trained = [name for name in names if name not in snapshot.frozen]
            return {f"{kind}/{name}": Spec(shapes[name]) for kind in (FIRST, SECOND) for name in trained}
        specs = {name: Spec(shapes[name]) for name in names}
        if rank == 0:
            specs |= {name: Spec(one.shape, one.dtype) for name, one in self._engine.statistics().items()}
        return specs

    def _publish(self, draft: Draft, files: dict[str, Written], snapshot: Snapshot, contents: Contents) -> None:
        draft.files |= files
        if self._writers > 1:
            for stem in STEMS:
                names = [list(self._specs(snapshot, stem, rank)) for rank in range(self._writers)]
                size = sum(one.size for name, one in files.items() if name.startswith(f"{stem}-"))
                draft.write_json(f"{stem}.safetensors.index.json", index_of(stem, names, size))
        draft.write_json(CLASSES, contents.classes)
        draft.write_json(CONFIG, contents.config)
        draft.write_json(DATA, contents.data)
        draft.write_json(STATE, asdict(contents.state))
        remove_old(self._run, draft.publish(), self._retention, contents.values)

    def _from_main(self, does: Callable[[], object], draft: Draft) -> str:
        """Have the main rank do something to the draft; the error, if any, is broadcast to every rank."""
        failure = ""
        if self._world.is_main:
            try:
                does()
            except OSError as error:
                failure = draft.failure(error)
        return self._all(failure)[0]

    def _all(self, value: Any) -> list[Any]:
        if self._group is None:
            return [value]
        values = [None] * self._world.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    # -- loading -----------------------------------------------------------------------------------------------------

    def newest(self) -> Path | None:
        """The newest complete and undamaged checkpoint, the same on every rank; None where a run has none yet.

        Raises:
            CheckpointError: there are some, all damaged: beginning anew is for a person to decide.
        """
        found, error = None, None
        if self._world.is_main:
            found, saved = newest_valid(self._run), self._run.saved_checkpoints()
            if found is None and saved:
                error = integrity_errors(saved[-1])[0]
        found, error = self._world.broadcast((found, error))
        if error:
            raise CheckpointError(
                f"{error}, and no other checkpoint of the run is whole: bring one back, or choose another"
                " refiner.run.name to begin a new run"
            )
        return found

    @torch.no_grad()
    def load(self, folder: Path) -> State:
        """Put a checkpoint back, whatever number of processes, ZeRO stage and precision it was written at.

        Every rank must call it.

        Raises:
            CheckpointError: it cannot be read.
        """
        self._join()  # what it copies is about to change
        engine, ema = self._engine, self._ema
        state = read_state(folder)
        weights, averages, moments = (TensorReader(folder, stem) for stem in STEMS)
        engine.load_parameters(weights.__getitem__)
        masters, firsts, seconds = engine.masters(), engine.moments(FIRST), engine.moments(SECOND)
        for fragment in engine.fragments:
            name = fragment.name
            for into, tensor in (
                (masters, weights[name]),
                (ema.masters, averages[name]),
                (firsts, moments[f"{FIRST}/{name}"]),
                (seconds, moments[f"{SECOND}/{name}"]),
            ):
                fragment.of(into).copy_(tensor.flatten()[fragment.offset :][: fragment.numel])
        for live, saved in ((engine.statistics(), weights), (ema.buffers, averages)):
            for name, buffer in live.items():
                buffer.copy_(saved[name])
        engine.restore_counts(state.step, state.optimizer_steps, state.skipped_steps)
        self.saved_step = state.step
        return state


class _Part(NamedTuple):
    files: dict[str, Written]
    failure: str
    finite: bool


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)  # NaN goes through both; one pass and nothing allocated
    return bool(low.isfinite() & high.isfinite())
