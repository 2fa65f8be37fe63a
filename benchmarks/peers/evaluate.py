"""Statistics, distance and features beside pytorch-fid, in turns, on the same features, pictures and cores.

    python -m benchmarks.peers.evaluate --peer-python PEER/bin/python

`peer_pytorch_fid.py` says how to make that environment. Each round measures both sides, one after the other; a ratio
is the middle one of the rounds. The distance is of two sets of 30,000 x 2,048 features. Features are pool3 of PNG files
of 256 pixels, decoding and resize included, by a network of random weights, each side in its own batches and with its
own way of reading files. Both keep freed memory (`dalle_jax/cli/host_memory.py`, as every `dalle-jax` command does; the
peer by the same settings in its environment). Writes the table and the raw numbers to `benchmarks/results/`.
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
from PIL import Image

from benchmarks.peers.peers import machine
from dalle_jax.cli import host_memory  # does not import JAX

HERE = pathlib.Path(__file__).parent
COUNT, FEATURES = 30_000, 2_048
PICTURES, SIDE = 96, 256
WARM_UP = 8  # pictures, on both sides
DISTANCE_BAR, FEATURES_BAR = 3.0, 0.8


class Ours:
    """Our side; what it compiles and opens is kept between the rounds."""

    def __init__(self, folder: pathlib.Path):
        from dalle_jax.convert.inception import convert
        from dalle_jax.data.sources import open_source
        from dalle_jax.evaluate.features import Extractor, Preparation
        from dalle_jax.models import inception
        from tests.support.inception_weights import state_dict

        state = state_dict("fid")
        np.savez(folder / "weights.npz", **state)
        config, params = convert(state)
        self.folder, self.prepare = folder, Preparation()
        self.extractor = Extractor(inception.model(config), params)
        self.source = open_source(f"folder:{folder / 'pictures'}", captions_required=False)
        self.found = self.extractor.of_source(self.source, prepare=self.prepare)  # compiles

    def distance(self) -> dict:
        from dalle_jax.evaluate import distances, moments

        sets = [np.load(self.folder / f"{name}.npy") for name in ("one", "other")]
        start = time.perf_counter()
        one, other = (moments.of(features) for features in sets)
        between = time.perf_counter()
        fid = distances.fid(*one, *other)
        return {"statistics": between - start, "distance": time.perf_counter() - between, "fid": fid}

    def features(self) -> dict:
        self.extractor.of_source(self.source, prepare=self.prepare, rows=range(WARM_UP))
        start = time.perf_counter()
        self.extractor.of_source(self.source, prepare=self.prepare)
        seconds = time.perf_counter() - start
        batch = np.zeros((self.extractor.batch, 299, 299, 3), np.float32)
        start = time.perf_counter()
        self.extractor(batch)
        alone = len(batch) / (time.perf_counter() - start)
        return {"pictures_a_second": PICTURES / seconds, "network_alone": alone}


def write_inputs(folder: pathlib.Path) -> None:
    from tests.evaluate.test_distances import relu_features

    np.save(folder / "one.npy", relu_features(1, COUNT, FEATURES))
    np.save(folder / "other.npy", relu_features(2, COUNT, FEATURES, shift=0.1))
    (folder / "pictures").mkdir()
    for number in range(PICTURES):
        small = np.random.default_rng(number).integers(0, 256, (16, 16, 3), np.uint8)
        image = Image.fromarray(small).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        image.save(folder / "pictures" / f"{number:03d}.png")


def peer(python: str, folder: pathlib.Path, work: str) -> dict:
    command = [python, "-m", "benchmarks.peers.peer_pytorch_fid", str(folder), work]
    environment = os.environ | {name: str(value) for name, (_, value) in host_memory.SETTINGS.items()}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE.parent.parent)
    if run.returncode:
        raise RuntimeError(f"expected seconds of {' '.join(command)}, got {run.stderr[-2000:]}")
    return json.loads(run.stdout.splitlines()[-1])


def total(measured: dict) -> float:
    return measured["statistics"] + measured["distance"]


def middle(values) -> float:
    return statistics.median(values)


def ratio(values: list[float]) -> str:
    return f"{middle(values):.2f}x ({min(values):.2f} to {max(values):.2f})"


def bar(values: list[float], least: float) -> str:
    return f"at least {least:g}x: {'met' if middle(values) >= least else 'not met'}"


def table(result: dict) -> str:
    """The result as Markdown."""
    rounds = result["rounds"]
    ours, theirs = ([row["distance"][side] for row in rounds] for side in ("ours", "theirs"))
    both = [total(there) / total(here) for here, there in zip(ours, theirs, strict=True)]
    rates = {
        name: [row["features"][name]["pictures_a_second"] for row in rounds] for name in ("ours", "theirs", "batches")
    }
    against = {
        name: [here / there for here, there in zip(rates["ours"], rates[name], strict=True)]
        for name in ("theirs", "batches")
    }
    alone = middle([row["features"]["ours"]["network_alone"] for row in rounds])
    lines = [
        "# Evaluation next to pytorch-fid 0.3.0",
        "",
        f"{result['date']}; {', '.join(f'{key} {value}' for key, value in result['machine'].items())}.",
        "",
        f"    {result['command']}",
        "",
        f"Middle of {len(rounds)} rounds; both sides on the same features, files and cores, random weights.",
        "",
        "| what | ours | pytorch-fid | ratio (lowest and highest round) | bar |",
        "|---|---|---|---|---|",
    ]
    for name in ("statistics", "distance"):
        values = [there[name] / here[name] for here, there in zip(ours, theirs, strict=True)]
        seconds = [f"{middle([row[name] for row in side]):.2f} s" for side in (ours, theirs)]
        what = f"statistics of two sets of {COUNT:,} x {FEATURES:,}" if name == "statistics" else "distance of the two"
        lines.append(f"| {what} | {seconds[0]} | {seconds[1]} | {ratio(values)} | |")
    seconds = [f"{middle([total(row) for row in side]):.2f} s" for side in (ours, theirs)]
    lines.append(f"| both | {seconds[0]} | {seconds[1]} | {ratio(both)} | {bar(both, DISTANCE_BAR)} |")
    for name, what in (("theirs", "as it is"), ("batches", "in channels-last batches of 16, which it does not do")):
        met = bar(against[name], FEATURES_BAR) if name == "theirs" else ""
        lines.append(
            f"| pictures a second from {SIDE}-pixel PNG files to features, pytorch-fid {what} | "
            f"{middle(rates['ours']):.1f} | {middle(rates[name]):.1f} | {ratio(against[name])} | {met} |"
        )
    lines += [
        "",
        f"FID {ours[0]['fid']:.9f} and {theirs[0]['fid']:.9f}; the features of the pictures differ by at most "
        f"{result['largest_difference']:.1e}. The network alone takes {alone:.1f} pictures a second on our side.",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer-python", required=True, help="the interpreter of the peer's environment")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=pathlib.Path, default=HERE.parent / "results")
    args = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    host_memory.keep_freed()
    about = machine()
    if about["load_before"] > 0.5:
        print(f"warning: the machine is busy (load {about['load_before']}), which hurts both sides", file=sys.stderr)
    rounds = []
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_inputs(folder)
        ours = Ours(folder)
        for _ in range(args.rounds):
            row = {
                "distance": {"ours": ours.distance(), "theirs": peer(args.peer_python, folder, "distance")},
                "features": {"ours": ours.features()},
            }
            for side, work in (("batches", "batches"), ("theirs", "features")):
                row["features"][side] = peer(args.peer_python, folder, work)
            rounds.append(row)
        apart = float(np.abs(np.load(folder / "theirs.npy") - ours.found.features_NF).max())
    about |= {"cores": os.cpu_count(), "torch": rounds[0]["distance"]["theirs"]["torch"], "numpy": np.__version__}
    del about["threads"]
    result = {
        "date": datetime.date.today().isoformat(),
        "command": f"python -m benchmarks.peers.evaluate --peer-python PEER/bin/python --rounds {args.rounds}",
        "machine": {**about, "system": platform.system()},
        "largest_difference": apart,
        "rounds": rounds,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "evaluate.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.out / "evaluate.md").write_text(table(result))
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
