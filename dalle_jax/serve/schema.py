"""What a client may ask for: names, types and ranges of parameters, checked before anything is queued.

A parameter that is not in the tables, or has a value that the model can't honour, is refused and never ignored. The
ranges that depend on the model are the pipeline's own (`Pipeline.check`); here are those of OpenAI's Images API and
of JSON. Knows nothing of HTTP.
"""

import dataclasses
import json
import math
import re
import secrets
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from dalle_jax.errors import UserError
from dalle_jax.sample.request import MAX_CAPTION, MAX_SEED, Request
from dalle_jax.serve.refusal import Refusal, invalid

MAX_N = 10  # CreateImageRequest of OpenAI's specification
GENERATION, EDIT = "image_generation", "image_edit"  # first words of the names of streamed events


@dataclasses.dataclass(frozen=True)
class Order:
    """A request that the model can draw, and how its pictures go back to the client.

    kind: GENERATION or EDIT. preview_rows: after how many finished rows a preview is wanted.
    text_tokens, image_tokens: what the model reads, for `usage`.
    """

    request: Request
    kind: str
    as_url: bool
    stream: bool
    preview_rows: frozenset[int]
    text_tokens: int
    image_tokens: int

    @property
    def candidates(self) -> int:
        """Pictures drawn, of which n go back."""
        return self.request.candidates


def shown(value: Any) -> str:
    """A value as an error message quotes it: short, whatever came."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise invalid(name, f"{name} must be an integer, got {shown(value)}", code="invalid_type")
    return value


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise invalid(name, f"{name} must be a number, got {shown(value)}", code="invalid_type")
    if abs(value) > 1e9 or not math.isfinite(value):  # in this order: an integer may be too large for a float
        raise invalid(name, f"{name} must be a finite number of at most 1e9, got {shown(value)}")
    return float(value)


def _boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise invalid(name, f"{name} must be true or false, got {shown(value)}", code="invalid_type")
    return value


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise invalid(name, f"{name} must be a text, got {shown(value)}", code="invalid_type")
    if len(value) > MAX_CAPTION or any("\ud800" <= character <= "\udfff" for character in value):
        raise invalid(name, f"{name} must be Unicode text of at most {MAX_CAPTION} characters")
    return value


def _one_of(*allowed: str) -> Callable[[str, Any], str]:
    def check(name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in allowed:
            words = " or ".join(f"'{word}'" for word in allowed)
            raise invalid(name, f"{name} must be {words} here, got {shown(value)}", code="unsupported_value")
        return value

    return check


# Name -> check of its type. The last three have one meaning here, so only its names are accepted.
_FIELDS: dict[str, Callable[[str, Any], Any]] = {
    "prompt": _text,
    "model": _text,
    "n": _integer,
    "size": _text,
    "response_format": _one_of("url", "b64_json"),
    "user": _text,
    "safety_identifier": _text,
    "stream": _boolean,
    "partial_images": _integer,
    "seed": _integer,
    "best_of": _integer,
    "temperature": _number,
    "top_k": _integer,
    "top_p": _number,
    "guidance": _number,
    "quality": _one_of("auto", "standard"),
    "background": _one_of("auto", "opaque"),
    "output_format": _one_of("png"),
}
_EDIT_FIELDS = {**_FIELDS, "keep_rows": _integer}


def parse_json(data: bytes) -> dict[str, Any]:
    """A JSON object, strictly: UTF-8, no NaN, no key twice, no bottomless nesting.

    Raises:
      Refusal: it is not one.
    """

    def no_constant(word: str):
        raise ValueError(f"{word} is no JSON number")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if len(set(keys)) < len(keys):
            raise ValueError("a key comes twice")
        return dict(pairs)

    try:
        value = json.loads(data.decode("utf-8"), parse_constant=no_constant, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:  # JSONDecodeError, UnicodeDecodeError, an integer of 5000 digits
        raise invalid(None, f"the body must be a JSON object in UTF-8: {error}", code="invalid_json") from error
    if not isinstance(value, dict):
        raise invalid(None, f"the body must be a JSON object, got {shown(value)}", code="invalid_json")
    return value


def parse_form(items: list[tuple[str, str]]) -> dict[str, Any]:
    """The text fields of a form, with those that are numbers or booleans converted; wrong ones stay text and are
    refused by their check.

    Raises:
      Refusal: a field comes twice.
    """
    values: dict[str, Any] = {}
    for name, text in items:
        if name in values:
            raise invalid(shown(name)[1:-1], f"the field {shown(name)} comes twice: send it once")
        check = _EDIT_FIELDS.get(name)
        values[name] = text
        if check is _integer and re.fullmatch(r"-?[0-9]{1,20}", text):
            values[name] = int(text)
        elif check is _number and re.fullmatch(r"-?(?=\.?[0-9])[0-9]{0,20}\.?[0-9]{0,20}([eE][+-]?[0-9]{1,3})?", text):
            values[name] = float(text)
        elif check is _boolean and text in ("true", "false"):
            values[name] = text == "true"
    return values


def generation(values: Mapping[str, Any], *, pipe: Any, model: str) -> Order:
    """The order that a body of /v1/images/generations makes. model: the name of the served model.

    Raises:
      Refusal: something is unknown, of the wrong type or out of range.
    """
    return _order(_checked(values, _FIELDS, model), GENERATION, pipe)


def edit(values: Mapping[str, Any], *, image: np.ndarray, pipe: Any, model: str) -> Order:
    """The same of /v1/images/edits and /v1/images/variations, with the picture to complete, uint8 [H, W, 3]."""
    return _order(_checked(values, _EDIT_FIELDS, model), EDIT, pipe, image)


def _checked(values: Mapping[str, Any], fields: Mapping[str, Callable], model: str) -> dict[str, Any]:
    """The values that are there; null counts as absent, as in OpenAI's specification."""
    unknown = next((name for name in values if name not in fields), None)
    if unknown is not None:
        name = shown(unknown)[1:-1]
        raise invalid(
            name, f"unknown parameter {name!r}: allowed are {', '.join(sorted(fields))}", code="unknown_parameter"
        )
    checked = {name: fields[name](name, value) for name, value in values.items() if value is not None}
    if checked.get("model", model) != model:
        message = f"the model {shown(checked['model'])} is not served here: ask for {model!r} or leave model out"
        raise Refusal(404, message, code="model_not_found", param="model")
    if not checked.get("prompt", "").strip():
        raise invalid("prompt", "prompt is required: say what to draw", code="missing_required_parameter")
    return checked


