#!/usr/bin/env bash
# NOT RUN. A job on several nodes under Slurm:
#
#   sbatch scripts/cluster/slurm.sh bash scripts/run_sayo_qwen3vl_8b.sh trainer.total_epochs=1
#
# Submit it from the clone, on a disk that all nodes mount, with .venv-gpu made (scripts/setup_env.sh gpu). Variables of
# the job (DATA, METHOD, OUT, ...) are passed on by sbatch. OUT must not depend on the time: name it.
#SBATCH --job-name=sayo-verl
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --output=slurm-%j.log
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit it with sbatch}"
source "${SAYO_VENV:-.venv-gpu}/bin/activate"

HEAD="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
HEAD_IP="$(srun --nodes=1 --ntasks=1 --nodelist="$HEAD" hostname --ip-address | cut -d ' ' -f 1)"
RAY_AUTH_TOKEN="$(python3 -c 'import secrets; print(secrets.token_hex(32))')"
export HEAD_IP RAY_AUTH_TOKEN NNODES="$SLURM_JOB_NUM_NODES"
export NGPUS_PER_NODE="${NGPUS_PER_NODE:-8}" RAY_PORT=$((20000 + SLURM_JOB_ID % 10000))
export RAY_OPTIONS="--num-cpus=$SLURM_CPUS_PER_TASK --num-gpus=$NGPUS_PER_NODE"

# When the first node ends with the command, the others are ended with the step.
srun --kill-on-bad-exit=1 --wait=30 bash -c 'NODE_RANK=$SLURM_PROCID exec bash scripts/cluster/node.sh "$@"' node "$@"
