#!/bin/bash

# Parameters
#SBATCH --account=lab
#SBATCH --array=0-2%2
#SBATCH --constraint='a100|h100'
#SBATCH --cpus-per-task=1
#SBATCH --exclude='n[3-5]'
#SBATCH --exclusive
#SBATCH --gres=gpu:a100:1
#SBATCH --job-name=tiny
#SBATCH --mail-type=END,FAIL
#SBATCH --mail-user=me@example.org
#SBATCH --mem=48G
#SBATCH --nice=100
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output='/work here/logs/tiny/%A_%a_0_log.out'
#SBATCH --partition=long
#SBATCH --qos=high
#SBATCH --requeue
#SBATCH --reservation=course
#SBATCH --signal=B:USR1@120
#SBATCH --time=2160

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
