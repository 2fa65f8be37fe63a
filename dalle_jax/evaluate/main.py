"""`dalle-jax evaluate`: how far pictures are from a reference set, and a report from which others can repeat it."""

import argparse
import importlib.metadata
import json
import pathlib
import platform
import sys
import time

import numpy as np

import dalle_jax
from dalle_jax import checkpoint
from dalle_jax.data.sources import HELP, open_source
from dalle_jax.errors import UserError
from dalle_jax.evaluate import distances, moments, preprocess, self_check, statistics
from dalle_jax.evaluate.features import Extractor, Found, Preparation
from dalle_jax.evaluate.statistics import Statistics

REPORT = "report.json"
LIBRARIES = ("jax", "jaxlib", "flax", "numpy", "scipy", "pillow")
EXIT_FAILED = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pictures", metavar="SOURCE", help=f"a folder of pictures, or {HELP}")
    parser.add_argument("--reference", metavar="SOURCE", help="the same, or a .npz of statistics, pytorch-fid's too")
    parser.add_argument(
        "--weights", metavar="PATH", help="Inception v3: what `dalle-jax convert inception` wrote, or a published file"
    )
    parser.add_argument("--resize", choices=tuple(preprocess.RESIZES), default="pytorch", help="default: %(default)s")
    parser.add_argument(
        "--crop", choices=tuple(preprocess.CROPS), default="none", help="of the pictures (default none)"
    )
    parser.add_argument("--reference-crop", choices=tuple(preprocess.CROPS), help="default: as --crop")
    parser.add_argument("--blur", type=float, default=0.0, metavar="R", help="Gaussian blur of both sets, in pixels")
    parser.add_argument("--count", type=int, metavar="N", help="N pictures of each source, drawn by the seed")
    parser.add_argument("--splits", type=int, default=distances.IS_SPLITS, help="of the Inception score (default 10)")
    parser.add_argument("--seed", type=int, default=0, help="of draws, splits and subsets (default 0)")
    parser.add_argument("--save-statistics", metavar="FILE.npz", help="write the reference's statistics for later")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("evaluation"), metavar="DIR")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    parser.add_argument("--self-check", action="store_true", help="check the distances themselves on built-in pictures")


def main(args: argparse.Namespace) -> int:
    """Writes OUT/report.json and says the scores, 0; of a self-check 1 if something fails.

    Raises:
      UserError: a source, weights or statistics that do not do, or too few pictures.
    """
    if args.self_check:
        return _self_check(args)
    for name in ("pictures", "reference", "weights"):
        if getattr(args, name) is None:
            raise UserError(f"expected --pictures, --reference and --weights, or --self-check, got no --{name}: add it")
    if not 0 <= args.blur < float("inf"):
        raise UserError(f"expected a blur radius of 0 or more, got {args.blur}")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"expected a folder to write to, got {args.out} ({error.strerror}): choose another") from error
    start = time.monotonic()
    extractor = Extractor.load(args.weights)
    about = {
        "network": extractor.network,
        "weights": extractor.digest,
        "resize": args.resize,
        "blur": f"{args.blur:g}",
    }
    given = args.reference.endswith(".npz")
    stored = statistics.load(args.reference) if given else None  # before the long part
    found = _look(extractor, args, args.pictures, crop=args.crop, name="pictures")
    ours = _statistics(found, about)
    scores, notes = {}, []
    reference = None
    if given:
        theirs = stored
        notes += statistics.check_comparable(ours, theirs, where=args.reference)
    else:
        reference = _look(extractor, args, args.reference, crop=args.reference_crop or args.crop, name="reference")
        theirs = _statistics(reference, about)
    if args.save_statistics:
        statistics.save(args.save_statistics, theirs)
    scores["fid"] = distances.fid(ours.mean_F, ours.covariance_FF, theirs.mean_F, theirs.covariance_FF)
    for name, count in (("pictures", ours.count), ("reference", theirs.count)):
        if 0 < count < len(ours.mean_F):
            notes.append(f"{count} {name} are fewer than {len(ours.mean_F)} features: FID of so few is much too high")
    order = np.random.default_rng(args.seed).permutation(len(found.logits_NV))
    if len(order) >= args.splits:
        mean, deviation = distances.inception_score(found.logits_NV[order], splits=args.splits)
        scores |= {"inception_score": mean, "inception_score_deviation": deviation}
    else:
        notes.append(f"no Inception score: {len(order)} pictures for {args.splits} splits")
    if reference is not None:
        scores |= _of_vectors(found, reference, seed=args.seed, notes=notes)
    report = {
        "scores": scores,
        "notes": notes,
        "pictures": _described(args.pictures, found, args.crop),
        "reference": {"source": args.reference, "count": theirs.count, **theirs.about}
        if reference is None
        else _described(args.reference, reference, args.reference_crop or args.crop),
        **about,
        "count": args.count,
        "splits": args.splits,
        "seed": args.seed,
        "versions": versions(),
        "seconds": round(time.monotonic() - start, 1),
    }
    checkpoint.write_file(args.out / REPORT, (json.dumps(report, indent=2) + "\n").encode())
    for note in notes:
        print(f"dalle-jax: note: {note}", file=sys.stderr)
    print(json.dumps(report) if args.json else _sentence(report, args.out / REPORT))
    return 0


