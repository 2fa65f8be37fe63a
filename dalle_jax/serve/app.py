"""The HTTP server: OpenAI's Images API over one pipeline, health, metrics, and a page for people.

Routes only: `schema` knows what may be asked, `batcher` draws, `answer` writes what goes back, `gate` stands before
all of it.
"""

import asyncio
import contextlib
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
from dalle_jax.errors import UserError
from dalle_jax.sample.request import Request as DrawRequest
from dalle_jax.serve import answer, body, metrics, page, schema, upload
from dalle_jax.serve.batcher import READY, Batcher
from dalle_jax.serve.gate import FILES, Gate
from dalle_jax.serve.refusal import Refusal, invalid
from dalle_jax.serve.store import PictureStore

_CODES = {404: "not_found", 405: "method_not_allowed"}


class _Api:
    """The endpoints. model: the name that clients know the served model by."""

    def __init__(self, batcher: Batcher, *, model: str):
        self._batcher, self._model = batcher, model
        self._store = PictureStore()
        self._created = int(time.time())

    async def generations(self, request: Request) -> Response:
        values = await body.read_json(request)
        order = schema.generation(values, pipe=self._batcher.pipe, model=self._model)
        return await self._answer(request, order)

    async def edits(self, request: Request) -> Response:
        """Completion: the rows that the mask or `keep_rows` keeps (half, if neither says), the others drawn anew."""
        values, files = await body.read_form(request)
        pipe = self._batcher.pipe
        order = await asyncio.to_thread(_edit, values, files, pipe=pipe, model=self._model, masked=True)
        return await self._answer(request, order)

    async def variations(self, request: Request) -> Response:
        """The same without a mask. The model draws from captions, so a variation needs its prompt too."""
        values, files = await body.read_form(request)
        if "mask" in files:
            raise invalid("mask", "a variation has no mask: use /v1/images/edits", code="unknown_parameter")
        if not values.get("prompt"):
            message = "this model draws from captions: send the picture's as prompt; the upper half of its rows is kept"
            raise invalid("prompt", message, code="missing_required_parameter")
        pipe = self._batcher.pipe
        order = await asyncio.to_thread(_edit, values, files, pipe=pipe, model=self._model, masked=False)
        return await self._answer(request, order)

    async def picture(self, request: Request) -> Response:
        png = self._store.get(request.path_params["name"].removesuffix(".png"))
        if png is None:
            raise Refusal(404, "there is no such picture, or its hour is over", code="not_found")
        # As at OpenAI, whoever has the address may show the picture, on a page of another site too.
        headers = {"Cache-Control": "private, max-age=3600", "Cross-Origin-Resource-Policy": "cross-origin"}
        return Response(png, media_type="image/png", headers=headers)

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._description()]})

    async def model(self, request: Request) -> Response:
        if request.path_params["name"] != self._model:
            message = f"the model is not served here: {self._model!r} is"
            raise Refusal(404, message, code="model_not_found", param="model")
        return JSONResponse(self._description())

    async def health(self, request: Request) -> Response:
        state = self._batcher.state
        return JSONResponse({"status": state}, status_code=200 if state == READY else 503)

    async def metrics(self, request: Request) -> Response:
        return Response(self._batcher.metrics.text(), headers={"Content-Type": metrics.CONTENT_TYPE})

    async def index(self, request: Request) -> Response:
        headers = {"Content-Security-Policy": page.policy(), "Cache-Control": "no-cache"}
        return Response(page.html(), media_type="text/html", headers=headers)

    async def _answer(self, request: Request, order: schema.Order) -> Response:
        job, pipe = self._batcher.submit(order), self._batcher.pipe
        if order.stream:
            rejected = self._batcher.metrics.rejected
            stream = answer.events(
                job, pipe=pipe, cancel=self._batcher.cancel, count=lambda code: rejected.labels(code).inc()
            )
            headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
            return StreamingResponse(stream, media_type="text/event-stream", headers=headers)
        pictures = await self._wait(request, job)
        files = await answer.encode(pictures)
        made = answer.whole(order, pictures, files, pipe=pipe, model=self._model,
                            url_of=functools.partial(self._url, request))  # fmt: skip
        return JSONResponse(made, headers={"Cache-Control": "no-store"})

    async def _wait(self, request: Request, job: Any) -> list:
        """The pictures of a job; cancels it when the client goes away or the deadline passes."""
        gone = asyncio.ensure_future(body.gone(request))
        try:
            left = job.deadline - time.monotonic()
            await asyncio.wait({job.done, gone}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if not job.done.done():
                raise ClientDisconnect if gone.done() else answer.too_late()
            if job.done.exception() is not None:
                raise answer.failed()  # the drawing thread has logged why
            return job.done.result()
        finally:
            gone.cancel()
            self._batcher.cancel(job)

    def _url(self, request: Request, png: bytes) -> str:
        return f"{request.url.scheme}://{request.headers.get('host', '')}{FILES}{self._store.add(png)}.png"

    def _description(self) -> dict:
        """OpenAI's model object, and what a client can't guess of this one."""
        pipe = self._batcher.pipe

        def possible(**settings: Any) -> bool:
            with contextlib.suppress(UserError):
                pipe.check(DrawRequest("", **settings))
                return True
            return False

        return {
            "id": self._model,
            "object": "model",
            "created": self._created,
            "owned_by": "dalle-jax",
            "digest": pipe.digest,
            "image_size": pipe.image_size,
            "grid": pipe.model.config.layout.grid,
            "image_vocab": pipe.model.config.layout.image_vocab,
            "caption_tokens": pipe.model.config.layout.caption_len,
            "max_candidates": pipe.max_candidates,
            "ranking": possible(best_of=1),
            "guidance": possible(guidance=2.0),
        }


def _edit(values: dict, files: dict[str, bytes], *, pipe: Any, model: str, masked: bool) -> schema.Order:
    """The order of a form: decodes its pictures, so it does not run on the event loop.

    masked: the transparency of a picture without a mask is its mask, as at OpenAI.
    """
    if "image" not in files:
        raise invalid("image", "image is required: send the picture as a file", code="missing_required_parameter")
    image = upload.read_picture(files["image"], param="image")
    grid = pipe.model.config.layout.grid
    mask, param = None, "mask"
    if "mask" in files:
        mask = upload.read_picture(files["mask"], param="mask")
    elif masked and image.mode == "RGBA" and values.get("keep_rows") is None and image.getextrema()[3][0] < 255:
        mask, param = image, "image"
    if mask is not None:
        kept = upload.kept_rows(mask, size=image.size, grid=grid, param=param)
        if values.get("keep_rows") not in (None, kept):
            raise invalid("keep_rows", f"keep_rows must be {kept}, which the mask says, or left out")
        values = {**values, "keep_rows": kept}
    # At the model's size already here, as `Pipeline.encode` would make it: a full queue stays small.
    pixels = center_crop(to_pixels(image), pipe.image_size)
    return schema.edit(values, image=pixels, pipe=pipe, model=model)


def build_app(batcher: Batcher, *, model: str, token: str | None = None) -> Starlette:
    """The ASGI application; its lifespan starts the batcher, and closes it when everything is drawn."""
    api = _Api(batcher, model=model)
    rejected = batcher.metrics.rejected

    async def refuse(request: Request, refusal: Refusal) -> Response:
        rejected.labels(refusal.code).inc()
        return refusal.response()

    async def refuse_http(request: Request, error: HTTPException) -> Response:
        code = _CODES.get(error.status_code, "invalid_request")
        place = f"{request.method} {schema.shown(request.scope['path'])}"
        detail = error.detail if error.status_code == 400 else f"{error.detail}: {place}"
        rejected.labels(code).inc()
        return Refusal(error.status_code, detail, code=code, headers=error.headers).response()

    async def left(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=400)  # nobody reads it

    async def defect(request: Request, error: Exception) -> Response:
        return answer.failed().response()

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette):
        batcher.start()
        yield
        await asyncio.to_thread(batcher.close)

    app = Starlette(
        routes=[
            Route("/", api.index),
            Route("/health", api.health),
            Route("/metrics", api.metrics),
            Route("/v1/models", api.models),
            Route("/v1/models/{name:path}", api.model),
            Route("/v1/images/generations", api.generations, methods=["POST"]),
            Route("/v1/images/edits", api.edits, methods=["POST"]),
            Route("/v1/images/variations", api.variations, methods=["POST"]),
            Route(FILES + "{name}", api.picture),
        ],
        middleware=[Middleware(Gate, token=token, metrics=batcher.metrics)],
        exception_handlers={
            Refusal: refuse,
            HTTPException: refuse_http,
            ClientDisconnect: left,
            Exception: defect,
        },
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False  # a path has one spelling
    return app
