#!/bin/bash

# Parameters
#SBATCH --chdir=/shared/runs/refiner_s/code
#SBATCH --job-name=refiner_s
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=2
#SBATCH --open-mode=append
#SBATCH --output=/shared/runs/refiner_s/jobs/%j_0_log.out
#SBATCH --requeue
#SBATCH --signal=USR2@120

# setup
export PYTHONPATH=/shared/runs/refiner_s/code${PYTHONPATH:+:$PYTHONPATH}

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /shared/runs/refiner_s/jobs/%j_%t_log.out --kill-on-bad-exit=1 <python> -u -m submitit.core._submit /shared/runs/refiner_s/jobs
