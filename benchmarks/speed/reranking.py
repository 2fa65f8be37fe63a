"""How often CLIP's choice among k candidates shows its caption, over k, on a demo's two-object captions.

    python -m benchmarks.speed.reranking DIR --captions 100     # DIR: transformer of `dalle-jax demo --best-of 32`

Draws `--candidates` pictures for each of the report's captions of a combination that training never shows, scores all
of them, and lets the scene checker judge, for k = 1, 2, 4 ..., the best scored of the first k. "any" is the share of
captions that some of the first k shows, which no choice can exceed; "chance" picks one of them blindly. Writes
`docs/reranking.png` and the figures to `benchmarks/results/reranking.md` and `.json`.
"""

import argparse
import datetime
import json
import pathlib
import platform
import time

import jax
import matplotlib.pyplot as plt
import numpy as np
import tqdm

import dalle_jax
from dalle_jax.data.sources import scenes
from dalle_jax.data.sources.scene_checker import shows

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SET = "two_unseen_combination"
FIRST_SEED = 1_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="DIR")
    parser.add_argument("--captions", type=int, default=100)
    parser.add_argument("--candidates", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=1.0)
    args = parser.parse_args()
    began = time.monotonic()
    pipe = dalle_jax.Pipeline.load(args.model)
    scores_CM, right_CM = [], []
    told = scenes.captions(SET, "report", args.captions)
    for index, (caption, scene) in enumerate(tqdm.tqdm(told, unit="caption")):
        pictures = pipe(
            caption,
            n=args.candidates,
            best_of=args.candidates,
            temperature=args.temperature,
            seed=FIRST_SEED + index * args.candidates,
        )
        pictures.sort(key=lambda picture: picture.seed)  # in the order that they were drawn
        scores_CM.append([picture.score for picture in pictures])
        right_CM.append([bool(shows(np.asarray(picture), scene).ok) for picture in pictures])
    curve = accuracies(np.asarray(scores_CM), np.asarray(right_CM))
    figures = {
        "date": datetime.date.today().isoformat(),
        "command": f"python -m benchmarks.speed.reranking DIR --captions {args.captions} "
        f"--candidates {args.candidates} --temperature {args.temperature}",
        "device": f"{jax.devices()[0].device_kind} ({platform.machine()})",
        "checkpoint": pipe.digest,
        "seconds": round(time.monotonic() - began),
        "curve": curve,
    }
    write(figures)
    print(f"best of {curve[-1]['k']}: {curve[-1]['clip']:.0%}, first {curve[0]['clip']:.0%}: docs/reranking.png")


def accuracies(scores_CM: np.ndarray, right_CM: np.ndarray) -> list[dict]:
    """For k = 1, 2, 4 ... the shares of captions that CLIP's choice shows, that any of k shows, and blind chance."""
    curve, k = [], 1
    while k <= scores_CM.shape[1]:
        best_C = scores_CM[:, :k].argmax(1)
        curve.append(
            {
                "k": k,
                "clip": float(right_CM[np.arange(len(best_C)), best_C].mean()),
                "any": float(right_CM[:, :k].any(1).mean()),
                "chance": float(right_CM[:, :k].mean()),
            }
        )
        k *= 2
    return curve


def write(figures: dict) -> None:
    curve = figures["curve"]
    (RESULTS / "reranking.json").write_text(json.dumps(figures, indent=1) + "\n")
    rows = [f"| {p['k']} | {p['clip']:.1%} | {p['chance']:.1%} | {p['any']:.1%} |" for p in curve]
    lines = [
        "# CLIP's choice among k candidates",
        "",
        f"{figures['date']}; {figures['device']}; {figures['seconds']} s; two objects, combinations never in training.",
        "",
        f"    {figures['command']}",
        "",
        "| k | chosen by CLIP | a blind choice | any of them |",
        "|---|---|---|---|",
        *rows,
    ]
    (RESULTS / "reranking.md").write_text("\n".join(lines) + "\n")
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, label in (("any", "any of k is right"), ("clip", "CLIP's choice"), ("chance", "a blind choice")):
        axes.plot([p["k"] for p in curve], [100 * p[name] for p in curve], marker="o", label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks([p["k"] for p in curve], [str(p["k"]) for p in curve])
    axes.set(xlabel="candidates k", ylabel="captions shown, %", ylim=(0, 100))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(ROOT / "docs" / "reranking.png", dpi=100)


if __name__ == "__main__":
    main()
