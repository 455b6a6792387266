#!/bin/bash

# Parameters
#SBATCH --chdir=/shared/runs/refiner_s
#SBATCH --job-name=refiner_s
#SBATCH --mem=0
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=2
#SBATCH --open-mode=append
#SBATCH --output=/shared/runs/refiner_s/jobs/%j_0_log.out
#SBATCH --requeue
#SBATCH --signal=USR2@120

# setup
code=/shared/runs/refiner_s/code/$SLURM_JOB_ID
for _ in {1..60}; do [ -d "$code" ] && break; sleep 1; done
cd "$code" || { echo 'launch: its code has not appeared in /shared/runs/refiner_s/code for 60 s; submit the run again'; exit 2; }
export PYTHONPATH="$code${PYTHONPATH:+:$PYTHONPATH}"

# command
export SUBMITIT_EXECUTOR=slurm
exec <python> -u -m launch.supervisor /shared/runs/refiner_s -- srun --unbuffered --output=/shared/runs/refiner_s/jobs/%j_%t_log.out --kill-on-bad-exit=1 <python> -u -m submitit.core._submit /shared/runs/refiner_s/jobs
