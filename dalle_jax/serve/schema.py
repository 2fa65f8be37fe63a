"""`ImageRequest`: what a client may ask for, checked before anything is queued.

A parameter that is unknown, or has a value that the model cannot honor, is refused and never ignored. The model's
settings and their bounds come from the options of the pipeline; here are those of OpenAI's Images API and of JSON.
Knows nothing of HTTP.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from dalle_jax.sample.generator import Usage
from dalle_jax.sample.pipeline import Pipeline
from dalle_jax.sample.request import COMMON, MAX_CAPTION, Option, Request, RequestError, is_blank
from dalle_jax.serve.errors import ApiError, invalid

MAX_N = 10  # CreateImageRequest of OpenAI's specification
MAX_NUMBER = 10**12  # beyond the bounds of every parameter
COMMON_NAMES = {option.name for option in COMMON}
PLAIN, RANKED, GUIDED = Request(""), Request("", best_of=1), Request("", guidance=2.0)  # to ask what is possible
GENERATION, EDIT = "image_generation", "image_edit"  # first words of the names of streamed events

Kind = type | tuple[str, ...]  # of a field: str, bool, int, float, or the words that it may be

# OpenAI's parameters. The last three have a single meaning here, so only their names are accepted.
_OPENAI_FIELDS: dict[str, Kind] = {
    "prompt": str,
    "model": str,
    "size": str,
    "response_format": ("url", "b64_json"),
    "user": str,
    "safety_identifier": str,
    "stream": bool,
    "partial_images": int,
    "quality": ("auto", "standard"),
    "background": ("auto", "opaque"),
    "output_format": ("png",),
}
_NOUNS = {str: "a text", bool: "true or false", int: "an integer", float: "a number"}
_IN_FORMS: dict[Kind, tuple[str, Callable[[str], Any]]] = {  # how a form writes the values of a kind
    bool: ("true|false", "true".__eq__),
    int: ("-?[0-9]{1,20}", int),
    float: (r"-?(?=\.?[0-9])[0-9]{0,20}\.?[0-9]{0,20}([eE][+-]?[0-9]{1,3})?", float),
}


@dataclasses.dataclass(frozen=True)
class ImageRequest:
    """A request that the model can draw, and how its images go back to the client.

    kind: GENERATION or EDIT. preview_steps: the steps after which a preview is wanted.
    """

    request: Request
    kind: str
    as_url: bool
    stream: bool
    preview_steps: frozenset[int]
    usage: Usage


def shorten(value: Any) -> str:
    """A value as an error message quotes it: short, whatever it is."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def options(pipe: Pipeline) -> list[Option]:
    """The settings of a request, with the bounds of this server and this model."""
    common = [dataclasses.replace(option, max=MAX_N) if option.name == "n" else option for option in COMMON]
    return [*common, *pipe.generator.options]


def fields(pipe: Pipeline, kind: str) -> dict[str, Kind]:
    """The parameters of an endpoint and what each may be."""
    return _OPENAI_FIELDS | {o.name: o.kind for o in options(pipe) if kind == EDIT or not o.completes}


