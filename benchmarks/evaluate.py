"""Statistics and distance of two sets of 30,000 x 2,048 features, and features of pictures, beside pytorch-fid.

    python benchmarks/evaluate.py distance        # both sides in one run, same features and cores
    python benchmarks/evaluate.py features        # pool3 of 299-pixel pictures, random weights, CPU

Takes PyTorch, torchvision and pytorch-fid. Prints one JSON object.
"""

import argparse
import json
import pathlib
import sys
import time

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "tests"))
COUNT, FEATURES = 30_000, 2_048
PICTURES, REPEATS = 16, 3


def distance() -> dict:
    """Seconds of each side for the statistics of both sets and their distance, and the two distances."""
    from test_distances import relu_features

    from dalle_jax.evaluate import distances, moments

    sets = relu_features(1, COUNT, FEATURES), relu_features(2, COUNT, FEATURES, shift=0.1)
    start = time.perf_counter()
    ours = [moments.of(features) for features in sets]
    between = time.perf_counter()
    fid = distances.fid(*ours[0], *ours[1])
    found = {"ours": {"statistics": between - start, "distance": time.perf_counter() - between, "fid": fid}}
    from test_inception import import_torchvision

    import_torchvision("pytorch-fid takes torchvision")
    from pytorch_fid.fid_score import calculate_frechet_distance

    start = time.perf_counter()
    theirs = []
    for features in sets:  # as its get_activations and calculate_activation_statistics do
        double = np.empty(features.shape)
        double[:] = features
        theirs += [np.mean(double, axis=0), np.cov(double, rowvar=False)]
    between = time.perf_counter()
    fid = float(calculate_frechet_distance(*theirs))
    found["pytorch-fid"] = {"statistics": between - start, "distance": time.perf_counter() - between, "fid": fid}
    totals = [part["statistics"] + part["distance"] for part in (found["pytorch-fid"], found["ours"])]
    return found | {"times_faster": totals[0] / totals[1]}


def features() -> dict:
    """Pictures a second of each side, the best of REPEATS after one to warm up; the resize is in both."""
    import test_inception
    import torch

    from dalle_jax.convert import inception as importer
    from dalle_jax.evaluate import preprocess
    from dalle_jax.evaluate.features import Extractor
    from dalle_jax.models import inception

    test_inception.import_torchvision("pytorch-fid takes torchvision")
    import pytorch_fid.inception as fid

    state = test_inception.weights("fid")
    fid.load_state_dict_from_url = lambda *_, **__: {name: torch.from_numpy(array) for name, array in state.items()}
    network = fid.InceptionV3().eval()
    config, params = importer.convert(state)
    extractor = Extractor(inception.model(config), params, batch=PICTURES)
    images = test_inception.pictures(256, PICTURES)
    x_BCHW = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255

    def theirs():
        with torch.no_grad():
            return network(x_BCHW)[0]

    def ours():
        return extractor(np.stack([preprocess.pytorch(image) for image in images]))[0]

    found = {"ours": _rate(ours), "pytorch-fid": _rate(theirs)}
    apart = np.abs(ours() - theirs().numpy()[:, :, 0, 0]).max()
    return found | {"ratio": found["ours"] / found["pytorch-fid"], "largest_difference": float(apart)}


def _rate(work) -> float:
    work()
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return PICTURES / min(seconds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("distance", "features"))
    print(json.dumps({"distance": distance, "features": features}[parser.parse_args().what](), indent=1))
