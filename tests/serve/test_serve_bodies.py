"""`dalle-jax serve` and bodies that are no requests: refused in one shape, never a 500, and it goes on drawing."""

import http.client
import socket
import struct
import zlib

import numpy as np
import pytest

from dalle_jax.serve import parsing, schema
from tests.support.stand_in_server import EDITS, GENERATIONS, JSON, SIDE, NoisePipeline, form, png_of, post, serving


@pytest.fixture(scope="module")
def robust():
    """A server for requests that must not hurt it: the test fails if it does not draw afterwards."""
    with serving(NoisePipeline()) as server:
        yield server


BODIES = {
    "empty": b"",
    "cut": b'{"prompt": "a star"',
    "no object": b'["a star"]',
    "null": b"null",
    "no utf-8": b'{"prompt": "\xff\xfe"}',
    "utf-16": '{"prompt": "a star"}'.encode("utf-16"),
    "deep": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"a":' * 40_000,
    "nan": b'{"prompt": "a star", "temperature": NaN}',
    "infinity": b'{"prompt": "a star", "temperature": -Infinity}',
    "huge float": b'{"prompt": "a star", "temperature": 1e999}',
    "huge integer": b'{"prompt": "a star", "seed": ' + b"9" * 4000 + b"}",
    "huger integer": b'{"prompt": "a star", "seed": ' + b"9" * 40_000 + b"}",
    "huge integer as a number": b'{"prompt": "a star", "temperature": ' + b"9" * 4000 + b"}",
    "twice": b'{"prompt": "a star", "prompt": "a cross"}',
    "half a surrogate": b'{"prompt": "a star \\ud800"}',
    "half a surrogate as a name": b'{"prompt": "a star", "\\udfff": 1}',
    "long prompt": b'{"prompt": "' + b"a" * 40_000 + b'"}',
    "number as prompt": b'{"prompt": 3}',
    "list as n": b'{"prompt": "a star", "n": [1]}',
    "object as model": b'{"prompt": "a star", "model": {"a": 1}}',
    "negative n": b'{"prompt": "a star", "n": -1}',
    "text as stream": b'{"prompt": "a star", "stream": "yes"}',
    "null prompt": b'{"prompt": null}',
}


def png(width=SIDE, height=SIDE, *, noise=False):
    return png_of(np.random.default_rng(0).integers(256 if noise else 1, size=(height, width, 3), dtype=np.uint8))


def bomb():
    """A PNG of some bytes that says it is 60,000 pixels wide and high."""
    head = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head)) + png()[33:]


PROMPT, IMAGE = (b'name="prompt"', b"a star"), b'name="image"; filename="i.png"'
FORMS = {
    "nothing": form(),
    "no image": form(PROMPT),
    "no picture": form(PROMPT, (IMAGE, b"hello")),
    "cut picture": form(PROMPT, (IMAGE, png(noise=True)[:400])),
    "bomb": form(PROMPT, (IMAGE, bomb())),
    "not square": form(PROMPT, (IMAGE, png(16, 8))),
    "two images": form(PROMPT, (IMAGE, png()), (IMAGE, png())),
    "image as text": form(PROMPT, (b'name="image"', b"abc")),
    "other file": form(PROMPT, (IMAGE, png()), (b'name="video"; filename="v"', b"abc")),
    "mask of another size": form(PROMPT, (IMAGE, png()), (b'name="mask"; filename="m.png"', png(32, 32))),
    "field twice": form(PROMPT, PROMPT, (IMAGE, png())),
    "many fields": form(*[(b'name="f%d"' % i, b"") for i in range(100)]),
    "text as n": form(PROMPT, (IMAGE, png()), (b'name="n"', b"two")),
    "nan": form(PROMPT, (IMAGE, png()), (b'name="temperature"', b"nan")),
    "no such row": form(PROMPT, (IMAGE, png()), (b'name="keep_rows"', b"99")),
    "no name": form((b"a=b", b"x")),
    "charset that is none": (form(PROMPT)[0], {"Content-Type": "multipart/form-data; boundary=b; charset=undefined"}),
    "charset of bytes": (form(PROMPT)[0], {"Content-Type": "multipart/form-data; boundary=b; charset=hex"}),
    "many headers": form((b"x: y\r\n" * 5000 + b'name="prompt"', b"a star")),
    "no boundary": (form(PROMPT)[0], {"Content-Type": "multipart/form-data"}),
    "another boundary": form(PROMPT, (IMAGE, png()), boundary="c"),
    "half": (form(PROMPT, (IMAGE, png()))[0][:90], form()[1]),
}


GOOD = [(GENERATIONS, b'{"prompt": "a star"}', JSON), (EDITS, *form(PROMPT, (IMAGE, png())))]
BAD = {name: (GENERATIONS, body, JSON) for name, body in BODIES.items()}
BAD |= {f"form: {name}": (EDITS, *body) for name, body in FORMS.items()}


def is_refusal(answer):
    return set(answer["error"]) == {"message", "type", "param", "code"} and len(answer["error"]["message"]) < 500


@pytest.mark.parametrize("case", BAD)
def test_malformed_bodies_get_400(robust, case):
    path, content, headers = BAD[case]
    status, _, refusal = post(robust, content, path, headers)
    assert status == 400 and is_refusal(refusal)
    for path, content, headers in GOOD:
        assert post(robust, content, f"{path}?", headers)[0] == 200


