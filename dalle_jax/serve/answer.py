"""From drawn pictures to what goes back: PNG, OpenAI's response object, and its stream of server-sent events."""

import asyncio
import base64
import io
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from PIL import Image

from dalle_jax.serve.batcher import Job
from dalle_jax.serve.refusal import Refusal
from dalle_jax.serve.schema import Order

HEARTBEAT_SECONDS = 10  # a comment on a silent stream, so that nothing between here and the client gives up


def png(picture: Image.Image) -> bytes:
    """The file; a finished picture carries caption, seed and settings in it."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


async def encode(pictures: list[Image.Image]) -> list[bytes]:
    """PNG files, made beside the event loop."""
    return await asyncio.to_thread(lambda: [png(picture) for picture in pictures])


def usage(order: Order, grid: int) -> dict[str, Any]:
    """Tokens read and drawn; every candidate counts, those that ranking drops too."""
    read, drawn = order.text_tokens + order.image_tokens, order.candidates * (grid * grid - order.image_tokens)
    return {
        "input_tokens": read,
        "input_tokens_details": {"text_tokens": order.text_tokens, "image_tokens": order.image_tokens},
        "output_tokens": drawn,
        "output_tokens_details": {"text_tokens": 0, "image_tokens": drawn},
        "total_tokens": read + drawn,
    }


def whole(
    order: Order, pictures: list[Image.Image], files: list[bytes], *, pipe: Any, model: str, url_of: Callable
) -> dict:
    """The response object of the Images API. url_of: keeps a file and returns its address."""
    data = []
    for picture, file in zip(pictures, files, strict=True):
        where = {"url": url_of(file)} if order.as_url else {"b64_json": base64.b64encode(file).decode()}
        data.append({**where, "seed": picture.seed, "score": picture.score})
    return {
        "created": int(time.time()),
        "data": data,
        **_look(pipe),
        "model": model,
        "candidates": order.candidates,
        "usage": usage(order, pipe.model.config.layout.grid),
    }


async def events(
    job: Job, *, pipe: Any, cancel: Callable[[Job], None], count: Callable[[str], None]
) -> AsyncIterator[str]:
    """The stream of one job. Whoever stops reading it cancels the job.

    Every picture has events of its own, `index` tells them apart; the last event of a stream that failed has OpenAI's
    error object, and its code goes to `count`.
    """
    order, grid, sent = job.order, pipe.model.config.layout.grid, 0
    try:
        while True:
            while job.previews:
                rows, pictures = job.previews.popleft()
                for index, file in enumerate(await encode(pictures)):
                    more = {"index": index, "partial_image_index": sent, "rows": rows, "grid": grid}
                    yield _event(order, "partial_image", file, pipe, **more)
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
        pictures = job.done.result()
        tokens = usage(order, grid)
        for index, (picture, file) in enumerate(zip(pictures, await encode(pictures), strict=True)):
            extra = {"index": index, "seed": picture.seed, "score": picture.score, "usage": tokens}
            yield _event(order, "completed", file, pipe, **extra)
    except Exception as error:
        refusal = error if isinstance(error, Refusal) else failed()  # the drawing thread has logged why
        count(refusal.code)
        yield _frame("error", {"type": "error", **refusal.body()})
    finally:
        cancel(job)


def too_late() -> Refusal:
    """Its header keeps OpenAI's clients from asking twice more for what takes too long."""
    message = "the pictures were not finished within this server's deadline"
    return Refusal(504, message, code="deadline_exceeded", headers={"X-Should-Retry": "false"})


def failed() -> Refusal:
    return Refusal(500, "the pictures could not be drawn; the server's log says why", code="draw_failed")


def _look(pipe: Any) -> dict[str, str]:
    side = pipe.image_size
    return {"size": f"{side}x{side}", "output_format": "png", "background": "opaque", "quality": "auto"}


def _event(order: Order, word: str, file: bytes, pipe: Any, **more: Any) -> str:
    name = f"{order.kind}.{word}"
    body = {"type": name, "b64_json": base64.b64encode(file).decode(), "created_at": int(time.time()), **_look(pipe)}
    return _frame(name, body | more)


def _frame(name: str, body: dict) -> str:
    return f"event: {name}\ndata: {json.dumps(body)}\n\n"
