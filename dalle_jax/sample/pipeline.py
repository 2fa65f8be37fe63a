"""The Python API: captions in, pictures out.

    pipe = dalle_jax.Pipeline.load("runs/transformer")
    pictures = pipe("a red circle above a blue square", n=4, best_of=64, seed=0)

Ties a trained transformer, its tokenizer, its frozen dVAE and, where there is one, a CLIP together. What may be asked
for is `request.py`, which images are drawn together `waves.py`, the sampling itself `engine.py`; this file turns words
into ids before it and ids into pixels after it.
"""

import functools
import hashlib
import pathlib
from collections.abc import Callable, Hashable, Iterable, Sequence

import jax
import numpy as np
from PIL import Image

from dalle_jax import model_dir, sharding
from dalle_jax.data.decode import BadImage, to_pixels
from dalle_jax.data.transforms import center_crop
from dalle_jax.errors import UserError
from dalle_jax.mesh import make_mesh
from dalle_jax.models import Model, Params
from dalle_jax.models.dvae import DVAEConfig, decode_images, encode_images
from dalle_jax.models.transformer import TransformerConfig
from dalle_jax.pictures.picture import Picture
from dalle_jax.sample import waves
from dalle_jax.sample.engine import Engine, image_keys
from dalle_jax.sample.request import MAX_CANDIDATES, Preview, Request, check
from dalle_jax.sample.rerank import Reranker
from dalle_jax.sample.results import Kept
from dalle_jax.text import Tokenizer, load_tokenizer

CLIP = "clip"  # folder of the CLIP beside the transformer
DECODED = 16  # pictures decoded at a time on a device, so that many candidates are never in memory at full size
BLANK = 255  # of the rows of a preview that are not drawn yet

OnRows = Callable[[Preview], bool | None]

# Compiled once a model, however many pipelines are made of it.
_encode = jax.jit(encode_images, static_argnums=0)
_decode = jax.jit(decode_images, static_argnums=0)


