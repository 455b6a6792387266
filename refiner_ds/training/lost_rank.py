"""What a rank says when another one is gone in the middle of common work: one sentence, and the traceback in its log.

The communication library knows an address at most; heartbeats know whose process it was and what it was doing.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from refiner_ds.errors import print_error
from refiner_ds.exit_codes import CRASHED
from refiner_ds.run_folder import RunFolder
from refiner_ds.training.console import log
from refiner_ds.training.heartbeat import Beat
from refiner_ds.training.run_lock import Holder
from refiner_ds.training.signals import leave_at_once
from refiner_ds.training.watchdog import has_ended
from refiner_ds.training.world import World

SETTLE_SECONDS = 2.0  # the connections of a process that is killed are closed a moment before it has ended
# In gloo's words and in NCCL's: the place in the source before them and the advice behind them are for the log.
GONE = re.compile(
    r"[^\[\]]*(\[[\d.:a-f]+\]:\d+)?[^\[\].]*(by (remote )?peer|Broken pipe|Socket closed|process exited)"
    r"( \[[\d.:a-f]+\]:\d+)?"
)


@contextmanager
def report_lost_ranks(folder: RunFolder, world: World, leave: Callable[[int], None] = leave_at_once) -> Iterator[None]:
    """Leave with a sentence where a collective of the block fails because another rank is gone.

    Nothing is closed in order: whatever would be, waits for the rank that is gone.

    Args:
        leave: ends this process.
    """
    try:
        yield
    except RuntimeError as error:
        said = GONE.search(str(error))
        if said is None:
            raise
        log.warning("rank %d: a collective failed", world.rank, exc_info=True)
        newest = folder.latest_checkpoint()
        lost = f"what was trained since {newest.name} is lost" if newest else "nothing had been saved"
        sentence = (
            f"rank {world.rank}: {_who(folder.heartbeats, world)} ({said.group().strip()}); {lost}; this rank leaves"
            f" with exit code {CRASHED}, and the same command continues; traceback: {folder.rank_log(world.rank)}"
        )
        print_error(sentence)
        leave(CRASHED)
        raise


def _who(heartbeats: Path, world: World) -> str:
    """The ranks whose processes have ended, as far as this machine can tell."""
    beats = {rank: Beat.read(heartbeats, rank) for rank in range(world.size) if rank != world.rank}
    here = [beat for beat in beats.values() if beat is not None and beat.machine == Holder.this_process().machine]
    until = time.monotonic() + (SETTLE_SECONDS if here else 0)
    while not (named := _ended(beats)) and time.monotonic() < until:
        time.sleep(0.05)
    if not named or len(named) == len(beats) > 1:
        return "another rank is gone"
    return f"{', '.join(named)} {'is' if len(named) == 1 else 'are'} gone"


def _ended(beats: dict[int, Beat | None]) -> list[str]:
    return [str(beat) if beat else f"rank {rank}" for rank, beat in beats.items() if beat is None or has_ended(beat)]
