#!/usr/bin/env bash
# Train on this machine, or resume a training: one process with all devices,
#   launch/local.sh configs/transformer.py:demo runs/transformer \
#       --config.frozen.image_tokenizer=runs/dvae --config.tokenizer=runs/tokenizer
# or N processes, each with one GPU or the CPU, a pod in miniature:
#   PROCESSES=2 launch/local.sh configs/dvae.py:demo runs/dvae
set -euo pipefail
# JAX takes memory as it needs it, and leaves the rest to data processes or a second run.
export XLA_PYTHON_CLIENT_PREALLOCATE="${XLA_PYTHON_CLIENT_PREALLOCATE:-false}"

processes="${PROCESSES:-1}"
train=(dalle-jax train --config "$1" --workdir "$2" "${@:3}")
if ((processes == 1)); then
  exec "${train[@]}"
fi

# Each process runs in its own process group: Ctrl-C reaches only this script, which sends each of them one SIGTERM. A
# second signal would kill them.
set -m
pids=()
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' TERM INT HUP
for ((i = 0; i < processes; i++)); do
  CUDA_VISIBLE_DEVICES="$i" "${train[@]}" \
    --coordinator "localhost:${PORT:-8476}" --num-processes "$processes" --process-id "$i" &
  pids+=("$!")
done

highest=0
for pid in "${pids[@]}"; do
  code=0
  wait "$pid" || code=$?
  # A signal to this script ends the wait, not the process.
  while kill -0 "$pid" 2>/dev/null; do
    code=0
    wait "$pid" || code=$?
  done
  if ((code > highest)); then
    highest=$code
  fi
done
exit "$highest"