class Pipeline:
    """A trained DALL-E. Make one with `Pipeline.load`; call it with captions."""

    def __init__(
        self,
        transformer: Model,
        params: Params,
        dvae: Model,
        dvae_params: Params,
        tokenizer: Tokenizer,
        *,
        digest: str,
        reranker: Reranker | None = None,
        can_guide: bool = False,
        devices: Sequence[jax.Device] | None = None,
        tensor: int = 1,
        weights: str = "model",
    ):
        """can_guide: the transformer saw pictures without their captions in training. The rest is as in `load`.

        Raises:
          UserError: devices, tensor or weights out of range.
        """
        devices = jax.local_devices() if devices is None else list(devices)
        if not devices or not all(isinstance(device, jax.Device) for device in devices):
            raise UserError(f"devices must be at least one of jax.local_devices(), or None for all, got {devices}")
        heads = transformer.config.heads
        if not isinstance(tensor, int) or tensor < 1 or len(devices) % tensor or heads % tensor:
            raise UserError(
                f"tensor must divide the {len(devices)} device(s) and the model's {heads} heads, got {tensor}"
            )
        mesh = make_mesh({"replica": -1, "tensor": tensor}, devices=devices)
        self.model, self.dvae, self.tokenizer, self.digest = transformer, dvae, tokenizer, digest
        self.reranker, self.can_guide = reranker, can_guide
        self._kinds = {"weights": weights}
        self._engine = Engine(transformer, params, mesh=mesh, **self._kinds)
        self._dvae_params = jax.device_put(dvae_params, sharding.replicated(mesh))
        self._images_place = sharding.batch_sharding(mesh)
        self._capacity: dict[bool, tuple[int, str]] = {}

    @classmethod
    def load(
        cls,
        folder: str | pathlib.Path,
        *,
        clip: str | pathlib.Path | None = None,
        devices: Sequence[jax.Device] | None = None,
        tensor: int = 1,
        weights: str = "model",
    ) -> "Pipeline":
        """The model of a transformer's workdir: newest complete checkpoint, tokenizer, dVAE and CLIP.

        clip: workdir of the CLIP that ranks candidates; default: `clip` in the folder, if it is there.
        devices: that draw, all of this process by default; each takes a part of the candidates.
        tensor: devices that share one copy of a model that is too large for one; by default each has its own.
        weights: 'model' for the model's own precision; 'int8' takes half the memory of bfloat16 and changes the
        pictures a little.

        Raises:
          UserError: a part is missing, damaged, or does not belong to the others, or an argument is out of range.
        """
        folder = pathlib.Path(folder)
        transformer = model_dir.load(folder, name="transformer")
        dvae = model_dir.load(folder / "dvae", name="dvae")
        model = transformer.model
        _check_codes(dvae.model.config, model.config, where=str(folder / "dvae"))
        model_dir.check_dvae(folder, dvae.digest)
        tokenizer = load_tokenizer(folder)
        if tokenizer.vocab_size != model.config.text_vocab:
            raise UserError(
                f"expected a tokenizer of {model.config.text_vocab} entries in {folder}, got {tokenizer.vocab_size}: "
                "put the one back that the model was trained with"
            )
        digest = hashlib.sha256()
        for tree in (transformer.params, dvae.params):
            for leaf in jax.tree.leaves(tree):
                digest.update(np.ascontiguousarray(leaf))
        digest.update(tokenizer.digest.encode())
        if clip is None and (folder / CLIP).is_dir():
            clip = folder / CLIP
        return cls(
            model,
            transformer.params,
            dvae.model,
            dvae.params,
            tokenizer,
            digest=digest.hexdigest(),
            reranker=None if clip is None else Reranker.load(clip),
            can_guide=transformer.config.get("data", {}).get("caption_dropout", 0) > 0,
            devices=devices,
            tensor=tensor,
            weights=weights,
        )

    @property
    def image_size(self) -> int:
        """Side of the pictures in pixels."""
        return self.dvae.config.image_size

    @property
    def max_candidates(self) -> int:
        """Most candidates of one request."""
        return MAX_CANDIDATES

    def wave(self, *, guided: bool = False) -> tuple[int, str]:
        """Most images that are drawn together, and one sentence that says why; measured at the first use."""
        if guided not in self._capacity:
            self._capacity[guided] = waves.capacity(self._engine, guided=guided)
        return self._capacity[guided]

    def __call__(
        self,
        captions: str | Sequence[str],
        *,
        n: int = 1,
        best_of: int | None = None,
        seed: int | Sequence[int] = 0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance: float = 1.0,
        image: Image.Image | np.ndarray | None = None,
        keep_rows: int | None = None,
        on_rows: OnRows | None = None,
    ) -> list[Picture] | list[list[Picture]]:
        """Draw n pictures for each caption.

        captions: one caption or several; they are normalised and cut as in training. seed: one, or one a caption.
        The other arguments are those of `Request` and are the same for all captions.
        on_rows: called with a `Preview` after each row of codes; returning False ends that caption.

        Returns: a list of n pictures for one caption, a list of such lists for several; best first with `best_of`, else
        in the order of their seeds. A caption that was ended has none.
        Raises:
          UserError: an argument out of range.
        """
        if not isinstance(captions, Iterable) or not (
            words := [captions] if isinstance(captions, str) else [*captions]
        ):
            raise UserError(f"captions must be a text or a list of at least one text, got {captions!r}")
        seeds = list(seed) if isinstance(seed, Sequence) or np.ndim(seed) else [seed] * len(words)
        if len(seeds) != len(words):
            raise UserError(f"seed must be one, or one a caption, got {len(seeds)} for {len(words)} captions")
        shared = dict(n=n, best_of=best_of, temperature=temperature, top_k=top_k, top_p=top_p, guidance=guidance)
        requests = [
            Request(word, seed=own, image=image, keep_rows=keep_rows, **shared)
            for word, own in zip(words, seeds, strict=True)
        ]
        pictures = self.draw(requests, on_rows=on_rows)
        return pictures[0] if isinstance(captions, str) else pictures

    def check(self, request: Request) -> None:
        """Raises UserError, one sentence, if this model cannot draw what is asked for."""
        if not isinstance(request, Request):
            raise UserError(f"requests must be a list of Request, got {request!r} in it: make one of it")
        check(request, self.model.config, can_rank=self.reranker is not None, can_guide=self.can_guide)
        if request.image is not None:
            _pixels(request.image)

    def wave_key(self, request: Request) -> Hashable:
        """Requests of equal keys are drawn together without loss."""
        capacity, _ = self.wave(guided=request.guidance != 1)
        width = min(waves.ladder(request.candidates), capacity)
        return width, request.guidance != 1, request.top_k is not None or request.top_p is not None

    def draw(self, requests: Sequence[Request], *, on_rows: OnRows | None = None) -> list[list[Picture]]:
        """The pictures of each request; as `__call__`, where every request may differ in everything.

        Raises:
          UserError: one of the requests cannot be drawn; nothing is drawn then.
        """
        if on_rows is not None and not callable(on_rows):
            raise UserError(f"on_rows must be a function that is given a Preview, or None, got {on_rows!r}")
        for request in requests:
            self.check(request)
        kept = [Kept(request.n, ranked=request.best_of is not None) for request in requests]
        together: dict[Hashable, list[int]] = {}
        for index, request in enumerate(requests):
            together.setdefault(self.wave_key(request), []).append(index)
        cancelled: set[int] = set()
        for members in together.values():
            self._draw_alike(members, requests, kept, cancelled, on_rows)
        return [
            [] if index in cancelled else self._finish(request, kept[index]) for index, request in enumerate(requests)
        ]

    def encode(self, image: Image.Image | np.ndarray) -> np.ndarray:
        """A picture, its centre crop at `image_size`, as int32 codes [grid * grid] in raster order."""
        return np.asarray(_encode(self.dvae, self._dvae_params, center_crop(_pixels(image), self.image_size)[None]))[0]

    def decode(self, ids: np.ndarray) -> np.ndarray:
        """Codes in raster order, [grid * grid] or [B, grid * grid] -> uint8 [image_size, image_size, 3] or [B, ...].

        Raises:
          UserError: another shape, or numbers that are no codes.
        """
        ids_BI, layout = np.atleast_2d(np.asarray(ids)), self.model.config.layout
        shaped = ids_BI.ndim == 2 and len(ids_BI) and ids_BI.shape[1] == layout.image_len and ids_BI.dtype.kind in "iu"
        if not shaped or ids_BI.min() < 0 or ids_BI.max() >= layout.image_vocab:
            got = f"{ids_BI.min()} .. {ids_BI.max()}" if shaped else f"{ids_BI.dtype} {list(np.shape(ids))}"
            raise UserError(
                f"ids must be whole numbers in 0 .. {layout.image_vocab - 1}, {layout.image_len} a picture, got {got}"
            )
        ids_BI = ids_BI.astype(np.int32)
        ways = self._engine.ways
        most = DECODED * ways
        decoded = []
        for start in range(0, len(ids_BI), most):
            chunk = ids_BI[start : start + most]
            size = -(-min(most, waves.ladder(len(chunk))) // ways) * ways
            full = jax.device_put(np.resize(chunk, (size, chunk.shape[1])), self._images_place)
            decoded.append(np.asarray(_decode(self.dvae, self._dvae_params, full))[: len(chunk)])
        return np.concatenate(decoded) if np.ndim(ids) == 2 else decoded[0][0]

    def _draw_alike(self, members, requests, kept, cancelled, on_rows) -> None:
        """Requests that share waves, by their indices; what is drawn goes to `kept`."""
        counts = [requests[index].candidates for index in members]
        capacity, _ = self.wave(guided=requests[members[0]].guidance != 1)
        codes = {index: self.encode(requests[index].image) for index in members if requests[index].image is not None}
        for plan in waves.plan(counts, capacity=capacity, ways=self._engine.ways):
            places = [(members[place.request], place) for place in plan.places]
            if all(index in cancelled for index, _ in places):
                continue
            ids_CMI = self._draw_wave(plan, places, requests, codes, kept, cancelled, on_rows)
            for (index, place), ids_MI in zip(places, ids_CMI, strict=False):
                if index not in cancelled:
                    self._keep(kept[index], requests[index], place, ids_MI[: place.count])

    def _draw_wave(self, plan, places, requests, codes, kept, cancelled, on_rows) -> np.ndarray:
        """int32 [C, M, I]: one wave. Places that nobody asked for repeat the first request."""
        config, engine = self.model.config, self._engine
        asked = [(requests[index], place, codes.get(index)) for index, place in places]
        asked += [asked[0]] * (plan.captions - len(asked))
        seeds_CM = [request.seed + place.first + np.arange(plan.candidates) for request, place, _ in asked]
        wave = engine.begin(
            np.stack([config.layout.text_slots(self.tokenizer.encode(request.caption)) for request, *_ in asked]),
            image_keys(np.asarray(seeds_CM, np.int64) % 2**32),
            **{
                name: [getattr(request, name) for request, *_ in asked]
                for name in ("temperature", "top_k", "top_p", "guidance")
            },
            given_CI=np.stack([np.zeros(config.layout.image_len, np.int32) if c is None else c for *_, c in asked]),
            given_rows=[request.rows_kept(config.grid) for request, *_ in asked],
        )
        if on_rows is None:
            return engine.ids(engine.advance(wave, 0, config.grid))
        for row in range(config.grid):
            wave = engine.advance(wave, row, row + 1)
            ids_CMI = engine.ids(wave)  # waits for the row
            for (index, place), ids_MI in zip(places, ids_CMI, strict=False):
                if index in cancelled:
                    continue
                done = kept[index].drawn + place.count * (row + 1) / config.grid
                seen_MI = ids_MI[: min(place.count, requests[index].n)]
                pictures = functools.partial(self._preview, seen_MI, row + 1)
                preview = Preview(index, row + 1, config.grid, done / requests[index].candidates, pictures)
                more = on_rows(preview)
                if isinstance(more, bool | np.bool) and not more:
                    cancelled.add(index)
            if all(index in cancelled for index, _ in places):
                break
        return ids_CMI

    def _preview(self, ids_MI, rows: int) -> list[Image.Image]:
        pictures = self.decode(ids_MI).copy()
        pictures[:, rows * self.dvae.config.stride :] = BLANK
        return [Image.fromarray(picture) for picture in pictures]

    def _keep(self, kept: Kept, request: Request, place: waves.Place, ids_MI) -> None:
        seeds = request.seed + place.first + np.arange(place.count)
        if request.best_of is None:
            kept.add(seeds, ids_MI)
            return
        step = DECODED * self._engine.ways
        for start in range(0, place.count, step):
            ids = ids_MI[start : start + step]
            kept.add(seeds[start : start + step], ids, self.reranker.score(self.decode(ids), request.caption))

    def _finish(self, request: Request, kept: Kept) -> list[Picture]:
        settings = {
            "temperature": float(request.temperature),
            "top_k": None if request.top_k is None else int(request.top_k),
            "top_p": None if request.top_p is None else float(request.top_p),
            "guidance": float(request.guidance),
            "best_of": None if request.best_of is None else int(request.best_of),
            "keep_rows": request.rows_kept(self.model.config.grid),
            "checkpoint": self.digest,
            **({"clip": self.reranker.digest} if request.best_of is not None else {}),
            **self._kinds,
        }
        return [
            Picture.from_array(pixels, caption=request.caption, seed=seed, score=score, settings=settings)
            for pixels, seed, score in zip(self.decode(kept.ids()), kept.seeds(), kept.scores(), strict=True)
        ]


def _check_codes(dvae: DVAEConfig, transformer: TransformerConfig, *, where: str) -> None:
    """Raises UserError, if these are not the codes that the transformer draws."""
    wanted, got = (transformer.image_vocab, transformer.grid), (dvae.vocab, dvae.grid)
    if got != wanted:
        raise UserError(
            f"expected a dVAE of {wanted[0]} codes on a grid of {wanted[1]} in {where}, got {got[0]} on {got[1]}: "
            "put the one back that the transformer was trained with"
        )


def _pixels(image: Image.Image | np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] of a picture that somebody gave, turned upright and laid on white as in training.

    Raises:
      UserError: another type, shape or dtype, or a file that is broken.
    """
    try:
        array = to_pixels(image) if isinstance(image, Image.Image) else np.asarray(image)
    except BadImage as error:
        raise UserError(f"image must be a picture that can be read, got one where {error}") from error
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3 or not array.size:
        raise UserError(f"image must be a PIL image or uint8 [H, W, 3], got {array.dtype} {array.shape}")
    return array
