"""Responses from drawn images: PNG files, OpenAI's response object, and its stream of server-sent events."""

import asyncio
import base64
import io
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from PIL import Image

from dalle_jax.pictures.picture import Picture
from dalle_jax.sample.pipeline import Pipeline
from dalle_jax.serve.batcher import Batcher, Job
from dalle_jax.serve.errors import ApiError, failed, too_late
from dalle_jax.serve.schema import ImageRequest

HEARTBEAT_SECONDS = 10  # between comments on a silent stream, so that nothing between here and the client gives up


async def encode(images: Sequence[Image.Image]) -> list[bytes]:
    """PNG files, made in a thread beside the event loop; of pictures with caption, seed and settings in them."""

    def png(image: Image.Image) -> bytes:
        file = io.BytesIO()
        image.save(file, "PNG")
        return file.getvalue()

    return await asyncio.to_thread(lambda: [png(image) for image in images])


def usage(image_request: ImageRequest) -> dict[str, Any]:
    """OpenAI's count of tokens read and drawn; it includes the candidates that ranking drops."""
    text, image = image_request.usage.text_tokens, image_request.usage.image_tokens
    drawn = image_request.request.candidates * image_request.usage.drawn_tokens
    return {
        "input_tokens": text + image,
        "input_tokens_details": {"text_tokens": text, "image_tokens": image},
        "output_tokens": drawn,
        "output_tokens_details": {"text_tokens": 0, "image_tokens": drawn},
        "total_tokens": text + image + drawn,
    }


def whole(
    image_request: ImageRequest,
    images: list[Picture],
    files: list[bytes],
    *,
    pipe: Pipeline,
    model: str,
    url_of: Callable[[bytes], str],
) -> dict:
    """The response object of the Images API. url_of: keeps a file and returns its address."""
    data = []
    for image, file in zip(images, files, strict=True):
        where = {"url": url_of(file)} if image_request.as_url else {"b64_json": base64.b64encode(file).decode()}
        data.append({**where, "seed": image.seed, "score": image.score})
    return {
        "created": int(time.time()),
        "data": data,
        **_format(pipe),
        "model": model,
        "candidates": image_request.request.candidates,
        "usage": usage(image_request),
    }


async def events(job: Job, batcher: Batcher) -> AsyncIterator[str]:
    """The stream of one job. Whoever stops reading it cancels the job.

    `index` says which image an event is about. A stream that failed ends with OpenAI's error object.
    """
    image_request, pipe, sent = job.image_request, batcher.pipe, 0
    try:
        while True:
            while job.previews:
                preview, images = job.previews.popleft()
                progress = {"partial_image_index": sent, "rows": preview.step, "grid": preview.steps}
                for index, file in enumerate(await encode(images)):
                    yield _event(image_request, "partial_image", file, pipe, index=index, **progress)
                sent += 1
            if job.done.done():
                break
            left = job.deadline - time.monotonic()
            if left <= 0:
                raise too_late()
            try:
                async with asyncio.timeout(min(left, HEARTBEAT_SECONDS)):
                    await job.news.wait()
            except TimeoutError:
                yield ": waiting\n\n"
            job.news.clear()
        if (finished := job.done.result()) is None:
            raise failed()  # the drawing thread has logged why
        tokens = usage(image_request)
        for index, (image, file) in enumerate(zip(finished, await encode(finished), strict=True)):
            extra = {"index": index, "seed": image.seed, "score": image.score, "usage": tokens}
            yield _event(image_request, "completed", file, pipe, **extra)
    except Exception as error:
        answer = error if isinstance(error, ApiError) else failed()
        batcher.metrics.rejected.labels(answer.code).inc()
        yield _frame("error", {"type": "error", **answer.body()})
    finally:
        batcher.cancel(job)


def _format(pipe: Pipeline) -> dict[str, str]:
    size = f"{pipe.image_size}x{pipe.image_size}"
    return {"size": size, "output_format": "png", "background": "opaque", "quality": "auto"}


def _event(image_request: ImageRequest, kind: str, file: bytes, pipe: Pipeline, **more: Any) -> str:
    name = f"{image_request.kind}.{kind}"
    body = {"type": name, "b64_json": base64.b64encode(file).decode(), "created_at": int(time.time()), **_format(pipe)}
    return _frame(name, body | more)


def _frame(name: str, body: dict) -> str:
    return f"event: {name}\ndata: {json.dumps(body)}\n\n"
