"""Pictures of what `numerics.py` trained: gradient scales over training, rounding of real moments, loss curves.

    PYTHONPATH=. python docs/make/numerics_plots.py --out runs/numerics    # of numerics.py; seed 0 is shown

Writes docs/numerics_losses.png, numerics_moments.png and numerics_scales.png, and prints the figures of the last two.
Variants that have not been trained are left out.
"""

import argparse
import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numerics
import numpy as np
import optax
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dalle_jax import model_dir
from dalle_jax.checkpoint.manager import Checkpoints
from dalle_jax.data.pipeline import Batches, Prepare
from dalle_jax.data.sources import open_source
from dalle_jax.mesh import make_mesh
from dalle_jax.text import load_tokenizer
from dalle_jax.train.monitor import metrics
from dalle_jax.train.objectives import build_task
from dalle_jax.train.objectives.task import Task
from dalle_jax.train.optimizer import formats, loss_scale, matrices, moments
from dalle_jax.train.run import load_frozen, step_for
from dalle_jax.train.settings import TrainSettings

DOCS = pathlib.Path(__file__).parent.parent
FLOAT16_NORMAL, FLOAT16_SMALLEST = -14, -24  # exponents
BRANCHES = ("attention", "MLP")
FAR = 40.0  # log2 of a scale that overflows everywhere
FREE_UPDATES = 400


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="the folder of numerics.py")
    parser.add_argument("--docs", type=pathlib.Path, default=DOCS)
    pictures = {"losses": losses, "moments": rounding, "scales": scales}
    parser.add_argument("--pictures", nargs="+", choices=pictures, default=list(pictures))
    args = parser.parse_args()
    for name in args.pictures:
        figure = pictures[name](args.out)
        figure.savefig(args.docs / f"numerics_{name}.png", dpi=90)


