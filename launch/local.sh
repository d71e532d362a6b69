#!/usr/bin/env bash
# N processes on this machine, as they would be on N hosts: to try a recipe, or one process for each GPU.
#
#   launch/local.sh 4 grpo configs/demo.py --run.dir runs/four --mesh.data -1
#
# On CPU every process has one device (JAX_NUM_CPU_DEVICES sets another number) and gloo carries the collectives. On
# GPUs process i takes GPU i. Process 0 reports; what the others say is marked with their number.
#
# Ctrl-C or SIGTERM reaches all of them: they save and stop, and the same line goes on from there.
set -euo pipefail

processes=${1:?usage: launch/local.sh PROCESSES VERB [CONFIG.py] [--part.field value ...]}
shift
port=${KARDIA_PORT:-$((20000 + RANDOM % 20000))}
export JAX_NUM_CPU_DEVICES=${JAX_NUM_CPU_DEVICES:-1}

run() {
  JAX_LOCAL_DEVICE_IDS=$1 exec kardia "${@:2}" --run.auto-resume \
    --coordinator "127.0.0.1:$port" --processes "$processes" --process "$1"
}

pids=()
for ((i = 0; i < processes; i++)); do
  if ((i == 0)); then run 0 "$@" & else run "$i" "$@" > >(sed -u "s/^/[$i] /") 2>&1 & fi
  pids+=($!)
done
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT

# A signal ends `wait` early: then the process is waited for again. The first failure is the script's own.
code=0
for pid in "${pids[@]}"; do
  ended=0
  wait "$pid" || ended=$?
  while kill -0 "$pid" 2>/dev/null; do
    ended=0
    wait "$pid" || ended=$?
  done
  if ((code == 0)); then code=$ended; fi
done
exit "$code"
