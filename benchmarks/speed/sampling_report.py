"""What `sampling.py` measured, as markdown. A part that was not run says so."""

import statistics

from benchmarks.peers.peer_dalle_pytorch import SHAPE

POSITIONS = SHAPE["grid"] ** 2  # steps of a picture, on a processor
AIMS = {("12B", 512): 16, ("1.3B", 512): 150}  # images a second, of one H200; 512 of the 12B in 32 s
ONE_SHARE = 0.6  # of the bound, which for a single image is the reading of the weights


def table(parts: dict) -> str:
    """parts: the content of sampling.json, any of 'processor', 'accelerator', 'compiled'."""
    lines = ["# Sampling speed", ""]
    lines += ["## On a processor", ""] + (_processor(parts["processor"]) if "processor" in parts else ["Not run.", ""])
    lines += ["## On an accelerator", ""]
    if "accelerator" in parts:
        lines += _accelerator(parts["accelerator"])
    else:
        lines += [
            "Not run: no GPU or TPU was at hand, so nothing here is a speed of one. `python -m "
            "benchmarks.speed.sampling` there runs all of it in one call. The sizes below are what its compiler says.",
            "",
        ]
    if "compiled" in parts:
        lines += _compiled(parts["compiled"])
    return "\n".join(lines).rstrip() + "\n"


def _about(part: dict) -> list[str]:
    about = ", ".join(f"{key} {value}" for key, value in part["machine"].items())
    return [f"{part['date']}; {about}.", "", f"    {part['command']}", ""]


def _ratio(ratio: dict) -> str:
    return f"{ratio['ratio']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f})"


def _processor(part: dict) -> list[str]:
    against = part["against_plain"]
    lines = _about(part) + [
        "64 images of one caption at the shape of `compare.py`. `plain` keeps a text of its own for every image and "
        "all image positions, which every layer reads. Bytes are of the weights, of one candidate's cache, and of what "
        "a step of all 64 reads. The error is of the logits of one image against `ours`, norm by norm, with random "
        "weights of a trained model's scale. A processor computes 16- and 8-bit numbers through float32, so that what "
        "they save in memory is not time saved here.",
        "",
        f"`ours` against `plain`: {_ratio(against)}; bar {against['least']:g}x: "
        f"{'met' if against['met'] else 'not met'}. {_what_bounds(part['works'], against['least'])} `rest` is a step "
        f"without attention and its cache (its pictures are nonsense): `plain` over `rest`, {_ratio(against['most'])}, "
        "is what `ours` would reach if attention cost "
        "nothing at all, the most that sharing and windows can give here.",
        "",
        "| engine | images/s | speed, `ours` = 1 (lowest, highest) | weights MB | cache MB | step MB | step MFLOP | "
        "logit error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, work in part["works"].items():
        error = f"{work['logit_error']:.1%}" if "logit_error" in work else ""
        sizes = (work["weight_bytes"], work["cache_bytes_per_candidate"], work["step_bytes"])
        lines.append(
            f"| {name} | {work['images_per_second']:.2f} | {_ratio(work['speed_of_ours'])} | "
            f"{' | '.join(f'{size / 1e6:.2f}' for size in sizes)} | {work['step_operations'] / 1e6:.0f} | {error} |"
        )
    return [*lines, ""]


def _what_bounds(works: dict, least: float) -> str:
    """Both engines do the same but for attention, so that their difference is all that sharing and windows can save."""
    ours, plain = works["ours"], works["plain"]
    milliseconds = [1e3 * statistics.median(work["seconds"]) / POSITIONS for work in (ours, plain)]
    saved = milliseconds[1] - milliseconds[0]
    needed = saved / (least - 1)
    return (
        "The two differ in attention alone. In bytes read `plain` is "
        f"{plain['step_bytes'] / ours['step_bytes']:.2f} of `ours`, in operations "
        f"{plain['step_operations'] / ours['step_operations']:.2f}: most of these are products with weights, which "
        f"every image needs. A step takes {milliseconds[0]:.1f} against {milliseconds[1]:.1f} ms, so sharing and "
        f"windows save {saved:.1f} ms of it. For {least:g}x with that, all of a step of `ours` would have to take "
        f"{needed:.1f} ms, {ours['step_operations'] / needed / 1e6:.0f} GFLOP/s on two threads with everything that is "
        f"no product; it runs at {ours['step_operations'] / milliseconds[0] / 1e6:.0f}."
    )


def _accelerator(part: dict) -> list[str]:
    lines = _about(part) + [
        f"{part['device']}, figures of {part['chip']}; random weights. The bound is the roofline of "
        "`sampling_bounds.py`; the peak is of the process so far. Aims are for one H200 in bfloat16.",
        "",
        "| model | candidates | batches x images | images/s | seconds | bound images/s | share | peak GB | aim |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in part["rows"]:
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.1f}"
        lines.append(
            f"| {row['model']} | {row['candidates']} | {row['waves']} x {row['wave']} | "
            f"{row['images_per_second']:.2f} | {row['candidates'] / row['images_per_second']:.1f} | "
            f"{row['bound_images_per_second']:.2f} | {row['share']:.0%} | {peak} | {_aim(row)} |"
        )
    return [*lines, ""]


def _aim(row: dict) -> str:
    if row["candidates"] == 1:
        least, got, told = ONE_SHARE, row["share"], f"{ONE_SHARE:.0%} of the bound"
    else:
        least, got = AIMS.get((row["model"], row["candidates"])), row["images_per_second"]
        told = f"{least} images/s"
    return "" if least is None else f"{told}: {'met' if got >= least else 'not met'}"


def _compiled(part: dict) -> list[str]:
    lines = [f"## Compiled for {part['topology']}, not run", "", *_about(part)]
    lines += [
        f"Bytes that the compiler asks for, of {part['usable_bytes'] / 1e9:.1f} GB that a program may take; the batch "
        "is what `sample/batches.py` chooses for the memory that the weights leave. `counted` is what the engine "
        "counts before it compiles. The bound is the roofline of `sampling_bounds.py`: a prediction that nothing can "
        "exceed, not a measurement.",
        "",
        "| model | candidates | batches x images | weights GB | arguments GB | temporaries GB | in all GB | counted GB "
        "| fits | bound images/s | bound seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in part["rows"]:
        advance = row["programs"]["advance"]
        sizes = (row["weight_bytes"], advance["arguments"], advance["temporaries"], row["total_bytes"])
        lines.append(
            f"| {row['model']} | {row['candidates']} | {row['waves']} x {row['wave']} | "
            f"{' | '.join(f'{size / 1e9:.2f}' for size in (*sizes, row['counted_bytes']))} | "
            f"{'yes' if row['fits'] else 'no'} | {row['bound_images_per_second']:.2f} | "
            f"{row['candidates'] / row['bound_images_per_second']:.1f} |"
        )
    return [*lines, ""]
