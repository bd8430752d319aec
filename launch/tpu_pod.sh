#!/usr/bin/env bash
# The training command on every host of a Cloud TPU slice.
#
#     export TPU_NAME=dfs TPU_ZONE=us-central2-b TPU_TYPE=v4-32
#     launch/tpu_pod.sh create          make the slice
#     launch/tpu_pod.sh setup           this checkout and its dependencies on all hosts
#     launch/tpu_pod.sh run ARGS…       dfs_jax.main ARGS… on all hosts; --workdir on gs://
#     launch/tpu_pod.sh logs DIR        each host's log, into DIR
#     launch/tpu_pod.sh delete          remove the slice, which costs until then
#
# --dry-run before the word prints the commands instead. `run` given again goes on from the
# newest checkpoint, also on a slice of another size.
#
# TPU_VERSION=…    the runtime (tpu-ubuntu2204-base)
# TPU_PROJECT=…    the project (gcloud's own setting)
# TPU_HOSTS=…      hosts of the slice, for `logs` (asked of gcloud)
# TPU_OPTIONS=…    more options of `create`, such as --spot
set -euo pipefail

readonly archive=dfs_jax.tar.gz log=dfs_jax.log

usage() {
  sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p;}' "$0" >&2
  exit 2
}

dry_run=
if [[ ${1:-} == --dry-run ]]; then
  dry_run=1
  shift
fi
action=${1:-}
[[ $action =~ ^(create|setup|run|logs|delete)$ ]] || usage
shift
for name in TPU_NAME TPU_ZONE; do
  if [[ -z ${!name:-} ]]; then
    echo "launch/tpu_pod.sh: set $name" >&2
    exit 2
  fi
done

do_it() {
  if [[ -n $dry_run ]]; then
    printf '%q ' "$@"
    printf '\n'
  else
    "$@"
  fi
}

place=(--zone "$TPU_ZONE")
if [[ -n ${TPU_PROJECT:-} ]]; then
  place+=(--project "$TPU_PROJECT")
fi
tpu() { # gcloud's word, then its arguments
  local word=$1
  shift
  do_it gcloud compute tpus tpu-vm "$word" "$@" "${place[@]}"
}
everywhere() { tpu ssh "$TPU_NAME" --worker all --command "$1"; }

case $action in
  create)
    if [[ -z ${TPU_TYPE:-} ]]; then
      echo "launch/tpu_pod.sh: set TPU_TYPE, for instance v4-32" >&2
      exit 2
    fi
    read -ra options <<<"${TPU_OPTIONS:-}"
    tpu create "$TPU_NAME" --accelerator-type "$TPU_TYPE" \
      --version "${TPU_VERSION:-tpu-ubuntu2204-base}" ${options[@]+"${options[@]}"}
    ;;
  setup)
    packed=$(mktemp -d)
    trap 'rm -rf "$packed"' EXIT
    # What is committed, and nothing else: a run can then be named by its commit.
    do_it git -C "$(dirname "$0")/.." archive --format tar.gz --output "$packed/$archive" HEAD
    tpu scp "$packed/$archive" "$TPU_NAME:$archive" --worker all
    # The images' own Python is older than 3.11.
    everywhere "set -e; mkdir -p dfs_jax; tar -xzf $archive -C dfs_jax
      python3 -m pip install --quiet --user uv
      ~/.local/bin/uv venv --quiet --clear --python 3.12 env
      ~/.local/bin/uv pip install --quiet --python env/bin/python './dfs_jax[tpu]'"
    ;;
  run)
    (($#)) || usage
    printf -v words '%q ' "$@"
    # SIGTERM (a maintenance event, a spot slice that is taken away) reaches Python itself.
    everywhere "cd dfs_jax && set -o pipefail &&
      ~/env/bin/python -m dfs_jax.main $words 2>&1 | tee -a ~/$log"
    ;;
  logs)
    (($# == 1)) || usage
    do_it mkdir -p "$1"
    hosts=${TPU_HOSTS:-}
    if [[ -z $hosts && -n $dry_run ]]; then
      hosts=1
    elif [[ -z $hosts ]]; then
      hosts=$(tpu describe "$TPU_NAME" --format "value(networkEndpoints.len())")
    fi
    for ((i = 0; i < hosts; i++)); do
      tpu scp "$TPU_NAME:$log" "$1/host-$i.log" --worker "$i"
    done
    ;;
  delete)
    tpu delete "$TPU_NAME" --quiet
    ;;
esac
