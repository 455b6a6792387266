"""How much a node needs: for `findings`, so that training does not suffer; for `start`, so that it can begin at all."""

from __future__ import annotations

from .node import GIB, MIB

SHARED_MEMORY = 128 * MIB  # a process, for its loader's batches and DeepSpeed's
LEAST_SHARED_MEMORY = 64 * MIB  # a node
MEMORY_ERROR, MEMORY_WARNING = 2 * GIB, 4 * GIB  # a process
DISK_ERROR, DISK_WARNING = GIB, 20 * GIB  # a checkpoint of the largest released model with its optimizer takes 1.3 GB
LEAST_DISK = 64 * MIB  # for temporary files
INODES, OPEN_FILES = 10_000, 1024  # the reader alone keeps 256 shards open in every loader worker
WRITE_RATE = 20 * MIB
CLOCK_SECONDS = 1.0  # file times and heartbeats are compared between nodes
GPU_IN_USE = 1024  # MiB
BETWEEN_RATE = 0.25e9  # bytes/s; two gigabits
SLOWER = 0.5  # of the median of the others