def test_fields_of_a_form_are_the_numbers_that_they_look_like():
    known = schema.fields(NoisePipeline(), schema.EDIT)
    for text, value in (("1", 1.0), (".5", 0.5), ("5.", 5.0), ("-2.5e-3", -0.0025)):
        assert schema.parse_form([("temperature", text)], known) == {"temperature": value}
    for text in ("", ".", "-", "e5", "+1", "1_0", "0x1", "nan", "inf", " 1", "\u0661", "1" * 41):
        assert schema.parse_form([("temperature", text)], known) == {"temperature": text}  # which its check refuses
    fields = [("n", "2"), ("seed", "1.0"), ("stream", "true"), ("prompt", "3")]
    assert schema.parse_form(fields, known) == {"n": 2, "seed": "1.0", "stream": True, "prompt": "3"}


def test_wrong_heads_never_hurt(robust):
    rng, data = np.random.default_rng(0), b'{"prompt": "a star"}'
    head = f"POST {GENERATIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n".encode()
    head += b"Content-Length: %d\r\nConnection: close\r\n\r\n" % len(data)
    statuses = set()  # None: there was nothing that is a request, or the end of the line counts as a client that left
    for _ in range(150):
        wrong = bytearray(head)
        for place in rng.integers(len(wrong), size=rng.integers(1, 4)):
            wrong[place] = rng.integers(256)
        with socket.create_connection(("127.0.0.1", robust.port), timeout=10) as line:
            line.sendall(bytes(wrong) + data)
            line.shutdown(socket.SHUT_WR)
            answer = line.recv(1000)
        statuses.add(int(answer.split(b" ", 2)[1]) if answer else None)
    assert {400, 404} < statuses and all(status is None or 400 <= status < 500 for status in statuses), statuses
    assert post(robust, {"prompt": "a star"})[0] == 200


def test_oversized_bodies_get_413(robust):
    json_limit, form_limit = parsing.MAX_JSON_BYTES, parsing.MAX_FORM_BYTES
    long = b'{"prompt": "' + b"a" * json_limit + b'"}'
    assert post(robust, long)[0] == 413
    big, headers = form(PROMPT, (IMAGE, bytes(form_limit)))
    assert post(robust, big, EDITS, headers)[0] == 413
    for path, kind, data in ((GENERATIONS, JSON, long), (EDITS, headers, big)):  # without announcing a length
        connection = http.client.HTTPConnection("127.0.0.1", robust.port, timeout=30)
        chunks = (data[i : i + 2**16] for i in range(0, len(data), 2**16))
        try:
            connection.request("POST", path, chunks, kind, encode_chunked=True)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the answer came before the end of the body
        assert connection.getresponse().status == 413
        connection.close()


@pytest.mark.parametrize(
    ("path", "method", "headers", "status", "code"),
    [
        (GENERATIONS, "POST", {"Content-Type": "text/plain"}, 415, "unsupported_media_type"),
        (GENERATIONS, "POST", {}, 415, "unsupported_media_type"),
        (GENERATIONS, "POST", {"Content-Type": ";;;"}, 415, "unsupported_media_type"),
        (EDITS, "POST", JSON, 415, "unsupported_media_type"),
        (GENERATIONS, "GET", {}, 405, "method_not_allowed"),
        ("/v1/images", "POST", JSON, 404, "not_found"),
        ("/v1/images/files/..%2f..%2fetc%2fpasswd", "GET", {}, 404, "not_found"),
        ("/v1/models/a/b", "GET", {}, 404, "model_not_found"),
        ("/v1/models", "DELETE", {}, 405, "method_not_allowed"),
        *((path, "POST", {**JSON, "Host": host}, 400, "invalid_host")
          for path in (GENERATIONS, "/v1/models/", "/nowhere/")
          for host in ("[", "[::1", "a b", "a/b", "evil@x", "x:port", "")),
        # Parameters in the address are not ignored.
        *((path + query, "POST", headers, 400, "unknown_parameter")
          for path, _, headers in GOOD for query in ("?n=2", "?%ff&=", "?" + 10 * "n=2&")),
    ],
)  # fmt: skip
def test_wrong_places_types_hosts_and_addresses(robust, path, method, headers, status, code):
    got, _, refusal = post(robust, b'{"prompt": "a star"}', path, headers, method)
    assert (got, refusal["error"]["code"]) == (status, code) and is_refusal(refusal)


def test_a_body_that_does_not_come_is_not_waited_for(robust, monkeypatch):
    monkeypatch.setattr(parsing, "MAX_SECONDS", 0.2)
    with socket.create_connection(("127.0.0.1", robust.port), timeout=10) as line:
        line.sendall(f"POST {GENERATIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                     "Content-Length: 100\r\n\r\n{".encode())  # fmt: skip
        assert b" 408 " in line.recv(1000)
    with socket.create_connection(("127.0.0.1", robust.port), timeout=10) as line:
        line.sendall(b"\x16\x03\x01 this is no HTTP\r\n\r\n")
        assert b" 400 " in line.recv(1000)
    assert post(robust, {"prompt": "a star"})[0] == 200
