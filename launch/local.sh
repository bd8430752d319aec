#!/usr/bin/env bash
# Several processes of the training command on this machine, joined over loopback.
#
#     launch/local.sh N ARGS…
#     launch/local.sh 2 --config configs/digits.py --workdir runs/two
#
# Every line of output starts with the number of its process. SIGTERM, Ctrl-C and the end of the
# terminal reach all processes: they save together and end; a second Ctrl-C ends them at once. When
# one dies, the others end too. The exit status is that of the first process that failed, else 0.
#
# PYTHON=…            the interpreter (python)
# PORT=…              where the processes meet (a free port)
# DEVICE_VARIABLE=…   a variable that is set to the process's number, such as
#                     CUDA_VISIBLE_DEVICES for one GPU each (none)
# DRY_RUN=1           print the commands instead
set -euo pipefail

# How long the others may take to end by themselves, with a message, once one has died.
readonly GRACE_SECONDS=15

if [[ ! ${1:-} =~ ^[1-9][0-9]*$ || $# -lt 2 ]]; then
  echo "usage: launch/local.sh N ARGS…  (N processes of dfs_jax.main ARGS…)" >&2
  exit 2
fi
readonly count=$1
shift
readonly python=${PYTHON:-python}

free_port() {
  "$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

port=${PORT:-$(free_port)}

command_of() { # process number; the words are left in the array `words`
  words=()
  if [[ -n ${DEVICE_VARIABLE:-} ]]; then
    words+=(env "$DEVICE_VARIABLE=$1")
  fi
  words+=("$python" -m dfs_jax.main "${arguments[@]}"
    --coordinator "127.0.0.1:$port" --num-processes "$count" --process-id "$1")
}

prefixed() { # label; standard input line by line, a last one without its end included
  local line
  while IFS= read -r line || [[ -n $line ]]; do
    printf '[%s] %s\n' "$1" "$line" || true
  done
}

arguments=("$@")
if [[ -n ${DRY_RUN:-} ]]; then
  for ((i = 0; i < count; i++)); do
    command_of "$i"
    printf '%q ' "${words[@]}"
    printf '\n'
  done
  exit 0
fi

# The shell would add a notice of its own for every process that a signal ends.
exec 3>&2 2>/dev/null
pipes=$(mktemp -d)
pids=() printers=()
end_all() {
  for pid in "${pids[@]}"; do kill "-$1" "$pid" 2>/dev/null || true; done
}
trap 'rm -rf "$pipes"' EXIT
trap '' PIPE # whoever reads the output may end before the processes have saved
trap 'end_all TERM' TERM HUP
trap 'end_all "${ctrl_c:-TERM}"; ctrl_c=KILL' INT

for ((i = 0; i < count; i++)); do
  mkfifo "$pipes/$i.out" "$pipes/$i.err"
  # The printers outlive a Ctrl-C, so that the last words of a process are seen.
  (trap '' TERM INT HUP && prefixed "$i" <"$pipes/$i.out") &
  printers+=($!)
  (trap '' TERM INT HUP && prefixed "$i" <"$pipes/$i.err" >&3) &
  printers+=($!)
  command_of "$i"
  "${words[@]}" >"$pipes/$i.out" 2>"$pipes/$i.err" &
  pids+=($!)
done

status=0
deadline=
left=("${pids[@]}")
while ((${#left[@]})); do
  running=()
  for pid in "${left[@]}"; do
    if kill -0 "$pid" 2>/dev/null; then
      running+=("$pid")
    else
      code=0
      wait "$pid" || code=$?
      if ((code && !status)); then
        echo "launch/local.sh: a process ended with status $code; all of them end" >&3 || true
        status=$code
        deadline=$((SECONDS + GRACE_SECONDS))
      fi
    fi
  done
  left=(${running[@]+"${running[@]}"})
  if [[ -n $deadline ]] && ((${#left[@]} && SECONDS >= deadline)); then
    echo "launch/local.sh: ${#left[@]} did not end within $GRACE_SECONDS s and are killed" >&3 || true
    end_all KILL
    deadline=
  fi
  sleep 0.2 || true # a Ctrl-C ends it too
done
wait "${printers[@]}"
exit "$status"
