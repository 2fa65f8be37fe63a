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

import numpy as np
from PIL import Image

from benchmarks import harness
from benchmarks.peers.process import PeerProcess
from dalle_jax.convert.inception import convert
from dalle_jax.data.sources import open_source
from dalle_jax.evaluate import distances
from dalle_jax.evaluate.features import Extractor
from dalle_jax.evaluate.preprocess import Preprocess
from dalle_jax.models import inception
from tests.support.evaluation import relu_features
from tests.support.inception_weights import state_dict

COUNT, FEATURES = 30_000, 2_048
PICTURES, SIDE = 96, 256
WARM_UP = 8  # pictures, on both sides
DISTANCE_BAR, FEATURES_BAR = 3.0, 0.8


class Ours:
    """Our side; what it compiles and opens is kept between the rounds."""

    def __init__(self, folder: pathlib.Path):
        state = state_dict("fid")
        np.savez(folder / "weights.npz", **state)
        config, params = convert(state)
        self.folder, self.preprocess = folder, Preprocess()
        self.extractor = Extractor(inception.model(config), params)
        self.source = open_source(f"folder:{folder / 'pictures'}", captions_required=False)
        self.found = self.extractor.of_source(self.source, preprocess=self.preprocess)  # compiles

    def distance(self) -> dict:
        sets = [np.load(self.folder / f"{name}.npy") for name in ("one", "other")]
        found = []
        statistics = harness.seconds(lambda: found.extend(map(distances.mean_and_covariance, sets)))
        distance = harness.seconds(lambda: found.append(distances.fid(*found[0], *found[1])))
        return {"statistics": statistics, "distance": distance, "fid": found[2]}

    def features(self) -> dict:
        self.extractor.of_source(self.source, preprocess=self.preprocess, rows=range(WARM_UP))
        seconds = harness.seconds(lambda: self.extractor.of_source(self.source, preprocess=self.preprocess))
        batch = np.zeros((self.extractor.batch, 299, 299, 3), np.float32)
        alone = len(batch) / harness.seconds(lambda: self.extractor(batch))
        return {"pictures_a_second": PICTURES / seconds, "network_alone": alone}


def write_inputs(folder: pathlib.Path) -> None:
    np.save(folder / "one.npy", relu_features(1, COUNT, FEATURES))
    np.save(folder / "other.npy", relu_features(2, COUNT, FEATURES, shift=0.1))
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
        own, peer = Ours(folder), PeerProcess(args.peer_python, "peer_pytorch_fid", folder)
        for _ in range(args.rounds):
            answers["our distance"].append(own.distance())
            answers["distance"].append(peer.ask("distance"))
            answers["our features"].append(own.features())
            answers["features"].append(peer.ask("features"))
        peer.close()
        apart = float(np.abs(np.load(folder / "theirs.npy") - own.found.features_XF).max())

    def values(work: str, *keys: str) -> list[float]:
        return [sum(answer[key] for key in keys) for answer in answers[work]]

    rows = []
    for what, work, keys, bar in (
        (f"statistics of two sets of {COUNT:,} x {FEATURES:,}, s", "distance", ("statistics",), None),
        ("distance of the two, s", "distance", ("distance",), None),
        ("both, s", "distance", ("statistics", "distance"), DISTANCE_BAR),
        (f"pictures a second from {SIDE}-pixel PNG files", "features", ("pictures_a_second",), FEATURES_BAR),
    ):
        ours, theirs = values(f"our {work}", *keys), values(work, *keys)
        ratios = harness.ratios(ours, theirs) if work == "features" else harness.ratios(theirs, ours)
        middles = [f"{statistics.median(side):.2f}" for side in (ours, theirs)]
        rows.append((what, *middles, harness.spread(ratios), harness.met(statistics.median(ratios), bar)))
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


if __name__ == "__main__":
    main()
