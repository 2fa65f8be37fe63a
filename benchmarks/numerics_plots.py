"""Pictures of what `numerics.py` trained: gradient scales over training, rounding of real moments, loss curves.

    python benchmarks/numerics_plots.py --out runs/numerics       # the folder of numerics.py, of which seed 0 is shown

Writes docs/numerics_losses.png, numerics_moments.png and numerics_scales.png, and prints the figures of the last two.
Variants that have not been trained are left out.
"""

import argparse
import pathlib

import jax
import jax.numpy as jnp
import ml_collections
import numerics
import numpy as np
import optax
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dalle_jax import checkpoint, sharding
from dalle_jax.checkpointer import Checkpoints
from dalle_jax.data.pipeline import Batches
from dalle_jax.data.sources import open_source
from dalle_jax.tokenizer import Tokenizer
from dalle_jax.train import formats, metrics, moments, scaling, step
from dalle_jax.train import optimizer as optimizers
from dalle_jax.train.run import data_config
from dalle_jax.train.task import Task
from dalle_jax.train.tasks import build_task

DOCS = pathlib.Path(__file__).parent.parent / "docs"
FLOAT16_NORMAL, FLOAT16_SMALLEST = -14, -24  # exponents
BRANCHES = ("attention", "MLP")
FAR = 40.0  # log2 of a scale that overflows everywhere


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True, help="the folder of numerics.py")
    parser.add_argument("--docs", type=pathlib.Path, default=DOCS)
    args = parser.parse_args()
    for name, draw in (("losses", losses), ("moments", rounding), ("scales", scales)):
        figure = draw(args.out)
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


def trained(workdir: pathlib.Path) -> tuple[ml_collections.ConfigDict, Task]:
    """Config and task of a run, with the dVAE of its workdir."""
    config = ml_collections.ConfigDict(checkpoint.read_config(workdir))
    config.dvae = str(workdir / "dvae")
    return config, build_task(config)


# Moments.


def float32_moments(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    """'mu' and 'nu' of all hidden matrices at the end of a run that kept them in float32, as flat arrays without 0."""
    (config, task), mesh = trained(workdir), sharding.make_mesh({}, devices=jax.devices()[:1])
    built = optimizers.build(config.optimizer, steps=config.steps, axes=task.model.axes)
    _, state, _ = Checkpoints(workdir, keep=1).restore_latest(step.abstract_state(task, built, mesh=mesh))
    hidden = jax.tree.leaves(optimizers.hidden_mask(task.model.axes))
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
        limits = {form.name: (np.log2(form.smallest_normal), np.log2(form.largest)), "float16": (FLOAT16_NORMAL, 16)}
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
            f"smallest normal number of {form.name} {np.mean(np.abs(found[moment]) < form.smallest_normal):.2%}, of "
            f"float16 {np.mean(exponents < FLOAT16_NORMAL):.2%}, below its smallest of all "
            f"{np.mean(exponents < FLOAT16_SMALLEST):.2%}"
        )
        how = "to the nearest" if key is None else "at random"
        right.set(title=f"what rounding {how} does to them", xlabel="relative error, %", ylabel="density")
        right.legend(fontsize=8)
    return figure


# Scales.


def scales(out: pathlib.Path) -> Figure:
    """The scale of every branch over training, and the largest one that a batch allows at its end."""
    workdir = numerics.folder(out, "fp16-paper", numerics.SEEDS[0])
    figure, ((left, right),) = figure_of(1, 2, 3.8)
    most = largest_scales(workdir)  # [layers, branches]
    print("largest scale without an overflow, log2, by layer:", *(f"{a:.1f} {b:.1f};" for a, b in most))
    for index, (layer, branch) in enumerate(np.ndindex(most.shape)):
        found = curve(workdir, f"train/log2_scale/{index:03d}")
        style = {"color": f"C{layer}", "linestyle": "-" if branch == 0 else "--"}
        left.plot(list(found), list(found.values()), label=f"layer {layer} {BRANCHES[branch]}", **style)
    for branch, name in enumerate(BRANCHES):
        right.plot(range(len(most)), most[:, branch], marker="o", label=name)
    rule = scaling.of(trained(workdir)[1].model, replicas=1)
    for axes in (left, right):
        for value, name in ((rule.most, "largest allowed"), (rule.start, "at the start")):
            axes.axhline(np.log2(value), color="grey", linewidth=0.7, linestyle=":")
            axes.annotate(name, (0.02, np.log2(value)), xycoords=("axes fraction", "data"), fontsize=8, va="bottom")
        axes.set(ylabel="log2 of the scale", ylim=(12, 30))
        axes.legend(fontsize=8, loc="upper right", ncols=2)
    left.set(title="scale of each residual branch", xlabel="update")
    right.set(title="largest scale without an overflow, trained model", xlabel="layer", xticks=range(len(most)))
    return figure


def largest_scales(workdir: pathlib.Path) -> np.ndarray:
    """log2 [layers, 2], to a half: every branch goes down by itself until all gradients of a batch are finite."""
    config, task = trained(workdir)
    rule = scaling.of(task.model, replicas=1)
    _, params = checkpoint.load_model_dir(workdir)
    source = open_source(config.data.train)
    common = {"layout": task.model.config.layout, "tokenizer": Tokenizer.load(workdir), "seed": 0}
    batches = Batches(source, data_config(config), batch_size=config.batch_size, shuffle=True, epochs=None, **common)
    batch = next(batches)
    batches.close()

    @jax.jit
    def finite(scale):
        loss = lambda params: task.loss(params, task.frozen, batch, key=None, step=None, scales=scale)[0]  # noqa: E731
        return rule.finite(jax.grad(loss)(params))

    powers = np.full(rule.shape, FAR)
    while not (ok := np.asarray(finite(2.0**powers))).all():
        powers = np.where(ok, powers, powers - 0.5)
    return powers


if __name__ == "__main__":
    main()
