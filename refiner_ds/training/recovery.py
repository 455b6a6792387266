"""What a run does when it diverges: stop, or go back to the last good state, take the same steps again, and go on.

step n goes wrong ──▶ back to the newest checkpoint ──▶ the same steps again ──▶ n is fine: its hardware's fault
                                                                            └──▶ n goes wrong again: back once
                                                                                 more, n's samples are left out
"""

from __future__ import annotations

from collections.abc import Callable

from refiner_ds.data.index import ShardIndex
from refiner_ds.data.samples import SampleReader
from refiner_ds.errors import DataError
from refiner_ds.run_folder import RunFolder
from refiner_ds.training.console import Console
from refiner_ds.training.divergence import DivergenceGuard, Incidents, MicroBatch, named
from refiner_ds.training.preparation import Preparation
from refiner_ds.training.step import Outcome, UnreadStep
from refiner_ds.training.world import World


class Divergence(Exception):
    """A step went wrong; every rank raises it for the same step.

    Attributes:
        unread: the step.
        why: what was wrong with it.
    """

    def __init__(self, unread: UnreadStep, why: str) -> None:
        super().__init__(f"step {unread.step}: {why}")
        self.unread, self.step, self.why = unread, unread.step, why


class Recovery:
    """Judges the steps of a run, and decides what is done about the ones that go wrong."""

    def __init__(self, ready: Preparation, world: World, console: Console) -> None:
        keys = ready.run.refiner.run
        self._ready, self._world, self._console = ready, world, console
        self._policy = keys.on_divergence
        self._sigmas, self._window = keys.spike_sigmas, keys.spike_window
        self._guard = DivergenceGuard(self._sigmas, self._window)
        self._incidents = Incidents(RunFolder(ready.run.folder).divergence, keys.rollbacks)
        self._reasons: dict[int, str] = {}
        if self._incidents.damaged and world.is_main:
            console.print(self._incidents.put_aside())

    def leaves_out(self, step: int) -> bool:
        """Whether the samples of a step, counted from 1, are left out."""
        return self._incidents.left_out(step)

    @property
    def goes_back(self) -> bool:
        """Whether a run that diverges goes back, where it can."""
        return self._policy == "rollback"

    @property
    def allows_before_the_update(self) -> Callable[[int, float, float | None], bool] | None:
        """What asks, before weights change, whether a step may change them; None where nothing is skipped."""
        return self._allows if self._policy == "skip" else None

    def _allows(self, step: int, loss: float, grad_norm: float | None) -> bool:
        why = self._guard.judge(loss, grad_norm)
        if why is not None:
            self._reasons[step] = why
        return why is None

    def judge(self, unread: UnreadStep, outcome: Outcome) -> None:
        """Look at a step that was taken. Every rank must call it.

        Raises:
            Divergence: it went wrong.
        """
        if self._policy == "skip":
            if outcome.skipped:
                # DeepSpeed leaves out what is not finite before it asks whether it may.
                why = self._reasons.pop(unread.step, None) or self._guard.judge(outcome.losses["loss"], None)
                self._note(unread.step, why or "a gradient is not finite", self._suspects(unread))
            return
        why = self._guard.judge(outcome.losses["loss"], outcome.grad_norm)
        if why is not None:
            raise Divergence(unread, why)
        if (incident := self._incidents.fine(unread.step)) is not None:
            self._write()
            ranks = " and ".join(sorted({f"rank {suspect['rank']}" for suspect in incident.suspects}))
            self._console.print(
                f"step {unread.step} was computed again and is fine: what was wrong ({incident.why}) was transient,"
                f" most likely a fault of the hardware of {ranks}"
            )

    def wrong(self, divergence: Divergence, can_go_back: bool) -> tuple[str, bool]:
        """What went wrong, for a sentence, and whether the run goes back because of it. Every rank must call it.

        Args:
            can_go_back: whether there is a checkpoint to go back to.
        """
        found = self._suspects(divergence.unread)
        what = f"{divergence.why} ({named(found)})" if found else divergence.why
        if not self.goes_back or not can_go_back:
            return what, False
        if not self._incidents.may_go_back():
            return f"{what}, after as many rollbacks as refiner.run.rollbacks allows", False
        self._guard = DivergenceGuard(self._sigmas, self._window)
        incident = self._incidents.wrong(divergence.step, divergence.why, found)
        self._write()
        if incident.verdict == "persistent":
            return f"{what}, as before: it is persistent, and the samples of the step are left out", True
        return f"{what}: the same steps are computed again", True

    def _note(self, step: int, why: str, found: list[MicroBatch]) -> None:
        self._incidents.skipped(step, why, found)
        self._write()
        self._console.print(f"step {step} is skipped: {why} ({named(found)})")

    def _write(self) -> None:
        if self._world.is_main:
            self._incidents.write()

    def _suspects(self, unread: UnreadStep) -> list[MicroBatch]:
        mine = [
            MicroBatch(self._world.rank, micro, float(loss), sample_keys(self._ready.train, samples_B.tolist()))
            for micro, (loss, samples_B) in enumerate(unread.micro_batches)
        ]
        return [micro for of_rank in self._world.gather(mine) for micro in of_rank]


def sample_keys(index: ShardIndex, samples: list[int]) -> list[str]:
    """Keys of samples, as their files are called; the number of one that cannot be read."""
    reader, keys = SampleReader(index), []
    for sample in samples:
        try:
            keys.append(reader.read(sample).key)
        except DataError:
            keys.append(f"sample {sample}")
    reader.close()
    return keys
