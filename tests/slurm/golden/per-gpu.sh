#!/bin/bash

# Parameters
#SBATCH --array=0-2%2
#SBATCH --cpus-per-task=1
#SBATCH --dependency=afterok:7
#SBATCH --gpus=a100:4
#SBATCH --gres=lscratch:200,nvme:1
#SBATCH --job-name=tiny
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --mem-per-gpu=32G
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=2
#SBATCH --open-mode=append
#SBATCH --output='/work here/logs/tiny/%A_%a_0_log.out'
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --time=90

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
run_submitted train python3 "$root/ftlib/run_module.py" -u -m submitit.core._submit '/work here/logs/tiny'

#!/bin/bash

# Parameters
#SBATCH --array=0-2%2
#SBATCH --cpus-per-task=1
#SBATCH --dependency=aftercorr:ARRAY1
#SBATCH --gpus=a100:4
#SBATCH --gres=lscratch:200,nvme:1
#SBATCH --job-name=tiny
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --mem-per-gpu=32G
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=2
#SBATCH --open-mode=append
#SBATCH --output='/work here/logs/tiny/%A_%a_0_log.out'
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --time=90

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
run_submitted evaluate python3 "$root/ftlib/run_module.py" -u -m submitit.core._submit '/work here/logs/tiny'

#!/bin/bash

# Parameters
#SBATCH --cpus-per-task=1
#SBATCH --dependency=afterok:7,afterany:ARRAY2
#SBATCH --gpus=a100:4
#SBATCH --gres=lscratch:200,nvme:1
#SBATCH --job-name=tiny
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --mem-per-gpu=32G
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=2
#SBATCH --open-mode=append
#SBATCH --output='/work here/logs/tiny/%j_0_log.out'
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --time=90

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
run_submitted train python3 "$root/ftlib/run_module.py" -u -m submitit.core._submit '/work here/logs/tiny'

#!/bin/bash

# Parameters
#SBATCH --cpus-per-task=1
#SBATCH --dependency=afterok:ARRAY3
#SBATCH --gpus=a100:4
#SBATCH --gres=lscratch:200,nvme:1
#SBATCH --job-name=tiny
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --mem-per-gpu=32G
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=2
#SBATCH --open-mode=append
#SBATCH --output='/work here/logs/tiny/%j_0_log.out'
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --time=90

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
run_submitted evaluate python3 "$root/ftlib/run_module.py" -u -m submitit.core._submit '/work here/logs/tiny'

#!/bin/bash

# Parameters
#SBATCH --cpus-per-task=1
#SBATCH --dependency=afterany:ARRAY1:ARRAY2:ARRAY3:ARRAY4
#SBATCH --job-name=tiny-report
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output='/work here/logs/tiny/%j_0_log.out'
#SBATCH --requeue
#SBATCH --signal=B:USR1@300
#SBATCH --time=90

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
run_submitted report python3 "$root/ftlib/run_module.py" -u -m submitit.core._submit '/work here/logs/tiny'
