"""A rank that keeps step with the others through pipes, under a watchdog: ``watched.py FOLDER RANK SIZE SECONDS``.

It beats for "forward" and meets the others once a step, step after step. Its standard input says, a line each, what it
does in the next step: "sleep" (nothing more), "save S" (something patient that lasts S seconds), "leave".
"""

from __future__ import annotations

import os
import select
import sys
import time
from pathlib import Path

from refiner_ds.training.heartbeat import Heartbeat
from refiner_ds.training.watchdog import Watchdog


def main() -> None:
    folder, rank, size, seconds = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
    heartbeat = Heartbeat()
    watchdog = Watchdog(heartbeat, folder, rank, size, seconds, 3600, folder.parent / f"rank_{rank}.stacks")
    watchdog.start()
    mine = os.open(folder.parent / f"pipe_{rank}", os.O_RDWR)
    others = [os.open(folder.parent / f"pipe_{other}", os.O_RDWR) for other in range(size) if other != rank]
    step = 0
    while True:
        step += 1
        heartbeat.beat(step, "forward")
        word, _, argument = (sys.stdin.readline() if select.select([sys.stdin], [], [], 0)[0] else "").partition(" ")
        if word.strip() == "sleep":
            stuck_here()
        if word.strip() == "leave":
            break
        if word == "save":
            heartbeat.beat(step, "saving", patient=True)
            time.sleep(float(argument))
        heartbeat.beat(step, "backward")
        for other in others:
            os.write(other, b".")
        for _ in others:
            os.read(mine, 1)
        time.sleep(0.02)
    watchdog.close()


def stuck_here() -> None:
    while True:
        time.sleep(1)


if __name__ == "__main__":
    main()