def figure_of(rows: int, columns: int, height: float):
    figure = Figure(figsize=(11, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def curve(workdir: pathlib.Path, name: str = "train/loss") -> dict[int, float]:
    """Update -> value, where the run logged it."""
    return {line["step"]: line[name] for line in metrics.read(workdir / "metrics.jsonl") if name in line}


# Loss curves.


def losses(out: pathlib.Path) -> Figure:
    """Training loss of every variant, and seed by seed its difference from float32's at the same update."""
    figure, ((left, right),) = figure_of(1, 2, 3.8)
    finished = [
        (v, s) for v in numerics.VARIANTS for s in numerics.SEEDS if numerics.losses(numerics.folder(out, v, s))
    ]
    colours = {variant: f"C{index}" for index, variant in enumerate(numerics.VARIANTS)}
    labelled = set()
    for variant, seed in finished:
        found, base = (curve(numerics.folder(out, v, seed)) for v in (variant, numerics.REFERENCE))
        style = {"color": colours[variant], "linewidth": 1, "label": None if variant in labelled else variant}
        labelled.add(variant)
        if seed == numerics.SEEDS[0]:
            left.plot(list(found), list(found.values()), **style)
        if variant != numerics.REFERENCE:
            steps = [n for n in found if n in base]
            right.plot(steps, [found[n] - base[n] for n in steps], **style)
    left.set(title=f"training loss, seed {numerics.SEEDS[0]}", xlabel="update", ylabel="nats", yscale="log")
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter("{x:g}")
    right.set(title="minus float32's of the same seed, each run", xlabel="update", ylabel="nats", ylim=(-0.02, 0.05))
    right.axhline(0, color="black", linewidth=0.5)
    left.legend(fontsize=8)
    right.legend(fontsize=8)
    return figure


def trained(workdir: pathlib.Path) -> tuple[TrainSettings, Task]:
    """Settings and task of a run, with the frozen models of its workdir."""
    settings = TrainSettings.of(model_dir.read_config(workdir))
    return settings, build_task(settings, load_frozen(settings, workdir))


# Moments.


def float32_moments(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """'mu' and 'nu' of all hidden matrices at the end of a run that kept them in float32, as flat arrays without 0."""
    (settings, task), mesh = trained(workdir), make_mesh({}, devices=jax.devices()[:1])
    _, state, _ = Checkpoints(workdir, keep=1).restore_latest(step_for(settings, task, mesh).saved)
    hidden = jax.tree.leaves(matrices.hidden_mask(task.model.axes))
    found = {}
    for moment in ("mu", "nu"):
        leaves = jax.tree.leaves(optax.tree.get(state["opt_state"], moment))
        flat = np.concatenate([np.ravel(x) for x, kept in zip(leaves, hidden, strict=True) if kept])
        found[moment] = flat[flat != 0]
    return found


def rounding(out: pathlib.Path) -> Figure:
    """Where real moments lie in the range of the formats, and what rounding does to them."""
    found = float32_moments(numerics.folder(out, numerics.REFERENCE, numerics.SEEDS[0]))
    figure, axes = figure_of(2, 2, 6)
    kinds = {"mu": ("first", formats.FIRST, None), "nu": ("second", formats.SECOND, jax.random.key(0))}
    for (moment, (which, form, key)), (left, right) in zip(kinds.items(), axes, strict=True):
        x = jnp.asarray(found[moment])
        narrow = x.astype(jnp.bfloat16) if key is None else moments.round_at_random(x, key)
        by_format = {form.name: formats.decode(formats.encode(x, form, key), form), "bfloat16": narrow}
        exponents = np.log2(np.abs(found[moment]))
        left.hist(exponents, bins=np.arange(-72, 6), color="C0")
        limits = {form.name: (1 - formats.BIAS, 4), "float16": (FLOAT16_NORMAL, 16)}
        for (name, (low, high)), colour in zip(limits.items(), ("C2", "C3"), strict=True):
            for edge in (low, high):
                left.axvline(edge, color=colour, label=f"range of {name}" if edge == low else None)
        left.set(title=f"{which} moments of the hidden matrices", xlabel="log2 of the size", xlim=(-72, 18))
        left.legend(fontsize=8, loc="upper left")
        bins = np.linspace(-0.8, 0.8, 161)
        for name, rounded in reversed(by_format.items()):
            error = 100 * (np.asarray(rounded, np.float64) / found[moment] - 1)
            right.hist(np.clip(error, -0.8, 0.8), bins=bins, label=name, density=True, histtype="stepfilled", alpha=0.7)
            lost = np.mean(np.asarray(rounded) == 0)
            print(
                f"{which} moment, {name}: relative error root mean square {np.sqrt(np.mean(error**2)):.4f} %, mean "
                f"{np.mean(error):+.5f} %, largest {np.abs(error).max():.3f} %, {lost:.2%} became 0"
            )
        print(
            f"{which} moment: {len(x):,} numbers from 2^{exponents.min():.0f} to 2^{exponents.max():.0f}, below the "
            f"smallest normal number of {form.name} {np.mean(exponents < 1 - formats.BIAS):.2%}, of "
            f"float16 {np.mean(exponents < FLOAT16_NORMAL):.2%}, below its smallest of all "
            f"{np.mean(exponents < FLOAT16_SMALLEST):.2%}"
        )
        how = "to the nearest" if key is None else "at random"
        right.set(title=f"what rounding {how} does to them", xlabel="relative error, %", ylabel="density")
        right.legend(fontsize=8)
    return figure


# Scales.


def scales(out: pathlib.Path) -> Figure:
    """Left: the scale of every branch over training, below the largest one that the trained model allows it. Right: the
    same model's gradients, but scales that start in the middle of those largest ones and have no bounds; parameters
    do not move there."""
    workdir = numerics.folder(out, "fp16-paper", numerics.SEEDS[0])
    settings, task = trained(workdir)
    rule = loss_scale.for_model(task.model, replicas=1)
    params = model_dir.load(workdir).params

    @jax.jit
    def finite(scale, batch):
        loss = lambda params: task.loss(params, task.frozen, batch, key=None, step=None, scales=scale)[0]  # noqa: E731
        return rule.finite(jax.grad(loss)(params))

    source = open_source(settings.run.data.train)
    prepare = Prepare(settings.data, task.model.config.layout, load_tokenizer(workdir))
    batches = Batches(source, prepare, batch_size=settings.batch_size, seed=0, shuffle=True, epochs=None)
    most = largest_scales(rule, functools.partial(finite, batch=next(batches)))  # [layers, branches]
    print("largest scale without an overflow, log2, by layer:", *(f"{a:.1f} {b:.1f};" for a, b in most))
    start = np.median(most)
    free = dataclasses.replace(rule, start=2.0**start, min_scale=0.0, max_scale=np.inf)
    state, seen = free.init(), []
    for _ in range(FREE_UPDATES):
        seen.append(np.log2(state["scale"]))
        state = free.updated(state, finite(state["scale"], next(batches)))
    batches.close()
    falls = (np.diff(seen, axis=0) < 0).sum(0)
    print(f"free scales from 2^{start:.1f}, {FREE_UPDATES} updates: falls by layer", falls.tolist())

    figure, ((left, right),) = figure_of(1, 2, 4.2)
    for index, (layer, branch) in enumerate(np.ndindex(most.shape)):
        found = curve(workdir, f"train/log2_scale/{index:03d}")
        style = {"color": f"C{layer}", "linestyle": "-" if branch == 0 else "--"}
        name = f"layer {layer} {BRANCHES[branch]}"
        # One above the other they would hide each other: the first is the widest.
        left.plot(list(found), list(found.values()), **style, linewidth=1.5 * (most.size - index))
        left.axhline(most[layer, branch], **style, linewidth=1)
        right.plot(np.array(seen)[:, layer, branch], **style, label=name)
    notes = {
        "at the start": (0.3, np.log2(rule.start)),
        "all scales": (0.5, np.log2(rule.start) + 2.2),
        "largest allowed (dotted)": (0.3, np.log2(rule.max_scale) - 0.6),
        "largest without an overflow, trained model": (0.3, most.max() + 0.3),
    }
    for note, place in notes.items():
        left.annotate(note, place, xycoords=("axes fraction", "data"), fontsize=8)
    for value in (rule.max_scale, rule.start):
        left.axhline(np.log2(value), color="black", linewidth=1.5, linestyle=":")
    left.set_ylim(12, 27)
    left.set(title="scale of each residual branch in training", xlabel="update", ylabel="log2 of the scale")
    right.set(title=f"the rule alone, from 2^{start:.1f}, without bounds", xlabel="update", ylabel="log2 of the scale")
    right.legend(fontsize=8, ncols=2)
    return figure


def largest_scales(rule: loss_scale.NoScale, finite) -> np.ndarray:
    """log2 [layers, 2], to a half: every branch goes down by itself until all gradients of a batch are finite."""
    powers = np.full(rule.shape, FAR)
    while not (ok := np.asarray(finite(2.0**powers))).all():
        powers = np.where(ok, powers, powers - 0.5)
    return powers


if __name__ == "__main__":
    main()
