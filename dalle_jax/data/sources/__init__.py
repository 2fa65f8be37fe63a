"""One string names a source: `wds:PATTERN`, `folder:DIR`, `coco:DIR`, `tfds:NAME/SPLIT`, `scenes:SPLIT`, `tokens:DIR`.

The only dispatch on the kind of a source. To add a kind: a class as `record.Source` asks, and an entry in `KINDS`.
"""

import glob
import os
import re

from dalle_jax.data.record import Source
from dalle_jax.data.sources.coco import OFFICIAL_SPLIT, CocoSource, official_layout
from dalle_jax.data.sources.features import TokenSource
from dalle_jax.data.sources.folder import FolderSource
from dalle_jax.data.sources.tar import ShardSource
from dalle_jax.errors import UserError

HELP = (
    "wds:PATTERN (tar shards: glob, {000..012} or a folder), folder:DIR (images with .txt or metadata.jsonl/.csv), "
    "coco:JSON,DIR or coco:DIR[@val2014] (the official download), tfds:NAME/SPLIT[@DATA_DIR], "
    "scenes:train|val (built in)"
)
TOKENS = "tokens"  # of `dalle-jax encode`, for a transformer's config.data


def is_tokens(spec: str) -> bool:
    """Does `spec` name codes of pictures, not pictures?"""
    return spec.partition(":")[0] == TOKENS


def open_source(spec: str, *, captions_required: bool = True, pictures_required: bool = True) -> Source:
    """Open what `spec` names.

    Args:
      spec: KIND:PLACE, see HELP.
      captions_required: give a picture without a usable caption as `Dropped`; otherwise as a record without captions,
        which is all that a dVAE needs.
      pictures_required: refuse a source of tokens, which only a transformer can train on.

    Raises:
      UserError: no such kind or place, or nothing in it.
    """
    kind, colon, place = spec.partition(":")
    if kind == TOKENS and place:
        if pictures_required:
            raise UserError(
                f"expected a source of pictures, got {spec}, which holds codes: name what it was encoded from"
            )
        return TokenSource(spec, os.path.expanduser(place))
    if not colon or kind not in KINDS or not place:
        raise UserError(f"expected a source such as {HELP}, got {spec!r}")
    return KINDS[kind](spec, place, captions_required=captions_required)


def shard_paths(pattern: str) -> list[str]:
    """The files of a shard pattern, sorted: braces as in a shell, then globs; a folder stands for its *.tar.

    Raises:
      UserError: no file matches, or one without wildcards does not exist.
    """
    paths: list[str] = []
    for part in expand_braces(os.path.expanduser(pattern)):
        found = (
            [part] if os.path.isfile(part) else glob.glob(os.path.join(part, "*.tar") if os.path.isdir(part) else part)
        )
        if not found:
            hint = "it is a folder without .tar files" if os.path.isdir(part) else "no file matches"
            raise UserError(f"expected tar shards at {part}, but {hint}: check the pattern")
        paths += found
    return sorted(path for path in set(paths) if os.path.isfile(path))


def expand_braces(pattern: str) -> list[str]:
    """'{00..02}.tar' -> '00.tar', '01.tar', '02.tar'; '{a,b}' -> 'a', 'b'; zero padding as in the first number.

    Raises:
      UserError: a range that runs backwards.
    """
    match = re.search(r"\{([^{}]*(?:,|\.\.)[^{}]*)\}", pattern)
    if not match:
        return [pattern]
    body = match[1]
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", body):
        first, last = numbers[1], numbers[2]
        if int(last) < int(first):
            raise UserError(f"expected a range from low to high, got {{{body}}} in {pattern}: swap the numbers")
        choices = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    else:
        choices = body.split(",")
    return [
        expanded
        for choice in choices
        for expanded in expand_braces(pattern[: match.start()] + choice + pattern[match.end() :])
    ]


def _open_shards(name: str, place: str, *, captions_required: bool) -> Source:
    return ShardSource(name, shard_paths(place), captions_required=captions_required)


def _open_folder(name: str, place: str, *, captions_required: bool) -> Source:
    return FolderSource(name, os.path.expanduser(place), captions_required=captions_required)


def _open_coco(name: str, place: str, *, captions_required: bool) -> Source:
    path, comma, images = place.rpartition(",")
    if not comma:
        folder, _, split = place.partition("@")
        path, images = official_layout(os.path.expanduser(folder), split or OFFICIAL_SPLIT)
    path, images = os.path.expanduser(path), os.path.expanduser(images)
    return CocoSource(name, path, images, captions_required=captions_required)


def _open_tfds(name: str, place: str, *, captions_required: bool) -> Source:
    from dalle_jax.data.sources.tfds import open_tfds

    return open_tfds(name, place, captions_required=captions_required)


def _open_scenes(name: str, place: str, *, captions_required: bool) -> Source:
    from dalle_jax.data.sources.scenes import open_scenes

    return open_scenes(place)


KINDS = {"wds": _open_shards, "folder": _open_folder, "coco": _open_coco, "tfds": _open_tfds, "scenes": _open_scenes}
