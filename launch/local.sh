#!/usr/bin/env bash
# Train on all devices of this machine, or go on with a training:
#   launch/local.sh configs/transformer.py:demo runs/transformer --config.dvae=runs/dvae --config.tokenizer=runs/tokenizer
set -euo pipefail
# JAX takes memory as it needs it, so that a data process or a second run finds some left.
export XLA_PYTHON_CLIENT_PREALLOCATE="${XLA_PYTHON_CLIENT_PREALLOCATE:-false}"
exec dalle-jax train --config "$1" --workdir "$2" "${@:3}"
