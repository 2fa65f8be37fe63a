#!/usr/bin/env bash
# Train on a Cloud TPU slice, requested as a queued resource, or resume a training. From the root of the checkout:
#   export TPU=dalle ZONE=us-east5-a TYPE=v5p TOPOLOGY=8x8x16 RUNTIME=v2-alpha-tpuv5 BUCKET=my-bucket
#   launch/tpu_pod.sh create --spot         # ask for the slice; further words go to gcloud
#   launch/tpu_pod.sh status                # until it says ACTIVE
#   launch/tpu_pod.sh install               # this commit and its environment onto every worker, the bucket at ~/bucket
#   launch/tpu_pod.sh run configs/transformer.py:12b bucket/runs/12b \
#       --config.run.checkpoint_dir=gs://my-bucket/runs/12b/checkpoints --config.run.data.train='wds:bucket/pairs/*.tar' \
#       --config.frozen.image_tokenizer=bucket/runs/dvae --config.tokenizer=bucket/runs/tokenizer
#   launch/tpu_pod.sh logs                  # follow worker 0, or with WORKER=7 another one
#   launch/tpu_pod.sh stop                  # SIGTERM, save, end
#   launch/tpu_pod.sh delete                # give the slice back; also before create, if it was preempted
# `run` with the same workdir resumes the training, on this slice or a new one.
set -euo pipefail

on_workers() { # WHICH COMMAND
  gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker "$1" --command "$2"
}

verb="${1-}"
case "$verb" in
create)
  gcloud compute tpus queued-resources create "$TPU" --node-id "$TPU" --zone "$ZONE" \
    --type "$TYPE" --topology "$TOPOLOGY" --runtime-version "$RUNTIME" "${@:2}"
  ;;
status)
  gcloud compute tpus queued-resources describe "$TPU" --zone "$ZONE" --format "value(state.state)"
  ;;
install)
  # The image's Python may be older than the 3.11 that the package requires.
  git archive --output dalle-jax.tar HEAD
  gcloud compute tpus tpu-vm scp dalle-jax.tar "$TPU:" --zone "$ZONE" --worker all
  on_workers all "set -e; mkdir -p dalle-jax bucket; tar xf dalle-jax.tar -C dalle-jax
    mountpoint -q bucket || gcsfuse --implicit-dirs $BUCKET bucket; ln -sfn ../bucket dalle-jax/bucket
    sudo apt-get update -q; sudo apt-get install -qy python3.11-venv
    python3.11 -m venv dalle-jax/.venv; dalle-jax/.venv/bin/pip install -q -e 'dalle-jax[tpu]'"
  ;;
run)
  # systemd keeps the run when ssh ends, stops it with one SIGTERM and five minutes to save, and restarts it unless it
  # succeeded, was stopped or ended with 2 (an error of the user), at most fifty times a day.
  properties=(Restart=on-failure RestartPreventExitStatus=2 RestartSec=15 StartLimitIntervalSec=86400
    StartLimitBurst=50 KillMode=mixed TimeoutStopSec=300 Environment=DALLE_JAX_CACHE=bucket/cache)
  # shellcheck disable=SC2016 # the worker's shells expand these
  train='source launch/xla_flags.sh tpu && exec .venv/bin/dalle-jax train "$@"'
  printf -v command ' %q' "${properties[@]/#/--property=}" bash -c "$train" train \
    --config "$2" --workdir "$3" "${@:4}"
  # shellcheck disable=SC2016
  on_workers all 'cd dalle-jax &&
    sudo systemd-run --unit=dalle-jax --collect --uid="$USER" --working-directory="$PWD"'"$command"
  ;;
logs) on_workers "${WORKER:-0}" "journalctl --unit dalle-jax --follow --lines 100 --output cat" ;;
stop) on_workers all "sudo systemctl stop dalle-jax" ;;
delete) gcloud compute tpus queued-resources delete "$TPU" --zone "$ZONE" --force ;;
*)
  echo "$0: expected create, status, install, run, logs, stop or delete, got '$verb': see the head of this file" >&2
  exit 2
  ;;
esac