def parse_json(data: bytes) -> dict[str, Any]:
    """A JSON object, strictly: UTF-8, no NaN, no key twice, no bottomless nesting.

    Raises:
      ApiError: it is not one.
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
        raise invalid(None, f"the body must be a JSON object, got {shorten(value)}", code="invalid_json")
    return value


def parse_form(items: list[tuple[str, str]], known: Mapping[str, Kind]) -> dict[str, Any]:
    """The text fields of a form, with those that are numbers or booleans converted; wrong ones stay text, which is
    refused later.

    Raises:
      ApiError: a field comes twice.
    """
    values: dict[str, Any] = {}
    for name, text in items:
        if name in values:
            raise invalid(shorten(name)[1:-1], f"the field {shorten(name)} comes twice: send it once")
        pattern, convert = _IN_FORMS.get(known.get(name, str), ("", str))
        values[name] = convert(text) if re.fullmatch(pattern, text) else text
    return values


def parse(
    values: Mapping[str, Any], *, kind: str, pipe: Pipeline, model: str, image: np.ndarray | None = None
) -> ImageRequest:
    """The request that the values of a body make. model: the name of the served model. image: the one to complete,
    uint8 [H, W, 3].

    Raises:
      ApiError: something is unknown, of the wrong type or out of range.
    """
    values = _checked(values, fields(pipe, kind), model)
    stream = values.get("stream", False)
    _check_answer(values, pipe, stream=stream)
    chosen = {option: values[option.name] for option in options(pipe) if option.name in values}
    common = {option.name: value for option, value in chosen.items() if option.name in COMMON_NAMES}
    special = {option.name: value for option, value in chosen.items() if option.name not in COMMON_NAMES}
    request = Request(values["prompt"], **common, image=image, options=special)
    try:
        for option, value in chosen.items():
            option.check(value)
        pipe.check(request)
    except RequestError as error:
        raise invalid(error.name if error.name in fields(pipe, EDIT) else None, str(error)) from error
    usage, steps = pipe.generator.usage(request), pipe.generator.steps(request)
    if usage.text_tokens > usage.max_text_tokens:
        message = f"prompt must be at most {usage.max_text_tokens} tokens for this model, got {usage.text_tokens}"
        raise invalid("prompt", f"{message}: shorten it", code="prompt_too_long")
    partial = values.get("partial_images", 0)
    if not 0 <= partial < steps.stop:
        raise invalid("partial_images", f"partial_images must be 0 .. {steps.stop - 1}, got {shorten(partial)}")
    shown = {steps.start + (i + 1) * len(steps) // (partial + 1) for i in range(partial)}
    return ImageRequest(
        request=request,
        kind=kind,
        as_url=values.get("response_format", "url") == "url" and not stream,
        stream=stream,
        preview_steps=frozenset(shown - {0, steps.stop}),
        usage=usage,
    )


def _check(name: str, value: Any, kind: Kind) -> Any:
    """The value as the kind of its field.

    Raises:
      ApiError: it is of another type, or endless.
    """
    if isinstance(kind, tuple):
        if not isinstance(value, str) or value not in kind:
            words = " or ".join(f"'{word}'" for word in kind)
            raise invalid(name, f"{name} must be {words} here, got {shorten(value)}", code="unsupported_value")
        return value
    is_kind = isinstance(value, int | float if kind is float else kind)
    if not is_kind or (isinstance(value, bool) and kind is not bool):
        raise invalid(name, f"{name} must be {_NOUNS[kind]}, got {shorten(value)}", code="invalid_type")
    if isinstance(value, str):
        if len(value) > MAX_CAPTION or any("\ud800" <= character <= "\udfff" for character in value):
            raise invalid(name, f"{name} must be Unicode text of at most {MAX_CAPTION} characters")
    elif not abs(value) <= MAX_NUMBER:  # neither NaN nor an integer too large for a float
        raise invalid(name, f"{name} must be a number of at most {MAX_NUMBER:,}, got {shorten(value)}")
    return kind(value)


def _checked(values: Mapping[str, Any], known: Mapping[str, Kind], model: str) -> dict[str, Any]:
    """The values that are there; null counts as absent, as in OpenAI's specification."""
    unknown = next((name for name in values if name not in known), None)
    if unknown is not None:
        name = shorten(unknown)[1:-1]
        message = f"unknown parameter {name!r}: allowed are {', '.join(sorted(known))}"
        raise invalid(name, message, code="unknown_parameter")
    checked = {name: _check(name, value, known[name]) for name, value in values.items() if value is not None}
    if checked.get("model", model) != model:
        message = f"the model {shorten(checked['model'])} is not served here: ask for {model!r} or leave model out"
        raise ApiError(404, message, code="model_not_found", param="model")
    if is_blank(checked.get("prompt", "")):
        raise invalid("prompt", "prompt is required: say what to draw", code="missing_required_parameter")
    return checked


def _check_answer(values: Mapping[str, Any], pipe: Pipeline, *, stream: bool) -> None:
    """Raises ApiError if the images cannot go back in the way that is asked for."""
    size = f"{pipe.image_size}x{pipe.image_size}"
    if values.get("size", "auto") not in (size, "auto"):
        raise invalid("size", f"size must be '{size}', this model's only one, got {shorten(values['size'])}")
    if values.get("partial_images") and not stream:
        raise invalid("partial_images", "partial_images needs stream: set stream to true or leave it out")
    if stream and values.get("response_format") == "url":
        raise invalid("response_format", "a stream carries images as b64_json only: ask for it or leave it out")