def _order(values: dict[str, Any], kind: str, pipe: Any, image: np.ndarray | None = None) -> Order:
    layout = pipe.model.config.layout
    stream, as_url = values.get("stream", False), values.get("response_format", "url") == "url"
    side = f"{pipe.image_size}x{pipe.image_size}"
    if values.get("size", "auto") not in (side, "auto"):
        raise invalid("size", f"size must be '{side}', this model's only one, got {shown(values['size'])}")
    n = values.get("n", 1)
    if not 1 <= n <= MAX_N:
        raise invalid("n", f"n must be 1 .. {MAX_N}, got {shown(n)}")
    if "seed" in values and not 0 <= values["seed"] < MAX_SEED:
        raise invalid("seed", f"seed must be 0 .. 2**32 - 1, got {shown(values['seed'])}")
    partial = values.get("partial_images", 0)
    if not 0 <= partial < layout.grid:
        raise invalid("partial_images", f"partial_images must be 0 .. {layout.grid - 1}, got {shown(partial)}")
    if partial and not stream:
        raise invalid("partial_images", "partial_images needs stream: set stream to true or leave it out")
    if stream and values.get("response_format") == "url":
        raise invalid("response_format", "a stream carries pictures as b64_json only: ask for it or leave it out")
    text_tokens = len(pipe.tokenizer.encode(values["prompt"]))
    if text_tokens > layout.caption_len:
        message = f"prompt must be at most {layout.caption_len} tokens for this model, got {text_tokens}: shorten it"
        raise invalid("prompt", message, code="prompt_too_long")
    names = ("best_of", "seed", "temperature", "top_k", "top_p", "guidance", "keep_rows")
    request = Request(
        caption=values["prompt"],
        n=n,
        image=image,
        # Without a seed every call draws something new, and says with which seed.
        **{"seed": secrets.randbelow(2**31)} | {name: values[name] for name in names if name in values},
    )
    try:
        pipe.check(request)
    except UserError as error:
        fault = re.match(r"\w+", str(error))
        param = fault[0] if fault and fault[0] in _EDIT_FIELDS else None
        raise invalid(param, str(error)) from error
    kept = request.rows_kept(layout.grid)
    left = layout.grid - kept
    return Order(
        request=request,
        kind=kind,
        as_url=as_url and not stream,
        stream=stream,
        preview_rows=frozenset(kept + (i + 1) * left // (partial + 1) for i in range(partial)) - {0, layout.grid},
        text_tokens=text_tokens,
        image_tokens=kept * layout.grid,
    )
