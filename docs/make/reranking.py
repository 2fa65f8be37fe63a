"""How often CLIP's choice among k candidates shows its caption, over k, on a demo's two-object captions.

    PYTHONPATH=. python docs/make/reranking.py DIR --captions 100      # DIR: of `dalle-jax demo --best-of 32`

Draws `--candidates` pictures for each of the report's captions of a combination that training never shows, scores all
of them, and lets the scene checker judge, for k = 1, 2, 4 ..., the best scored of the first k. "any" is the share of
captions that some of the first k shows, which no choice can exceed; "chance" picks one of them blindly. Writes
`docs/reranking.png` and `benchmarks/results/reranking.md`.
"""

import pathlib
import time

import matplotlib.pyplot as plt
import numpy as np
import tqdm

import dalle_jax
from benchmarks import harness
from dalle_jax.data.sources import scenes
from dalle_jax.data.sources.scene_checker import fault

FIGURE = pathlib.Path(__file__).resolve().parent.parent / "reranking.png"
SET = "two_unseen_combination"
FIRST_SEED = 1_000_000


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("model", metavar="DIR")
    parser.add_argument("--captions", type=int, default=100)
    parser.add_argument("--candidates", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=1.0)
    args = parser.parse_args()
    began = time.monotonic()
    pipe = dalle_jax.Pipeline.load(args.model)
    scores_CM, right_CM = [], []
    wanted = scenes.captions(SET, "report", args.captions)
    for index, (caption, scene) in enumerate(tqdm.tqdm(wanted, unit="caption")):
        pictures = pipe(
            caption,
            n=args.candidates,
            best_of=args.candidates,
            temperature=args.temperature,
            seed=FIRST_SEED + index * args.candidates,
        )
        pictures.sort(key=lambda picture: picture.seed)  # in the order that they were drawn
        scores_CM.append([picture.score for picture in pictures])
        right_CM.append([not fault(np.asarray(picture), scene) for picture in pictures])
    curve = accuracies(np.asarray(scores_CM), np.asarray(right_CM))
    lines = [
        harness.machine(f"{time.monotonic() - began:.0f} s"),
        "Two objects, combinations never in training.",
        *harness.command(args),
        *harness.table(
            "k | chosen by CLIP | a blind choice | any of them",
            [(point["k"], *(f"{point[name]:.1%}" for name in ("clip", "chance", "any"))) for point in curve],
        ),
    ]
    harness.write(args.results / "reranking.md", "CLIP's choice among k candidates", lines)
    draw(curve)


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


def draw(curve: list[dict]) -> None:
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, label in (("any", "any of k is right"), ("clip", "CLIP's choice"), ("chance", "a blind choice")):
        axes.plot([p["k"] for p in curve], [100 * p[name] for p in curve], marker="o", label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks([p["k"] for p in curve], [str(p["k"]) for p in curve])
    axes.set(xlabel="candidates k", ylabel="captions shown, %", ylim=(0, 100))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(FIGURE, dpi=100)


if __name__ == "__main__":
    main()