def versions() -> dict[str, str]:
    """What computed: this package, its libraries, Python and the device."""
    import jax

    found = {name: importlib.metadata.version(name) for name in LIBRARIES}
    device = jax.local_devices()[0]
    return {"dalle-jax": dalle_jax.__version__, **found, "python": platform.python_version(), "device": str(device)}


def _look(extractor: Extractor, args: argparse.Namespace, spec: str, *, crop: str, name: str) -> Found:
    source = open_source(f"folder:{spec}" if pathlib.Path(spec).is_dir() else spec, captions_required=False)
    rows = np.arange(len(source))
    if args.count is not None:
        if not 2 <= args.count <= len(rows):
            raise UserError(f"expected 2 to {len(rows)} pictures of {source.name}, as it has, got --count {args.count}")
        rows = np.sort(np.random.default_rng(args.seed).choice(len(rows), args.count, replace=False))
    prepare = Preparation(resize=args.resize, crop=crop, blur=args.blur)
    found = extractor.of_source(source, prepare=prepare, rows=rows, tell="" if args.json else name)
    if args.count is not None and len(found.keys) < args.count:
        raise UserError(
            f"expected {args.count} pictures of {source.name}, got {len(found.keys)}, as the rest cannot be read "
            f"({_counted(found.dropped)}): mend or remove those, see `dalle-jax data`"
        )
    return found


def _statistics(found: Found, about: dict[str, str]) -> Statistics:
    return Statistics(*moments.of(found.features_NF), len(found.keys), about)


def _of_vectors(found: Found, reference: Found, *, seed: int, notes: list[str]) -> dict[str, float]:
    """KID, precision and recall, which take the vectors of both sets."""
    scores: dict[str, float] = {}
    smaller = min(len(found.keys), len(reference.keys))
    size = min(distances.KID_SUBSET_SIZE, smaller)
    if size < distances.KID_SUBSET_SIZE:
        notes.append(f"KID of subsets of {size}, as a set has no more, instead of {distances.KID_SUBSET_SIZE}")
    mean, deviation = distances.kid(found.features_NF, reference.features_NF, subset_size=size, seed=seed)
    scores |= {"kid": mean, "kid_deviation": deviation, "kid_subset_size": size}
    if smaller > distances.NEIGHBOURS:
        precision, recall = distances.precision_recall(found.features_NF, reference.features_NF)
        scores |= {"precision": precision, "recall": recall}
    else:
        notes.append(f"no precision and recall: {smaller} pictures for {distances.NEIGHBOURS} neighbours")
    return scores


def _described(spec: str, found: Found, crop: str) -> dict:
    sizes = {f"{width}x{height}": count for (height, width), count in sorted(found.sizes.items())}
    return {"source": spec, "count": len(found.keys), "dropped": found.dropped, "sizes": sizes, "crop": crop}


def _counted(dropped: dict[str, int]) -> str:
    return ", ".join(f"{count} x {reason}" for reason, count in dropped.items())


def _sentence(report: dict, path: pathlib.Path) -> str:
    scores, pictures = report["scores"], report["pictures"]
    lost = f", {sum(pictures['dropped'].values())} unreadable" if pictures["dropped"] else ""
    told = [f"FID {scores['fid']:.4f}"]
    told += [f"IS {scores['inception_score']:.3f}"] if "inception_score" in scores else []
    told += [f"KID {scores['kid']:.5f}"] if "kid" in scores else []
    return f"{', '.join(told)} of {pictures['count']} pictures{lost} ({report['network']}, {report['resize']}): {path}"


def _self_check(args: argparse.Namespace) -> int:
    extractor = Extractor.load(args.weights) if args.weights else self_check.random_network()
    checks = self_check.run(extractor)
    ok = all(check.ok for check in checks)
    if args.json:
        listed = [{"name": check.name, "ok": check.ok, "found": check.found} for check in checks]
        print(json.dumps({"ok": ok, "network": extractor.network, "checks": listed}))
    else:
        for check in checks:
            print(f"{'pass' if check.ok else 'FAIL'}  {check.name}: {check.found}")
        print(f"self-check {'passed' if ok else 'FAILED'} with {extractor.network}")
    return 0 if ok else EXIT_FAILED
