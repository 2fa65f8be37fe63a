"""Statistics, distance and features beside pytorch-fid, in turns, on the same features, pictures and cores.

    python -m benchmarks.peers.evaluate --peer-python PEER/bin/python

`peer_pytorch_fid.py` says how to make that environment. Each round measures both sides, one after the other; a ratio
is the middle one of the rounds. The distance is of two sets of 30,000 x 2,048 features. Features are pool3 of PNG files
of 256 pixels, decoding and resize included, by a network of random weights, each side in its own batches and with its
own way of reading files. Both keep freed memory (`harness.KEEP_FREED`).
"""

import collections
import pathlib
import statistics
import tempfile
import time

import numpy as np
from PIL import Image

from benchmarks import harness
from benchmarks.peers.process import PeerProcess

COUNT, FEATURES = 30_000, 2_048
PICTURES, SIDE = 96, 256
WARM_UP = 8  # pictures, on both sides
DISTANCE_BAR, FEATURES_BAR = 3.0, 0.8


class Ours:
    """Our side; what it compiles and opens is kept between the rounds."""

    def __init__(self, folder: pathlib.Path):
        from dalle_jax.convert.inception import convert
        from dalle_jax.data.sources import open_source
        from dalle_jax.evaluate.features import Extractor
        from dalle_jax.evaluate.preprocess import Preprocess
        from dalle_jax.models import inception
        from tests.support.inception_weights import state_dict

        state = state_dict("fid")
        np.savez(folder / "weights.npz", **state)
        config, params = convert(state)
        self.folder, self.preprocess = folder, Preprocess()
        self.extractor = Extractor(inception.model(config), params)
        self.source = open_source(f"folder:{folder / 'pictures'}", captions_required=False)
        self.found = self.extractor.of_source(self.source, preprocess=self.preprocess)  # compiles

    def distance(self) -> dict:
        from dalle_jax.evaluate import distances

        sets = [np.load(self.folder / f"{name}.npy") for name in ("one", "other")]
        start = time.perf_counter()
        one, other = (distances.mean_and_covariance(features) for features in sets)
        between = time.perf_counter()
        fid = distances.fid(*one, *other)
        return {"statistics": between - start, "distance": time.perf_counter() - between, "fid": fid}

    def features(self) -> dict:
        self.extractor.of_source(self.source, preprocess=self.preprocess, rows=range(WARM_UP))
        start = time.perf_counter()
        self.extractor.of_source(self.source, preprocess=self.preprocess)
        seconds = time.perf_counter() - start
        batch = np.zeros((self.extractor.batch, 299, 299, 3), np.float32)
        start = time.perf_counter()
        self.extractor(batch)
        alone = len(batch) / (time.perf_counter() - start)
        return {"pictures_a_second": PICTURES / seconds, "network_alone": alone}


def relu_features(seed: int, *, shift: float = 0.0) -> np.ndarray:
    """float32 [COUNT, FEATURES] like those of a network: correlated, not negative, a third of them 0."""
    rng = np.random.default_rng(seed)
    mix = np.random.default_rng(99).standard_normal((FEATURES // 4, FEATURES)) / (FEATURES // 4) ** 0.5
    return np.maximum(rng.standard_normal((COUNT, FEATURES // 4)) @ mix + 0.4 + shift, 0).astype(np.float32)


def write_inputs(folder: pathlib.Path) -> None:
    np.save(folder / "one.npy", relu_features(1))
    np.save(folder / "other.npy", relu_features(2, shift=0.1))
    (folder / "pictures").mkdir()
    for number in range(PICTURES):
        small = np.random.default_rng(number).integers(0, 256, (16, 16, 3), np.uint8)
        image = Image.fromarray(small).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        image.save(folder / "pictures" / f"{number:03d}.png")


def main() -> None:
    args = harness.parser(__doc__, rounds=3, peer=True).parse_args()
    harness.two_cpus(harness.cores())
    machine = harness.machine()
    answers: dict[str, list[dict]] = collections.defaultdict(list)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_inputs(folder)
        ours, theirs = Ours(folder), PeerProcess(args.peer_python, "peer_pytorch_fid", folder)
        for _ in range(args.rounds):
            answers["our distance"].append(ours.distance())
            answers["distance"].append(theirs.ask("distance"))
            answers["our features"].append(ours.features())
            answers["features"].append(theirs.ask("features"))
        theirs.close()
        apart = float(np.abs(np.load(folder / "theirs.npy") - ours.found.features_XF).max())

    def values(work: str, *keys: str) -> list[float]:
        return [sum(answer[key] for key in keys) for answer in answers[work]]

    rows = []
    for what, keys, bar in (
        (f"statistics of two sets of {COUNT:,} x {FEATURES:,}, s", ("statistics",), None),
        ("distance of the two, s", ("distance",), None),
        ("both, s", ("statistics", "distance"), DISTANCE_BAR),
    ):
        sides = values("our distance", *keys), values("distance", *keys)
        rows.append(row(what, *sides, harness.ratios(sides[1], sides[0]), bar))
    rates = [values(work, "pictures_a_second") for work in ("our features", "features")]
    what = f"pictures a second from {SIDE}-pixel PNG files to features"
    rows.append(row(what, *rates, harness.ratios(*rates), FEATURES_BAR))
    fids = [answers[work][0]["fid"] for work in ("our distance", "distance")]
    alone = statistics.median(values("our features", "network_alone"))
    lines = [
        f"{machine[:-1]}, torch {answers['distance'][0]['torch']}, numpy {np.__version__}.",
        *harness.command(args, peer_python="PEER/bin/python"),
        "Both sides on the same features, files and cores, random weights.",
        "",
        *harness.table("what | ours | pytorch-fid | ratio (lowest and highest round) | bar", rows),
        "",
        f"FID {fids[0]:.9f} and {fids[1]:.9f}; the features of the pictures differ by at most {apart:.1e}. The network "
        f"alone takes {alone:.1f} pictures a second on our side.",
    ]
    harness.write(args.results / "evaluate.md", "Evaluation next to pytorch-fid 0.3.0", lines)


def row(what: str, ours: list[float], theirs: list[float], ratios: list[float], bar: float | None) -> tuple[str, ...]:
    middles = [f"{statistics.median(side):.2f}" for side in (ours, theirs)]
    return what, *middles, harness.spread(ratios), harness.met(statistics.median(ratios), bar)


if __name__ == "__main__":
    main()
