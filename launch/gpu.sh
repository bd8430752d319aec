#!/usr/bin/env bash
# The training command on GPUs: on one machine, or on several that reach each other.
#
#     launch/gpu.sh ARGS…                       one process with all GPUs of this machine
#     launch/gpu.sh --per-gpu ARGS…             one process per GPU of this machine
#     launch/gpu.sh --machine I/N HOST:PORT ARGS…
#                                               machine I (from 0) of N, one process on each,
#                                               all giving the same HOST:PORT of machine 0
#
# Options come before ARGS, the arguments of dfs_jax.main. --dry-run prints the commands.
# One process per machine is the simplest; one per GPU helps when the host is the bottleneck,
# for each process prepares its own share of the batch.
#
# PYTHON=…   the interpreter (python)
# GPUS=…     with --per-gpu, how many (all that nvidia-smi lists)
set -euo pipefail

usage() {
  sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' "$0" >&2
  exit 2
}

python=${PYTHON:-python}
dry_run=
per_gpu=
machine=
coordinator=
while (($#)); do
  case $1 in
    --dry-run) dry_run=1 ;;
    --per-gpu) per_gpu=1 ;;
    --machine)
      [[ ${2:-} =~ ^[0-9]+/[0-9]+$ && ${3:-} == *:* ]] || usage
      machine=$2 coordinator=$3
      shift 2
      ;;
    *) break ;;
  esac
  shift
done
(($#)) || usage
if [[ -n $per_gpu && -n $machine ]]; then
  echo "launch/gpu.sh: give --per-gpu or --machine, not both" >&2
  exit 2
fi

if [[ -n $per_gpu ]]; then
  count=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}
  DRY_RUN=$dry_run DEVICE_VARIABLE=CUDA_VISIBLE_DEVICES exec "$(dirname "$0")/local.sh" "$count" "$@"
fi

words=("$python" -m dfs_jax.main "$@")
if [[ -n $machine ]]; then
  words+=(--coordinator "$coordinator" --num-processes "${machine#*/}" --process-id "${machine%/*}")
fi
if [[ -n $dry_run ]]; then
  printf '%q ' "${words[@]}"
  printf '\n'
  exit 0
fi
exec "${words[@]}"
