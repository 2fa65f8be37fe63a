"""`dalle-jax serve`: a trained transformer over HTTP, with OpenAI's Images API and a page."""

import argparse
import contextlib
import functools
import ipaddress
import logging
import os
import pathlib
import resource
import signal
import socket

import uvicorn

from dalle_jax import signals
from dalle_jax.cli.sample import add_loading_arguments, add_option, load
from dalle_jax.errors import UserError, say
from dalle_jax.sample.request import Option
from dalle_jax.serve.app import build_app
from dalle_jax.serve.batcher import Batcher
from dalle_jax.serve.connection import BACKLOG, Connection
from dalle_jax.serve.middleware import MAX_HEAD_BYTES

TOKEN_VARIABLE = "DALLE_JAX_TOKEN"
MAX_CONNECTIONS = 1000  # if this process may open enough files
NUMBERS = (
    Option("port", int, 8000, "0 takes a free one", min=0, max=65_535),
    Option("max_batch", int, None, "images drawn together", min=1, max=65_536, unset="as many as fit the free memory"),
    Option("batch_wait_ms", float, 20, "how long a request waits for others", min=0, max=10_000),
    Option("queue", int, 64, "requests that may wait", min=1, max=10_000),
    Option("deadline_s", float, 120, "how many seconds a request may take", min=0.001, max=86_400),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_loading_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine)")
    parser.add_argument("--name", help="name of the model for clients (default: the name of DIR)")
    for option in NUMBERS:
        add_option(parser, option)
    parser.add_argument(
        "--token-file",
        type=pathlib.Path,
        metavar="FILE",
        help=f"file with the bearer token that clients must send (default: that of {TOKEN_VARIABLE}, if it is set)",
    )


def main(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT, then finish what was accepted. Returns 0.

    Raises:
      UserError: the model, the token, an address or a number is wrong.
    """
    for option in NUMBERS:
        option.check(getattr(args, option.name), name=option.flag)
    token = read_token(args.token_file)
    name = args.name or pathlib.Path(args.model).resolve().name
    listener = listen(args.host, args.port)
    address = "http://{}:{}".format(f"[{args.host}]" if ":" in args.host else args.host, listener.getsockname()[1])
    if token is None and not _is_loopback(listener):
        say(f"dalle-jax: warning: {address} is open to the network without a token")
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("python_multipart").setLevel(logging.ERROR)  # it warns of every malformed byte
    errors: list[Exception] = []

    def on_ready(error: Exception | None) -> None:
        if error is None:
            with contextlib.suppress(OSError):  # nobody reads the output
                print(f"dalle-jax serves {name} on {address}", *batcher.summary(), sep="\n", flush=True)
        else:
            errors.append(error)
            server.should_exit = True

    batcher = Batcher(
        functools.partial(load, args),
        max_batch=args.max_batch,
        wait_seconds=args.batch_wait_ms / 1000,
        queue=args.queue,
        deadline_seconds=args.deadline_s,
        on_ready=on_ready,
    )
    server = make_server(build_app(batcher, model=name, token=token), deadline_seconds=args.deadline_s)

    def stop(number, frame) -> None:
        server.should_exit = True

    # When uvicorn is done it raises the signal that ended it once more; with this handler that is a clean exit.
    previous = signal.signal(signal.SIGTERM, stop)
    try:
        with signals.finishing("requests that were accepted are answered"):
            server.run(sockets=[listener])
    finally:
        signal.signal(signal.SIGTERM, previous)
    if errors:
        raise errors[0]
    return 0


def make_server(app, *, deadline_seconds: float) -> uvicorn.Server:
    """A uvicorn server with this project's bounds; `run(sockets=[...])` it."""
    config = uvicorn.Config(
        app,
        loop="asyncio",
        http=Connection,
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        limit_concurrency=max_connections() + BACKLOG,  # beyond, it answers 503
        backlog=BACKLOG,
        h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        timeout_keep_alive=15,
        timeout_graceful_shutdown=int(deadline_seconds) + 5,  # no request takes longer than its deadline
    )
    return uvicorn.Server(config)


def max_connections() -> int:
    """Connections that may be open at a time, at most `MAX_CONNECTIONS`.

    Raises this process's limit of open files towards what they need. Without a file left asyncio accepts nothing, and
    logs it thousands of times a second.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = 4 * MAX_CONNECTIONS if hard == resource.RLIM_INFINITY else min(4 * MAX_CONNECTIONS, hard)
    if soft != resource.RLIM_INFINITY and soft < files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    return min(MAX_CONNECTIONS, files // 3)  # the rest for those that were just accepted or are being closed


def listen(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
      UserError: the address is not available.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise UserError(
            f"expected an address to listen on, got {host} port {port} ({error.strerror}): choose another"
        ) from error


def read_token(file: pathlib.Path | None) -> str | None:
    """The token of a file, or of the environment if no file is named, or None.

    Raises:
      UserError: it cannot be read, or is not one word.
    """
    where, token = f"the variable {TOKEN_VARIABLE}", os.environ.get(TOKEN_VARIABLE)
    if file is not None:
        where = str(file)
        try:
            token = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"expected a file with a token, got {file} ({error}): check --token-file") from error
    if token is None:
        return None
    token = token.strip()
    if not token.isascii() or not token.isprintable() or len(token.split()) != 1:
        raise UserError(f"expected one word of ASCII letters as the token in {where}: write it there")
    return token


def _is_loopback(listener: socket.socket) -> bool:
    return ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback
