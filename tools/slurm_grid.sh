#!/bin/bash
#SBATCH --job-name=iclgd
#SBATCH --ntasks=8
#SBATCH --cpus-per-task=4
#SBATCH --gpus-per-task=1
#SBATCH --time=12:00:00
# A grid on Slurm: `sbatch tools/slurm_grid.sh --preset paper --task cb --seed 3 --seed 4`, from the repository. Submit it
# again to go on from what is stored; a single run must fit the time limit. Its commands were tried with processes in place
# of srun, not on a real cluster. RESOURCES="GPU=1" (the default) is what each worker offers; RESOURCES="" for none.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:-.}"
export DASK_CONFIG="$PWD/iclgd_helpers/experiments/dask.yaml"
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
file="$PWD/_runs/scheduler-${SLURM_JOB_ID:-$$}.json"
mkdir -p _runs
trap 'kill $(jobs -p) 2>/dev/null || true; rm -f "$file"' EXIT

srun --overlap --ntasks=1 .venv/bin/dask scheduler --port 0 --no-dashboard --scheduler-file "$file" &
until [ -s "$file" ]; do sleep 0.5; done
offers=()
[ -z "${RESOURCES-GPU=1}" ] || offers=(--resources "${RESOURCES-GPU=1}")
srun .venv/bin/dask worker --scheduler-file "$file" --nthreads 1 --memory-limit 0 --no-dashboard --death-timeout 300 \
  "${offers[@]}" &
.venv/bin/iclgd grid "$@" --on "$file"
