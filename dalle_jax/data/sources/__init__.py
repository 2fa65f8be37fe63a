"""One string names a source: `wds:PATTERN`, `folder:DIR`, `coco:DIR`, `tfds:NAME/SPLIT`, `scenes:SPLIT`, `tokens:DIR`.

`open_source` is the only dispatch on the kind. To add one: a class as `record.Source` asks, and a line there.
"""

import os
import pathlib

from dalle_jax.data.record import Source
from dalle_jax.data.sources import coco, scenes, tar
from dalle_jax.data.sources.features import TokenSource
from dalle_jax.data.sources.folder import FolderSource
from dalle_jax.errors import UserError

HELP = (
    "wds:PATTERN (tar shards: glob, {000..012} or a folder), folder:DIR (images with .txt or metadata.jsonl/.csv), "
    "coco:JSON,DIR or coco:DIR[@val2014] (the official download), tfds:NAME/SPLIT[@DATA_DIR], "
    "scenes:train|val (built in)"
)
TOKENS = "tokens"  # of `dalle-jax encode`, for a transformer's config.data


def is_tokens(spec: str) -> bool:
    """Whether `spec` names image tokens instead of images."""
    return spec.partition(":")[0] == TOKENS


def check_outside(spec: str, place: str | os.PathLike) -> None:
    """Refuse a place to write to inside a folder whose every picture is a record, as one written there would be too.

    Raises:
      UserError: with both.
    """
    if spec.startswith("tfds:image_folder/"):
        split, _, parent = spec.removeprefix("tfds:image_folder/").partition("@")
        folder = os.path.join(parent, split)
    else:
        folder = spec.removeprefix("folder:") if spec.startswith("folder:") else ""
    if folder and pathlib.Path(place).resolve().is_relative_to(pathlib.Path(folder).expanduser().resolve()):
        raise UserError(
            f"expected a place outside of {spec} to write to, got {place}, where pictures would be records: choose "
            "another"
        )


def open_source(spec: str, *, captions_required: bool = True, pictures_required: bool = True) -> Source:
    """Open what `spec` names.

    Args:
      spec: KIND:PLACE, see HELP.
      captions_required: give an image without a usable caption as `Dropped`; otherwise as a record without captions,
        which is all that an image tokenizer needs.
      pictures_required: refuse a source of image tokens, which only a transformer can train on.

    Raises:
      UserError: no such kind or place, or nothing in it.
    """
    kind, _, place = spec.partition(":")
    match kind if place else "":
        case "wds":
            return tar.ShardSource(spec, tar.shard_paths(place), captions_required=captions_required)
        case "folder":
            return FolderSource(spec, os.path.expanduser(place), captions_required=captions_required)
        case "coco":
            return coco.open_coco(spec, place, captions_required=captions_required)
        case "tfds":
            from dalle_jax.data.sources.tfds import open_tfds  # half a second, and few need it

            return open_tfds(spec, place, captions_required=captions_required)
        case "scenes":
            return scenes.open_scenes(place)
        case "tokens" if pictures_required:
            raise UserError(
                f"expected a source of pictures, got {spec}, which holds image tokens: name what was encoded"
            )
        case "tokens":
            return TokenSource(spec, os.path.expanduser(place))
    raise UserError(f"expected a source such as {HELP}, got {spec!r}")
