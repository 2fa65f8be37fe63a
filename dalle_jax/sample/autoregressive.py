"""A transformer as a generator: text tokenizer, engine and image tokenizer.

A step draws one row of the grid of image tokens, a draft is the image tokens of a candidate, int32 [R, C] with rows
from the top, and finishing decodes them.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Hashable, Sequence
from typing import Any

import jax
import numpy as np

from dalle_jax import model_dir, sharding
from dalle_jax.data.transforms import center_crop
from dalle_jax.errors import UserError, check_number
from dalle_jax.mesh import local_mesh, make_mesh
from dalle_jax.model_dir import ModelDir
from dalle_jax.sample import batches
from dalle_jax.sample.engine import Batch, Engine, image_keys
from dalle_jax.sample.generator import Usage
from dalle_jax.sample.image_tokenizer import ImageTokenizer
from dalle_jax.sample.request import Option, Request, RequestError, pixels_of
from dalle_jax.text import Tokenizer, load_tokenizer

BLANK = 255  # value of the pixels of a preview that are not drawn yet

# Above the temperature's range float32 overflows; at 0, and so near it that nothing is left to chance, see `Engine`.
OPTIONS = (
    Option("temperature", float, 1.0, "1 is the paper's; lower varies less, 0 takes the likeliest", min=0, max=1000),
    Option("top_k", int, None, "draw only among the k most likely image tokens", min=1, unset="all"),
    Option("top_p", float, None, "draw among the most likely up to this probability", above=0, max=1, unset="all"),
    Option("keep_rows", int, None, "top rows of image tokens to keep", min=0, unset="15 of 32", completes=True),
)


class Autoregressive:
    """A `Generator` that draws image tokens in raster order.

    Attributes, beside the protocol's:
      model: the definition of the transformer. engine: its weights on the devices. tokenizer: of captions.
      can_guide: the transformer was also trained without captions.
    """

    def __init__(
        self,
        transformer: ModelDir,
        image_tokenizer: ModelDir,
        tokenizer: Tokenizer,
        *,
        digest: str,
        can_guide: bool = False,
        mesh: jax.sharding.Mesh | None = None,
        weights: str = "model",
    ):
        """mesh: default: all devices of this process, each with a copy. weights: as for `Engine`."""
        mesh = mesh or local_mesh()
        self.model, self.image_tokenizer = transformer.model, ImageTokenizer(image_tokenizer, mesh=mesh)
        self.tokenizer, self.digest, self.can_guide = tokenizer, digest, can_guide
        self.engine = Engine(self.model, transformer.params, mesh=mesh, weights=weights)
        self._weights = weights
        self.image_size = self.image_tokenizer.image_size
        self.batch_multiple = self.engine.batch_multiple
        self.decode_batch = self.image_tokenizer.batch_size
        self._layout = self.model.config.layout
        limits = {"top_k": self._layout.image_vocab, "keep_rows": self._layout.grid}
        self.options = tuple(dataclasses.replace(o, max=limits.get(o.name, o.max)) for o in OPTIONS)

    @classmethod
    def load(
        cls,
        folder: pathlib.Path,
        *,
        devices: Sequence[jax.Device] | None = None,
        tensor: int = 1,
        weights: str = "model",
        average: bool = True,
    ) -> "Autoregressive":
        """The generator of a workdir or a model folder; arguments and errors are those of `Pipeline.load`."""
        mesh = _mesh(devices, tensor=tensor)  # first, because reading a large model takes minutes
        transformer = model_dir.load(folder, "transformer", average=average)
        image_tokenizer = model_dir.load_frozen(folder, "image_tokenizer")
        config, image_config = transformer.model.config, image_tokenizer.model.config
        if config.heads % tensor:
            raise UserError(f"tensor must divide the model's {config.heads} heads, got {tensor}: choose such a number")
        if (image_config.vocab, image_config.grid) != (config.image_vocab, config.grid):
            raise UserError(
                f"expected an image tokenizer of {config.image_vocab} tokens on a grid of {config.grid} in "
                f"{folder}, got {image_config.vocab} on {image_config.grid}: put the one back that the transformer "
                "was trained with"
            )
        tokenizer = load_tokenizer(folder, layout=config.layout)
        digest = hashlib.sha256()
        for tree in (transformer.params, image_tokenizer.params):
            for leaf in jax.tree.leaves(tree):
                digest.update(np.ascontiguousarray(leaf).data)
        digest.update(tokenizer.digest.encode())
        return cls(
            transformer,
            image_tokenizer,
            tokenizer,
            digest=digest.hexdigest(),
            can_guide=transformer.config.get("data", {}).get("caption_dropout", 0) > 0,
            mesh=mesh,
            weights=weights,
        )

    def check(self, request: Request) -> None:
        if request.guidance != 1 and not self.can_guide:
            raise RequestError(
                "guidance",
                "guidance must be 1 for a model that was trained without dropping captions "
                f"(config.data.caption_dropout), got {request.guidance}",
            )

    def capacity(self, *, guided: bool) -> batches.Capacity:
        return self.engine.capacity(guided=guided)

    def batch_key(self, request: Request) -> Hashable:
        return request.guidance != 1, any(request.options.get(name) is not None for name in ("top_k", "top_p"))

    def steps(self, request: Request) -> range:
        return range(self._kept_rows(request), self._layout.grid)

    def start(self, requests: Sequence[Request], seeds_PM: np.ndarray) -> Batch:
        values = [request.values(self.options) for request in requests]
        images = {
            id(r.image): center_crop(pixels_of(r.image), self.image_size) for r in requests if r.image is not None
        }
        tokens = {key: self.image_tokenizer.encode(image[None]).ravel() for key, image in images.items()}
        blank = np.zeros(self._layout.image_len, np.int32)
        return self.engine.begin(
            np.stack([self._layout.caption_ids(self.tokenizer.encode(request.caption)) for request in requests]),
            image_keys(seeds_PM),
            guidance=[request.guidance for request in requests],
            **{name: [value[name] for value in values] for name in ("temperature", "top_k", "top_p")},
            given_PI=np.stack([tokens.get(id(request.image), blank) for request in requests]),
            given_rows=[self._kept_rows(request) for request in requests],
        )

    def advance(self, state: Batch, first: int, last: int) -> Batch:
        return self.engine.advance(state, first, last)

    def drafts(self, state: Batch) -> np.ndarray:
        tokens_PMI, grid = self.engine.tokens(state), self._layout.grid
        return tokens_PMI.reshape(*tokens_PMI.shape[:2], grid, grid)

    def preview(self, drafts: np.ndarray, step: int) -> np.ndarray:
        images = self.image_tokenizer.decode(drafts).copy()
        images[:, step * self.image_size // self._layout.grid :] = BLANK
        return images

    def finish(self, drafts: np.ndarray, request: Request, seeds: Sequence[int]) -> np.ndarray:
        return self.image_tokenizer.decode(drafts)

    def settings(self, request: Request) -> dict[str, Any]:
        return request.values(self.options) | {"keep_rows": self._kept_rows(request), "weights": self._weights}

    def usage(self, request: Request) -> Usage:
        kept = self._kept_rows(request) * self._layout.grid
        return Usage(
            text_tokens=len(self.tokenizer.encode(request.caption)),
            max_text_tokens=self._layout.caption_len,
            image_tokens=kept,
            drawn_tokens=self._layout.image_len - kept,
        )

    def describe(self) -> dict[str, Any]:
        layout = self._layout
        return {"grid": layout.grid, "image_vocab": layout.image_vocab, "caption_tokens": layout.caption_len}

    def _kept_rows(self, request: Request) -> int:
        if request.image is None:
            return 0
        keep_rows = request.options.get("keep_rows")
        return self._layout.grid * 15 // 32 if keep_rows is None else keep_rows  # section 3.3 keeps 15 of 32


def _mesh(devices: Sequence[jax.Device] | None, *, tensor: int) -> jax.sharding.Mesh:
    """The devices as a mesh; raises UserError if they are none, or no multiple of `tensor`."""
    devices = jax.local_devices() if devices is None else list(devices)
    if not devices or not all(isinstance(device, jax.Device) for device in devices):
        raise UserError(f"devices must be at least one of jax.local_devices(), or None for all, got {devices}")
    check_number("tensor", tensor, min=1, max=len(devices), whole=True)
    if len(devices) % tensor:
        raise UserError(f"tensor must divide the {len(devices)} devices, got {tensor}: choose such a number")
    return make_mesh({sharding.REPLICA: -1, sharding.TENSOR: int(tensor)}, devices=devices)
