"""A real Slurm on this machine, for tests that submit jobs; see cluster.py."""
