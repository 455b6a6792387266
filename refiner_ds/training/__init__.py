"""The training loop and its parts. Nothing here knows of Slurm; nothing in ``models`` or ``data`` knows of this."""
