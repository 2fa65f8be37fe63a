"""The page at `/`: one HTML file, and the policy that lets a browser run its style and script and nothing else."""

import base64
import functools
import hashlib
import pathlib
import re

_FILE = pathlib.Path(__file__).with_name("page.html")


@functools.cache
def html() -> str:
    """The page with its styles and script."""
    return _FILE.read_text(encoding="utf-8")


@functools.cache
def policy() -> str:
    """Content-Security-Policy: the page's style and script by their hashes, images it was sent, this server."""
    styles, scripts = (_hashes(tag) for tag in ("style", "script"))
    return (
        f"default-src 'none'; style-src {styles}; script-src {scripts}; img-src 'self' data: blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _hashes(tag: str) -> str:
    blocks = re.findall(rf"<{tag}>(.*?)</{tag}>", html(), re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(block.encode()).digest()).decode() for block in blocks]
    return " ".join(f"'sha256-{digest}'" for digest in digests)
