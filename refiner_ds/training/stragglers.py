"""Which rank the others wait for, step after step: a slow GPU, a hot node, a loader without cores.

All ranks take equally long for a step, since they wait for each other. What tells them apart is what each does before
it meets them: waiting for data, and the forward pass.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from statistics import median

SLOWER = 1.5  # times the median of all ranks
IN_A_ROW = 3  # intervals
DATA_SHARE = 0.2  # of a step, from which waiting for data is worth a word


@dataclass(frozen=True)
class RankTime:
    """A rank's mean seconds a step over an interval, before it meets the others."""

    rank: int
    host: str
    data_wait: float
    forward: float


class Stragglers:
    """Remembers who was slow."""

    def __init__(self) -> None:
        self._slow: Counter[tuple[int, str]] = Counter()

    def judge(self, times: list[RankTime]) -> list[str]:
        """Sentences about ranks that have now been slow `IN_A_ROW` intervals in a row, each said once.

        Args:
            times: of all ranks over one interval.
        """
        said = []
        for what, seconds in (
            ("forward pass", {time: time.forward for time in times}),
            ("wait for data", {time: time.data_wait for time in times}),
        ):
            usual = median(seconds.values())
            for time, taken in seconds.items():
                key = (time.rank, what)
                # What every rank does in a moment is no reason to name one that takes two.
                if taken > SLOWER * usual and taken - usual > 0.1 * median(t.forward for t in times):
                    self._slow[key] += 1
                else:
                    self._slow[key] = 0
                if self._slow[key] == IN_A_ROW:
                    said.append(
                        f"rank {time.rank} on {time.host} is slow: its {what} takes {1000 * taken:.0f} ms a step where"
                        f" the median of {len(times)} ranks is {1000 * usual:.0f} ms; all wait for it"
                    )
        return said


def data_advice(step_seconds: float, data_wait_seconds: float, workers: int, cores: int) -> str | None:
    """What to do about a step that waits for data; None where it hardly does.

    Args:
        workers: loader processes of a rank.
        cores: that this rank may use.
    """
    share = data_wait_seconds / step_seconds if step_seconds else 0.0
    if share < DATA_SHARE:
        return None
    waits = f"{100 * share:.0f} % of a step is waiting for data"
    if workers < cores:
        return f"{waits}: raise refiner.data.workers, which is {workers}; this rank may use {cores} cores"
    return (
        f"{waits} and refiner.data.workers is {workers} on {cores} cores: give each rank more cores, put the shards on"
        " a faster disk, or store smaller images"
    )
