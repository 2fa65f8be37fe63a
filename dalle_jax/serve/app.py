"""The HTTP server: OpenAI's Images API over one pipeline, health, metrics, and a page for people.

Routes only: `schema` knows what may be asked, `batcher` draws, `responses` writes what goes back, and `middleware`
checks every request first.
"""

import asyncio
import contextlib
import dataclasses
import functools
import time
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from dalle_jax.data.decode import to_pixels
from dalle_jax.data.transforms import center_crop
from dalle_jax.pictures.picture import Picture
from dalle_jax.sample.pipeline import Pipeline
from dalle_jax.sample.request import MAX_CANDIDATES
from dalle_jax.serve import metrics, page, parsing, responses, schema, uploads
from dalle_jax.serve.batcher import READY, Batcher, Job
from dalle_jax.serve.errors import ApiError, failed, invalid, too_late
from dalle_jax.serve.image_store import ImageStore
from dalle_jax.serve.middleware import FILES, HEALTH, Guard

_CODES = {404: "not_found", 405: "method_not_allowed"}


class _Api:
    """The endpoints. model: the name that clients know the served model by."""

    def __init__(self, batcher: Batcher, *, model: str):
        self._batcher, self._model = batcher, model
        self._store = ImageStore()
        self._created = int(time.time())

    async def generations(self, request: Request) -> Response:
        values = await parsing.read_json(request)
        pipe = self._batcher.pipe
        image_request = schema.parse(values, kind=schema.GENERATION, pipe=pipe, model=self._model)
        return await self._answer(request, image_request)

    async def edits(self, request: Request) -> Response:
        """Completion: the rows that the mask or `keep_rows` keeps, by default the model's; the others are drawn."""
        fields, files = await parsing.read_form(request)
        return await self._complete(request, fields, files, masked=True)

    async def variations(self, request: Request) -> Response:
        """The same without a mask. The model draws from captions, so a variation needs its prompt too."""
        fields, files = await parsing.read_form(request)
        if "mask" in files:
            raise invalid("mask", "a variation has no mask: use /v1/images/edits", code="unknown_parameter")
        if not dict(fields).get("prompt"):
            message = "this model draws from captions: send the image's as prompt; its upper rows are kept"
            raise invalid("prompt", message, code="missing_required_parameter")
        return await self._complete(request, fields, files, masked=False)

    async def picture(self, request: Request) -> Response:
        png = self._store.get(request.path_params["name"].removesuffix(".png"))
        if png is None:
            raise ApiError(404, "there is no such image, or its hour is over", code="not_found")
        # As at OpenAI, whoever has the address may show the image, on a page of another site too.
        headers = {"Cache-Control": "private, max-age=3600", "Cross-Origin-Resource-Policy": "cross-origin"}
        return Response(png, media_type="image/png", headers=headers)

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._description()]})

    async def model(self, request: Request) -> Response:
        if request.path_params["name"] != self._model:
            message = f"the model is not served here: {self._model!r} is"
            raise ApiError(404, message, code="model_not_found", param="model")
        return JSONResponse(self._description())

    async def health(self, request: Request) -> Response:
        state = self._batcher.state
        return JSONResponse({"status": state}, status_code=200 if state == READY else 503)

    async def metrics(self, request: Request) -> Response:
        return Response(self._batcher.metrics.text(), headers={"Content-Type": metrics.CONTENT_TYPE})

    async def index(self, request: Request) -> Response:
        headers = {"Content-Security-Policy": page.policy(), "Cache-Control": "no-cache"}
        return Response(page.html(), media_type="text/html", headers=headers)

    async def _complete(self, request: Request, fields, files, *, masked: bool) -> Response:
        made = functools.partial(_edit, pipe=self._batcher.pipe, model=self._model, masked=masked)
        return await self._answer(request, await asyncio.to_thread(made, fields, files))  # it decodes images

    async def _answer(self, request: Request, image_request: schema.ImageRequest) -> Response:
        job, pipe = self._batcher.submit(image_request), self._batcher.pipe
        if image_request.stream:
            headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
            events = responses.events(job, self._batcher)
            return StreamingResponse(events, media_type="text/event-stream", headers=headers)
        images = await self._wait(request, job)
        files = await responses.encode(images)

        def url_of(png: bytes) -> str:
            return f"{request.url.scheme}://{request.headers.get('host', '')}{FILES}{self._store.add(png)}.png"

        made = responses.whole(image_request, images, files, pipe=pipe, model=self._model, url_of=url_of)
        return JSONResponse(made, headers={"Cache-Control": "no-store"})

    async def _wait(self, request: Request, job: Job) -> list[Picture]:
        """The images of a job; cancels it when the client goes away or the deadline passes."""
        gone = asyncio.ensure_future(parsing.disconnected(request))
        try:
            left = job.deadline - time.monotonic()
            either: set[asyncio.Future] = {job.done, gone}
            await asyncio.wait(either, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if not job.done.done():
                raise ClientDisconnect if gone.done() else too_late()
            if (images := job.done.result()) is None:
                raise failed()  # the drawing thread has logged why
            return images
        finally:
            gone.cancel()
            self._batcher.cancel(job)

    def _description(self) -> dict:
        """OpenAI's model object, with what a client cannot guess of this model."""
        pipe = self._batcher.pipe
        return {
            "id": self._model,
            "object": "model",
            "created": self._created,
            "owned_by": "dalle-jax",
            "digest": pipe.digest,
            "image_size": pipe.image_size,
            **pipe.generator.describe(),
            "steps": pipe.generator.steps(schema.PLAIN).stop,
            "max_candidates": MAX_CANDIDATES,
            "ranking": pipe.can_draw(schema.RANKED),
            "guidance": pipe.can_draw(schema.GUIDED),
            "options": [dataclasses.asdict(option) | {"kind": option.kind.__name__} for option in schema.options(pipe)],
        }


def _edit(
    fields: list[tuple[str, str]], files: dict[str, bytes], *, pipe: Pipeline, model: str, masked: bool
) -> schema.ImageRequest:
    """The image request of a form.

    masked: the transparency of an image without a mask is its mask, as at OpenAI.
    """
    if "image" not in files:
        raise invalid("image", "image is required: send the image as a file", code="missing_required_parameter")
    known = schema.fields(pipe, schema.EDIT)
    values, rows = schema.parse_form(fields, known), pipe.generator.describe().get("grid")
    if "keep_rows" not in known or rows is None:
        raise invalid("image", "this model draws from captions only: ask for a generation", code="unknown_parameter")
    image = uploads.read_image(files["image"], param="image")
    mask, param = None, "mask"
    if "mask" in files:
        mask = uploads.read_image(files["mask"], param="mask")
    elif (
        masked
        and image.mode == "RGBA"
        and values.get("keep_rows") is None
        and image.getchannel("A").tobytes().strip(b"\xff")
    ):
        mask, param = image, "image"
    if mask is not None:
        kept = uploads.kept_rows(mask, size=image.size, grid=rows, param=param)
        if values.get("keep_rows") not in (None, kept):
            raise invalid("keep_rows", f"keep_rows must be {kept}, which the mask says, or left out")
        values = {**values, "keep_rows": kept}
    # Brought to the model's size already here, as the generator would do it: a full queue stays small.
    pixels = center_crop(to_pixels(image), pipe.image_size)
    return schema.parse(values, kind=schema.EDIT, pipe=pipe, model=model, image=pixels)


def build_app(batcher: Batcher, *, model: str, token: str | None = None) -> Starlette:
    """The ASGI application; its lifespan starts the batcher, and closes it when everything is drawn."""
    api = _Api(batcher, model=model)
    rejected = batcher.metrics.rejected

    async def on_error(request: Request, error: HTTPException) -> Response:
        if not isinstance(error, ApiError):  # of Starlette
            code = _CODES.get(error.status_code, "invalid_request")
            where = f"{request.method} {schema.shorten(request.scope['path'])}"
            detail = error.detail if error.status_code == 400 else f"{error.detail}: {where}"
            error = ApiError(error.status_code, detail, code=code, headers=error.headers)
        rejected.labels(error.code).inc()
        return error.response()

    async def on_disconnect(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=400)  # nobody reads it

    async def on_defect(request: Request, error: Exception) -> Response:
        return failed().response()

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette):
        batcher.start()
        yield
        await asyncio.to_thread(batcher.close)

    handlers: dict[Any, Any] = {
        HTTPException: on_error,
        ClientDisconnect: on_disconnect,
        Exception: on_defect,
    }
    app = Starlette(
        routes=[
            Route("/", api.index),
            Route(HEALTH, api.health),
            Route("/metrics", api.metrics),
            Route("/v1/models", api.models),
            Route("/v1/models/{name:path}", api.model),
            Route("/v1/images/generations", api.generations, methods=["POST"]),
            Route("/v1/images/edits", api.edits, methods=["POST"]),
            Route("/v1/images/variations", api.variations, methods=["POST"]),
            Route(FILES + "{name}", api.picture),
        ],
        middleware=[Middleware(Guard, token=token, metrics=batcher.metrics)],
        exception_handlers=handlers,
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False  # a path has one spelling
    return app
