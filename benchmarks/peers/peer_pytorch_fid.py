"""pytorch-fid 0.3.0 on features and pictures that `evaluate.py` has written: its seconds, as JSON lines.

Runs in an environment of its own, which has torch and no JAX:

    python3.11 -m venv PEER
    PEER/bin/pip install torch==2.13.0 torchvision==0.28.0 scipy==1.17.1 pytorch-fid==0.3.0
    echo distance | PEER/bin/python -m benchmarks.peers.peer_pytorch_fid FOLDER

distance   one.npy and other.npy: statistics of both sets as its `calculate_activation_statistics` makes them, distance
features   pictures/*.png by the network of weights.npz, with its own loop and its command's batch and workers
"""

import contextlib
import json
import os
import pathlib
import sys
import time

import numpy as np
import torch

try:
    import torchvision  # noqa: F401
except RuntimeError:  # a build without its compiled operators, of which nothing here is used
    for operator in ("nms", "qnms"):
        torch.library.define(f"torchvision::{operator}", "(Tensor a, Tensor b, float c) -> Tensor")

import pytorch_fid.inception as inception
from pytorch_fid import fid_score

BATCH = 50  # its command's default
WARM_UP = 8  # pictures


def distance(folder: pathlib.Path) -> dict:
    sets = [np.load(folder / f"{name}.npy") for name in ("one", "other")]
    start = time.perf_counter()
    statistics = []
    for features in sets:
        activations = np.empty(features.shape)  # as `get_activations` collects them
        activations[:] = features
        statistics += [np.mean(activations, axis=0), np.cov(activations, rowvar=False)]
    between = time.perf_counter()
    fid = float(fid_score.calculate_frechet_distance(*statistics))
    return {"statistics": between - start, "distance": time.perf_counter() - between, "fid": fid}


def features(folder: pathlib.Path) -> dict:
    with np.load(folder / "weights.npz") as arrays:
        state = {name: torch.from_numpy(arrays[name]) for name in arrays}
    inception.load_state_dict_from_url = lambda *_, **__: state  # it would fetch the published file
    network = inception.InceptionV3()
    files = sorted((folder / "pictures").glob("*.png"))
    workers = min(len(os.sched_getaffinity(0)), 8)  # as its command has it
    seconds = []
    for taken in (files[:WARM_UP], files):
        start = time.perf_counter()
        found = fid_score.get_activations(taken, network, BATCH, 2_048, "cpu", workers)
        seconds.append(time.perf_counter() - start)
    np.save(folder / "theirs.npy", found)
    return {"pictures_a_second": len(files) / seconds[-1]}


if __name__ == "__main__":
    for line in sys.stdin:
        with contextlib.redirect_stdout(sys.stderr):  # it prints warnings
            found = {"distance": distance, "features": features}[line.strip()](pathlib.Path(sys.argv[1]))
        print(json.dumps({**found, "torch": torch.__version__}), flush=True)
