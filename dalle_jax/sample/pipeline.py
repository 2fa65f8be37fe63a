"""The Python API: captions in, images out.

    pipe = dalle_jax.Pipeline.load("runs/transformer")
    pictures = pipe("a red circle above a blue square", n=4, best_of=64, seed=0)

Cuts requests into batches, ranks candidates, reports progress and stops what nobody wants any more. What makes images
from captions is a `Generator`; nothing here knows its model.
"""

import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image

from dalle_jax.errors import UserError
from dalle_jax.pictures.picture import Picture
from dalle_jax.sample import batches
from dalle_jax.sample.autoregressive import Autoregressive
from dalle_jax.sample.generator import Generator
from dalle_jax.sample.image_tokenizer import ImageTokenizer
from dalle_jax.sample.request import MAX_SEEDS, Preview, Request, RequestError, check
from dalle_jax.sample.rerank import Reranker

CLIP = "clip"  # folder of the CLIP beside the model

OnProgress = Callable[[Preview], bool | None]


class Pipeline:
    """A trained DALL-E. Make one with `Pipeline.load`; call it with captions."""

    def __init__(self, generator: Generator, reranker: Reranker | None = None):
        self.generator, self.reranker = generator, reranker
        self._capacity: dict[bool, batches.Capacity] = {}

    @classmethod
    def load(
        cls,
        folder: str | pathlib.Path,
        *,
        clip: str | pathlib.Path | None = None,
        devices: Sequence[jax.Device] | None = None,
        tensor: int = 1,
        weights: str = "model",
        average: bool = True,
    ) -> "Pipeline":
        """The model of a transformer's workdir: newest complete checkpoint, tokenizer, image tokenizer and CLIP.

        clip: workdir of the CLIP that ranks candidates; default: `clip` in the folder, if it is there.
        devices: all of this process by default; each draws a part of the candidates.
        tensor: devices that share one copy of a model that is too large for one; by default each has a copy.
        weights: 'model' for the model's precision; 'int8' takes half the memory of bfloat16 and changes the images a
        little.
        average: the moving average of the parameters, which the paper draws with; False for the parameters as the last
        step left them. An exported model has those that it was exported with.

        Raises:
          UserError: a part is missing, damaged, or does not belong to the others, or an argument is out of range.
        """
        folder = pathlib.Path(folder)
        generator = Autoregressive.load(folder, devices=devices, tensor=tensor, weights=weights, average=average)
        if clip is None and (folder / CLIP).is_dir():
            clip = folder / CLIP
        return cls(generator, None if clip is None else Reranker.load(clip))

    @property
    def image_size(self) -> int:
        """Height and width of the images in pixels."""
        return self.generator.image_size

    @property
    def digest(self) -> str:
        """sha256 (hex) of everything that decides what the images look like."""
        return self.generator.digest

    def encode(self, images: np.ndarray) -> np.ndarray:
        """`ImageTokenizer.encode` of the model's image tokenizer: uint8 [B, H, W, 3] -> int32 [B, rows, columns].

        Raises:
          UserError: what it refuses, or a model that draws no image tokens.
        """
        return self._image_tokenizer.encode(images)

    def decode(self, tokens: np.ndarray) -> np.ndarray:
        """`ImageTokenizer.decode` of the model's image tokenizer: [B, rows, columns] -> uint8 [B, H, W, 3].

        Raises:
          UserError: what it refuses, or a model that draws no image tokens.
        """
        return self._image_tokenizer.decode(tokens)

    def __call__(
        self,
        captions: str | Sequence[str],
        *,
        n: int = 1,
        best_of: int | None = None,
        seed: int | Sequence[int] | None = None,
        guidance: float = 1.0,
        image: Image.Image | np.ndarray | None = None,
        on_progress: OnProgress | None = None,
        **options: Any,
    ) -> list[Picture] | list[list[Picture]]:
        """Draw n images for each caption.

        captions: one caption or several; they are normalized and cut as in training.
        seed: of the first image; of several captions each goes on where the candidates of the one before end. A list
          has the first seed of each caption. Without one it is drawn; every picture says its own.
        The other arguments are those of `Request` and are the same for all captions; `options` are the generator's:
        `temperature`, `top_k`, `top_p` and `keep_rows` of a transformer.
        on_progress: called with a `Preview` after each step; returning False ends that caption.

        Returns: a list of n images for one caption, a list of such lists for several; best first with `best_of`, else
        in the order of their seeds. A caption that was ended has none.
        Raises:
          UserError: an argument out of range.
        """
        if not isinstance(captions, Iterable) or not (
            words := [captions] if isinstance(captions, str) else [*captions]
        ):
            raise UserError(f"captions must be a text or a list of at least one text, got {captions!r}")
        several = not (seed is None or np.ndim(seed) == 0)
        seeds: list[Any] = [*np.asarray(seed, object)] if several else [seed]
        if several and len(seeds) != len(words):
            raise UserError(f"seed must be one, or one per caption, got {len(seeds)} for {len(words)} captions")
        first = Request(words[0], n=n, best_of=best_of, seed=seeds[0], guidance=guidance, image=image, options=options)
        self.check(first)
        requests = first.for_captions(words)
        if several:
            requests = [dataclasses.replace(each, seed=own) for each, own in zip(requests, seeds, strict=True)]
        pictures = self.draw(requests, on_progress=on_progress)
        return pictures[0] if isinstance(captions, str) else pictures

    def check(self, request: Request) -> None:
        """Raises UserError, one sentence, if this pipeline cannot draw the request."""
        if not isinstance(request, Request):
            raise UserError(f"requests must be a list of Request, got {request!r} in it: make one of it")
        check(request, self.generator.options)
        if request.best_of is not None and self.reranker is None:
            message = "best_of needs a CLIP to rank with: train one and put its workdir into the model's as clip"
            raise RequestError("best_of", message)
        self.generator.check(request)

    def can_draw(self, request: Request) -> bool:
        """Whether `check` accepts the request."""
        try:
            self.check(request)
        except UserError:
            return False
        return True

    def capacity(self, *, guided: bool = False) -> batches.Capacity:
        """The maximum number of images that are drawn together, and why; measured at the first use."""
        if guided not in self._capacity:
            self._capacity[guided] = self.generator.capacity(guided=guided)
        return self._capacity[guided]

    def batch_key(self, request: Request) -> Hashable:
        """Requests of equal keys are drawn together without loss."""
        return self._candidates_per_slot(request), self.generator.batch_key(request)

    def captions_per_batch(self, request: Request) -> int:
        """The number of requests like this one that fill a batch."""
        images, _ = self.capacity(guided=request.guidance != 1)
        return max(1, images // self._candidates_per_slot(request))

    def draw(self, requests: Sequence[Request], *, on_progress: OnProgress | None = None) -> list[list[Picture]]:
        """The images of each request; as `__call__`, where every request may differ in everything.

        Raises:
          UserError: one of the requests cannot be drawn; nothing is drawn then.
        """
        if on_progress is not None and not callable(on_progress):
            raise UserError(f"on_progress must be a function that takes a Preview, or None, got {on_progress!r}")
        for request in requests:
            self.check(request)
        drawing = _Drawing(self.generator, self.reranker, requests, on_progress)
        together: dict[Hashable, dict[int, int]] = {}
        for index, request in enumerate(requests):
            together.setdefault(self.batch_key(request), {})[index] = request.candidates
        for counts in together.values():
            images, _ = self.capacity(guided=requests[next(iter(counts))].guidance != 1)
            for plan in batches.plan(counts, capacity=images, multiple=self.generator.batch_multiple):
                drawing.draw(plan)
        return [drawing.finish(index) for index in range(len(requests))]

    @property
    def _image_tokenizer(self) -> ImageTokenizer:
        if self.generator.image_tokenizer is None:
            raise UserError("expected a model that draws image tokens, got one without: use it for captions only")
        return self.generator.image_tokenizer

    def _candidates_per_slot(self, request: Request) -> int:
        images, _ = self.capacity(guided=request.guidance != 1)
        return min(batches.bucket(request.candidates), images)


class _Drawing:
    """Requests while they are drawn: the best candidates of each so far, and which of them were ended."""

    def __init__(
        self,
        generator: Generator,
        reranker: Reranker | None,
        requests: Sequence[Request],
        on_progress: OnProgress | None,
    ):
        self._generator, self._reranker = generator, reranker
        self._requests, self._on_progress = requests, on_progress
        self._best: list[list[tuple[float | None, int, np.ndarray]]] = [[] for _ in requests]  # score, seed, draft
        self._seen = [0] * len(requests)  # candidates drawn
        self._ended: set[int] = set()

    def draw(self, plan: batches.Plan) -> None:
        """Draw one batch and keep its best candidates. Prompts without a slot repeat the first one."""
        if self._nobody_waits(plan):
            return
        slots = [*plan.slots, *plan.slots[:1] * (plan.prompts - len(plan.slots))]
        requests = [self._requests[slot.request] for slot in slots]
        seeds_PM = [
            request.seed + slot.first + np.arange(plan.candidates)
            for request, slot in zip(requests, slots, strict=True)
        ]
        state = self._generator.start(requests, (np.stack(seeds_PM) % MAX_SEEDS).astype(np.uint32))
        steps, drafts = self._generator.steps(requests[0]).stop, np.empty((0, 0))
        stride = steps if self._on_progress is None else 1
        for step in range(stride, steps + 1, stride):
            state = self._generator.advance(state, step - stride, step)
            drafts = self._generator.drafts(state)
            for slot, slot_drafts in zip(plan.slots, drafts, strict=False):
                self._report(slot, slot_drafts[: slot.count], step=step, steps=steps)
            if self._nobody_waits(plan):
                return
        for slot, slot_drafts in zip(plan.slots, drafts, strict=False):
            if slot.request not in self._ended:
                self._keep(slot, slot_drafts[: slot.count])

    def finish(self, index: int) -> list[Picture]:
        """The images of a request, none if it was ended."""
        if index in self._ended:
            return []
        request = self._requests[index]
        scores, seeds, drafts = zip(*self._best[index], strict=True)
        usage = self._generator.usage(request)
        settings = {
            "caption_tokens": usage.text_tokens,  # of which at most max_caption_tokens are read
            "max_caption_tokens": usage.max_text_tokens,
            "seed": request.seed,  # of the first candidate
            "guidance": float(request.guidance),
            "best_of": request.best_of,
            **self._generator.settings(request),
            "checkpoint": self._generator.digest,
        }
        if request.best_of is not None and self._reranker is not None:
            settings["clip"] = self._reranker.digest
        images = self._generator.finish(np.stack(drafts), request, seeds)
        tokens = [None] * len(drafts) if self._generator.image_tokenizer is None else drafts
        return [
            Picture.from_array(image, caption=request.caption, seed=seed, score=score, tokens=own, settings=settings)
            for image, seed, score, own in zip(images, seeds, scores, tokens, strict=True)
        ]

    def _nobody_waits(self, plan: batches.Plan) -> bool:
        return all(slot.request in self._ended for slot in plan.slots)

    def _report(self, slot: batches.Slot, drafts, *, step: int, steps: int) -> None:
        if self._on_progress is None or slot.request in self._ended:
            return
        request = self._requests[slot.request]
        share = (self._seen[slot.request] + slot.count * step / steps) / request.candidates

        def images() -> list[Image.Image]:
            return [Image.fromarray(image) for image in self._generator.preview(drafts[: request.n], step)]

        answer = self._on_progress(Preview(slot.request, step, steps, share, images))
        if isinstance(answer, bool | np.bool) and not answer:
            self._ended.add(slot.request)

    def _keep(self, slot: batches.Slot, drafts) -> None:
        """Take candidates among the n best of their request; of equal scores the smaller seed goes first."""
        request, best = self._requests[slot.request], self._best[slot.request]
        size, last = self._generator.decode_batch, self._generator.steps(request).stop
        for start in range(0, slot.count, size):
            chunk = np.array(drafts[start : start + size])
            scores: Iterable[float | None] = itertools.repeat(None)
            if request.best_of is not None and self._reranker is not None:
                scores = map(float, self._reranker.score(self._generator.preview(chunk, last), request.caption))
            best += zip(scores, itertools.count(request.seed + slot.first + start), chunk, strict=False)
            if request.best_of is not None:
                best.sort(key=lambda candidate: -(candidate[0] or 0.0))
            del best[request.n :]
        self._seen[slot.request] += slot.count
