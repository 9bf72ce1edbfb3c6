#!/bin/bash

# Parameters
#SBATCH --cpus-per-task=1
#SBATCH --job-name=tiny
#SBATCH --mem=16G
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output='/work here/logs/tiny/%j_0_log.out'
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --time=480

# setup
usr1=0 term=0
trap 'usr1=1' USR1
trap 'term=1' TERM
export FTLIB_RUNS=/r
export FTLIB_STORE='/shared store'
FTLIB_JOBS=/r/.jobs/code-1/jobs
source "$FTLIB_JOBS/run.sh" || exit 2

# command
export SUBMITIT_EXECUTOR=slurm
run_submitted train+evaluate python3 "$root/ftlib/run_module.py" -u -m submitit.core._submit '/work here/logs/tiny'
