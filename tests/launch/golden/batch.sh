#!/bin/bash

# Parameters
#SBATCH --account=vision
#SBATCH --chdir=/shared/runs/refiner_s/code
#SBATCH --constraint='a100|h100'
#SBATCH --cpus-per-task=12
#SBATCH --exclusive
#SBATCH --gpus-per-node=8
#SBATCH --job-name=refiner_s
#SBATCH --mem=922112M
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --open-mode=append
#SBATCH --output=/shared/runs/refiner_s/jobs/%j_0_log.out
#SBATCH --partition=gpu
#SBATCH --qos=long
#SBATCH --requeue
#SBATCH --reservation=maths
#SBATCH --signal=USR2@300
#SBATCH --time=1440

# setup
module load cuda/12.4
export NCCL_SOCKET_IFNAME=ib0
export GREETING='it'"'"'s $HOME'
export PYTHONPATH=/shared/runs/refiner_s/code${PYTHONPATH:+:$PYTHONPATH}

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /shared/runs/refiner_s/jobs/%j_%t_log.out --kill-on-bad-exit=1 --cpus-per-task=12 <python> -u -m submitit.core._submit /shared/runs/refiner_s/jobs
