#!/bin/bash

# Parameters
#SBATCH --account=vision
#SBATCH --chdir=/shared/runs/refiner_s
#SBATCH --constraint='a100|h100'
#SBATCH --cpus-per-task=12
#SBATCH --dependency=afterok:7
#SBATCH --exclude=node7,node9
#SBATCH --gpus-per-node=h100:8
#SBATCH --job-name=refiner_s
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --mem=922112M
#SBATCH --no-requeue
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --open-mode=append
#SBATCH --output=/shared/runs/refiner_s/jobs/%j_0_log.out
#SBATCH --partition=gpu
#SBATCH --qos=long
#SBATCH --reservation=maths
#SBATCH --signal=USR2@300
#SBATCH --time=1440

# setup
code=/shared/runs/refiner_s/code/$SLURM_JOB_ID
for _ in {1..60}; do [ -d "$code" ] && break; sleep 1; done
cd "$code" || { echo 'launch: its code has not appeared in /shared/runs/refiner_s/code for 60 s; submit the run again'; exit 2; }
export PYTHONPATH="$code${PYTHONPATH:+:$PYTHONPATH}"
trap 'failed=$BASH_COMMAND; trap - ERR EXIT; cd "$code"; exec <python> -u -m launch.supervisor /shared/runs/refiner_s --setup-failed "$failed"' ERR EXIT
module load cuda/12.4
trap - ERR EXIT
cd "$code"
export NCCL_SOCKET_IFNAME=ib0
export GREETING='it'"'"'s $HOME'
export PYTHONPATH="$code${PYTHONPATH:+:$PYTHONPATH}"

# command
export SUBMITIT_EXECUTOR=slurm
exec <python> -u -m launch.supervisor /shared/runs/refiner_s -- srun --unbuffered --output=/shared/runs/refiner_s/jobs/%j_%t_log.out --kill-on-bad-exit=1 --cpus-per-task=12 --cpu-bind=cores --mpi=none --label <python> -u -m submitit.core._submit /shared/runs/refiner_s/jobs
