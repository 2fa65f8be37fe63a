"""Bodies of requests, read within bounds of size and time; and whether the client is still there."""

import asyncio
from collections.abc import Coroutine
from typing import Any

from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.requests import Request

from dalle_jax.serve import schema
from dalle_jax.serve.errors import ApiError, invalid

MAX_JSON_BYTES = 256 * 2**10
MAX_FORM_BYTES = 8 * 2**20  # an image and its mask; OpenAI takes 4 MB each
MAX_FIELDS = 64
MAX_SECONDS = 30  # for a body to arrive


async def read_json(request: Request) -> dict[str, Any]:
    """The JSON object of a request.

    Raises:
      ApiError: 400, 408, 413 or 415.
    """
    _expect(request, "application/json")
    return schema.parse_json(await _in_time(_bounded(request, MAX_JSON_BYTES).body()))


async def read_form(request: Request) -> tuple[list[tuple[str, str]], dict[str, bytes]]:
    """The text fields of a multipart form, and the bytes of its files `image` and `mask`.

    Raises:
      ApiError: 400, 408, 413 or 415.
    """
    _expect(request, "multipart/form-data")
    fields, files = [], {}
    bounded = _bounded(request, MAX_FORM_BYTES)
    try:
        form = await _in_time(bounded.form(max_files=4, max_fields=MAX_FIELDS, max_part_size=MAX_JSON_BYTES))
    except (ValueError, LookupError) as error:  # the parser lets some strange charsets and headers through to Python
        raise invalid(
            None, "the body must be a multipart form: this one cannot be read", code="invalid_form"
        ) from error
    try:
        for name, value in form.multi_items():
            name = "image" if name == "image[]" else name  # how OpenAI's client sends a list of one
            if not isinstance(value, UploadFile):
                if name in ("image", "mask"):
                    raise invalid(name, f"{name} must be sent as a file: give its part a filename", code="invalid_type")
                fields.append((name, value))
                continue
            if name not in ("image", "mask") or name in files:
                word = schema.shorten(name)[1:-1]
                raise invalid(word, f"expected one file 'image' and at most one 'mask', got a second or other: {word}")
            files[name] = await value.read()
    finally:
        await form.close()
    return fields, files


async def disconnected(request: Request) -> None:
    """Return when the client has closed the connection; the body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _expect(request: Request, media_type: str) -> None:
    if query := request.scope["query_string"]:
        message = f"parameters belong in the body, got some in the address: {schema.shorten(query.decode('latin-1'))}"
        raise invalid(None, message, code="unknown_parameter")
    sent, _ = parse_options_header(request.headers.get("content-type"))
    if sent.decode("latin-1").lower() != media_type:
        message = f"the content type must be {media_type}, got {schema.shorten(sent.decode('latin-1'))}"
        raise ApiError(415, message, code="unsupported_media_type")


def _bounded(request: Request, limit: int) -> Request:
    """The same request, whose body raises an `ApiError` as soon as it is longer than `limit` bytes."""
    too_large = ApiError(413, f"the body must be at most {limit} bytes", code="body_too_large")
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced[:20]) > limit:
        raise too_large
    total = 0

    async def receive():
        nonlocal total
        message = await request.receive()
        total += len(message.get("body", b""))
        if total > limit:
            raise too_large
        return message

    return Request(request.scope, receive)


async def _in_time(reading: Coroutine | Any) -> Any:
    try:
        async with asyncio.timeout(MAX_SECONDS):
            return await reading
    except TimeoutError as error:
        raise ApiError(408, f"the body did not arrive within {MAX_SECONDS} s", code="body_too_slow") from error
