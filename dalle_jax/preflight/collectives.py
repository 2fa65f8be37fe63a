"""The collectives of a compiled program: how often each runs, how many bytes it moves, along which mesh axis.

Read from the text of the optimized program, the only place that has all of them as the partitioner put them in, merged
them and moved them out of loops. A collective inside a loop counts as often as the loop runs, if the compiler knows.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "bf16": 16, "token": 0}  # the rest say theirs: f32, s8, u4, f8e4m3fn
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.-]+ = (\(.*?\)|\S+) ([a-z][\w-]*)\((.*)$")
_CALLED = re.compile(r"(?:calls|body|condition|branch_computations|called_computations)=(?:\{([^}]*)\}|(%[\w.-]+))")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\]")
_LISTED = re.compile(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_NAMED = re.compile(
    r"replica_groups=mesh\['?([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}"
)
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{[\d,]*\},?)*)\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind along one axis.

    axis: mesh axes that its groups spread over, joined by '+' ('none' for groups of one). inside: no group leaves a
    slice (TPU) or NVLink domain. count: how often a step runs one. bytes: what one chip receives through them in a
    step, if each is done in a ring: a gather of n bytes along g chips receives n (g - 1) / g, an all-reduce twice that.
    """

    kind: str
    axis: str
    inside: bool
    count: int
    bytes: int


def read(text: str, *, mesh_shape: Mapping[str, int], slices: Sequence[int]) -> list[Collective]:
    """The collectives of a compiled program, largest first.

    text: `compiled.as_text()`. mesh_shape: sizes of the mesh axes by name, in order. slices: number of the slice or
    NVLink domain of each device, in the order of the mesh.
    """
    counts: collections.Counter = collections.Counter()
    amounts: collections.Counter = collections.Counter()
    bodies, entry = _computations(text)
    for (operation, shape, rest), home, times in _instructions(bodies, entry):
        groups = _groups(operation, rest, math.prod(mesh_shape.values()))
        if not groups or len(groups[0]) < 2:
            continue
        kind, received = operation.removesuffix("-start"), _received(operation, shape, len(groups[0]))
        if home.startswith("all-reduce-scatter"):  # how libtpu writes a reduce-scatter: reduce all, keep one part
            kind, received = "reduce-scatter", received // 2
        key = kind, _axis(groups, mesh_shape), all(len({slices[i] for i in group}) == 1 for group in groups)
        counts[key] += times
        amounts[key] += times * received
    found = [
        Collective(kind, axis, inside, count, amounts[kind, axis, inside])
        for (kind, axis, inside), count in counts.items()
    ]
    return sorted(found, key=lambda c: -c.bytes)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Lines of each computation, and the name of the one that runs."""
    bodies: dict[str, list[str]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            current = bodies.setdefault(match[2], [])
            entry = match[2] if match[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None:
            current.append(line)
    return bodies, entry


def _instructions(bodies: Mapping[str, list[str]], entry: str) -> Iterator[tuple[tuple[str, str, str], str, int]]:
    """For each collective (operation, result shape, rest of the line), its computation, how often a step runs it."""
    stack = [(entry, 1)]
    while stack:
        name, times = stack.pop()
        for line in bodies.get(name, ()):
            match = _INSTRUCTION.match(line)
            if not match:
                continue
            shape, operation, rest = match.groups()
            if operation.removesuffix("-start") in KINDS:
                yield (operation, shape, rest), name, times
                continue
            trips = _trips(rest, bodies) if operation == "while" else 1
            for several, one in _CALLED.findall(rest):
                for inner in (several or one).split(","):
                    stack.append((inner.strip().lstrip("%"), times * trips))


def _trips(rest: str, bodies: Mapping[str, list[str]]) -> int:
    """Turns of a loop: as the compiler notes them, else n of its condition `i < n`, if it counts from 0 by 1."""
    if match := _TRIPS.search(rest):
        return int(match[1])
    condition = re.search(r"condition=%?([\w.-]+)", rest)
    lines = "\n".join(bodies.get(condition[1], ())) if condition else ""
    bounds = re.findall(r"= s32\[\]\S* constant\((\d+)\)", lines)
    return int(bounds[0]) if len(bounds) == 1 and "direction=LT" in lines else 1


def _received(operation: str, shape: str, group: int) -> int:
    kind = operation.removesuffix("-start")
    if operation.endswith("-start") and kind != "all-reduce":
        shape = _elements(shape)[1]  # (operands, results, context)
    size = array_bytes(shape)
    if kind == "collective-permute":
        return size
    if kind == "reduce-scatter":
        size *= group  # its result is one part of what went in
    return (2 if kind == "all-reduce" else 1) * size * (group - 1) // group


def array_bytes(shape: str) -> int:
    """Bytes of an array or tuple of arrays as the program's text writes its shape, without padding."""
    total = 0
    for dtype, sizes in _ARRAY.findall(shape):
        digits = re.search(r"\d+", dtype)
        bits = _BITS[dtype] if dtype in _BITS else int(digits[0]) if digits else 0
        total += math.prod(int(size.removeprefix("<=")) for size in sizes.split(",") if size) * bits
    return -(-total // 8)


def _elements(shape: str) -> list[str]:
    """The elements of a tuple shape; layouts and tuples inside are kept whole."""
    parts, depth, part = [], 0, ""
    for letter in shape[1:-1]:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append(part)
            part = ""
        else:
            part += letter
    return [*parts, part]


def _groups(operation: str, rest: str, count: int) -> list[list[int]]:
    """Groups of devices that take part together, as positions in the mesh."""
    if operation.startswith("collective-permute"):
        pairs = _PAIRS.search(rest)
        return [pair for pair in _listed(pairs[1]) if pair[0] != pair[1]] if pairs else []
    if match := _IOTA.search(rest):
        sizes, reshaped, order = ([int(n) for n in group.split(",") if n] for group in match.groups(default=""))
        ids = np.arange(math.prod(reshaped)).reshape(reshaped)
        return (ids.transpose(order) if order else ids).reshape(sizes).tolist()
    if match := _NAMED.search(rest):
        return _named(*match.groups())
    match = _LISTED.search(rest)
    return _listed(match[1]) if match and match[1] else [list(range(count))]


def _named(axes: str, reshaped: str | None, order: str | None, cut: str) -> list[list[int]]:
    """Groups along some axes of a mesh: mesh['a'=8,'b'=2], device_ids=([2,8]T(1,0)) {'a'}."""
    sizes = {name: int(size) for name, size in re.findall(r"'?([\w.-]+)'?=(\d+)", axes)}
    ids = np.arange(math.prod(sizes.values()))
    if reshaped:
        ids = ids.reshape([int(n) for n in reshaped.split(",")])
    if order:
        ids = ids.transpose([int(n) for n in order.split(",")])
    names = list(sizes)
    along = [names.index(name) for name in re.findall(r"[\w.-]+", cut)]
    across = [i for i in range(len(names)) if i not in along]
    grid = ids.reshape(list(sizes.values())).transpose(across + along)
    return grid.reshape(-1, math.prod(sizes[names[i]] for i in along)).tolist()


def _listed(text: str) -> list[list[int]]:
    return [list(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", text)]


def _axis(groups: Iterable[Sequence[int]], mesh_shape: Mapping[str, int]) -> str:
    varying: set[str] = set()
    for group in groups:
        places = np.unravel_index(np.asarray(group), tuple(mesh_shape.values()))
        varying |= {axis for axis, place in zip(mesh_shape, places, strict=True) if len(set(place.tolist())) > 1}
    return "+".join(axis for axis in mesh_shape if axis in varying) or "none"
