"""A load of mixed requests on `dalle-jax serve`: none lost, how long they take, how full the batches are.

    python -m benchmarks.reliability.serve DIR

Starts the server on a free port of 127.0.0.1 with its default settings, and sends every request from one of as many
clients as asked for, each of which sends its next when its last is answered. Requests mix captions, 1 to 4 pictures,
ranking and guidance (where the model can), temperature, top-k, completion of a picture, streams, urls and base64. A 429
is sent again after its Retry-After; a request counts as lost if it ends in anything but its
pictures. The load runs twice, because the first time programs are still compiled. Then a sample of the second load is
sent again, one at a time, and must give the same bytes.
"""

import base64
import concurrent.futures
import dataclasses
import io
import json
import random
import re
import signal
import statistics
import subprocess
import sys
import time
import urllib.parse
import urllib.request

import openai
from PIL import Image

from benchmarks import harness

CAPTIONS = (
    "a red circle above a blue square",
    "a small star",
    "a yellow triangle",
    "a green cross left of a red square",
    "a large blue circle",
)
SECONDS = 600  # one request may take
NAMED = ("prompt", "n", "stream", "partial_images", "response_format")  # OpenAI's; the others are extensions


@dataclasses.dataclass(frozen=True)
class Answer:
    """files: PNG bytes. seconds: from the first attempt to the last byte. refused: answers of 429."""

    files: tuple[bytes, ...]
    seconds: float
    refused: int


def mixed_requests(count: int, *, first_seed: int, model: dict) -> list[dict]:
    """Bodies of mixed requests; key 'keep_rows' marks one for /v1/images/edits."""
    rng = random.Random(first_seed)
    made = []
    for i in range(count):
        body = {"prompt": rng.choice(CAPTIONS), "n": rng.randint(1, 4), "seed": first_seed + 100 * i}
        kind = i % 8
        if kind in (1, 5) and model["ranking"]:
            body["best_of"] = 4 * body["n"]
        if kind == 0 and model["guidance"]:
            body["guidance"] = 2.0
        if kind == 2:
            body["temperature"] = 0.7
        if kind == 3:
            body["top_k"] = max(1, model["image_vocab"] // 4)
        if kind == 4:
            body |= {"stream": True, "partial_images": 3}
        if kind == 6:
            body["keep_rows"] = model["grid"] // 2
        if not body.get("stream"):
            body["response_format"] = "url" if kind == 7 else "b64_json"
        made.append(body)
    return made


class Client:
    """OpenAI's client for the server at a port of this machine; `image` is what edits send."""

    def __init__(self, port: int, *, image: bytes = b""):
        self._address, self._image = f"http://127.0.0.1:{port}", image
        self._openai = openai.OpenAI(base_url=f"{self._address}/v1", api_key="any", max_retries=0, timeout=SECONDS)

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(self._address + path, timeout=SECONDS) as answer:
            return answer.read()

    def ask(self, body: dict) -> Answer:
        """Sends a request until it is answered.

        Raises:
          openai.OpenAIError, RuntimeError: the request is lost.
        """
        start, refused, images = time.monotonic(), 0, self._openai.images
        named = {name: body[name] for name in NAMED if name in body}
        named["extra_body"] = {name: value for name, value in body.items() if name not in NAMED}
        if edit := "keep_rows" in body:
            named["image"] = "image.png", self._image
        while True:
            try:
                answer = (images.edit if edit else images.generate)(**named)
                break
            except openai.RateLimitError as busy:
                refused += 1
                time.sleep(float(busy.response.headers["retry-after"]))
        if body.get("stream"):
            files = [base64.b64decode(event.b64_json) for event in answer if event.type.endswith(".completed")]
        else:
            files = [
                self.get(urllib.parse.urlsplit(one.url).path) if one.url else base64.b64decode(one.b64_json)
                for one in answer.data
            ]
        if len(files) != body["n"]:
            raise RuntimeError(f"{len(files)} pictures instead of {body['n']}")
        return Answer(tuple(files), time.monotonic() - start, refused)


def counters(client: Client) -> dict[str, float]:
    """Every number of /metrics that has no labels."""
    text = client.get("/metrics").decode()
    return {name: float(value) for name, value in re.findall(r"^(dalle_jax_\w+) (\S+)$", text, re.MULTILINE)}


def load(client: Client, bodies: list[dict], *, clients: int) -> dict:
    """Sends everything and says how it went; 'lost' holds the reasons."""
    before, start = counters(client), time.monotonic()
    answers, lost = [], []
    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        for future in [pool.submit(client.ask, body) for body in bodies]:
            try:
                answers.append(future.result())
            except (openai.OpenAIError, RuntimeError, OSError) as error:
                lost.append(repr(error))
                answers.append(None)
    seconds, after = time.monotonic() - start, counters(client)
    gain = {name: after[name] - before.get(name, 0.0) for name in after}
    batches = gain["dalle_jax_batch_fill_count"]
    taken = sorted(answer.seconds for answer in answers if answer)
    return {
        "answers": answers,
        "lost": lost,
        "refused": sum(answer.refused for answer in answers if answer),
        "seconds": seconds,
        "p50": statistics.median(taken),
        "p95": taken[max(0, -(-95 * len(taken) // 100) - 1)],
        "images": gain["dalle_jax_images_total"],
        "candidates": gain["dalle_jax_candidates_total"],
        "batches": batches,
        "fill": gain["dalle_jax_batch_fill_sum"] / batches,
        "requests_a_batch": gain["dalle_jax_batch_requests_sum"] / batches,
        "wait": gain["dalle_jax_queue_wait_seconds_sum"] / gain["dalle_jax_queue_wait_seconds_count"],
    }


def rows(loads: dict[str, dict], requests: int) -> list[str]:
    """The table of all loads."""
    return harness.table(
        "load | lost | 429, sent again | p50, s | p95, s | pictures/s (drawn) | batches | requests a batch | "
        "batch fill | mean wait, s",
        [
            (
                name,
                f"{len(row['lost'])} of {requests}",
                row["refused"],
                f"{row['p50']:.2f}",
                f"{row['p95']:.2f}",
                f"{row['images'] / row['seconds']:.1f} ({row['candidates'] / row['seconds']:.1f})",
                f"{row['batches']:.0f}",
                f"{row['requests_a_batch']:.1f}",
                f"{100 * row['fill']:.0f} %",
                f"{row['wait']:.2f}",
            )
            for name, row in loads.items()
        ],
    )


def main() -> int:
    parser = harness.parser(__doc__)
    parser.add_argument("model", metavar="DIR", help="workdir of a trained transformer")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--note", default="", help="sentences about model and machine, for the result")
    args = parser.parse_args()
    machine = harness.machine("clients and server on it")
    command = [sys.executable, "-m", "dalle_jax.cli", "serve", args.model, "--port", "0", "--deadline-s", str(SECONDS)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        ready = server.stdout.readline()
        if not ready:
            return server.wait()
        port, summary = int(ready.rsplit(":", 1)[1]), server.stdout.readline().strip()
        (model,) = json.loads(Client(port).get("/v1/models"))["data"]
        file = io.BytesIO()
        Image.linear_gradient("L").convert("RGB").resize((model["image_size"],) * 2).save(file, "PNG")
        client = Client(port, image=file.getvalue())
        loads = {}
        for number, name in enumerate(("first, compiling", "second")):
            bodies = mixed_requests(args.requests, first_seed=1_000_000 * number, model=model)
            loads[name] = load(client, bodies, clients=args.clients)
            lost = loads[name]["lost"]
            harness.log(f"{name}: {len(lost)} lost, {loads[name]['seconds']:.1f} s {' '.join(lost[:5])}")
        chosen = range(0, args.requests, 9)  # 9: every kind comes up
        same = sum(client.ask(bodies[i]).files == getattr(loads[name]["answers"][i], "files", None) for i in chosen)
        lines = [
            machine,
            args.note,
            f"Model of {model['image_size']} x {model['image_size']} pixels, {model['grid']} x {model['grid']} image "
            f"tokens, ranking {'yes' if model['ranking'] else 'no'}; {args.requests} mixed requests from "
            f"{args.clients} clients. The server {summary}.",
            *harness.command(args, note="..."),
            *rows(loads, args.requests),
            "",
            f"Sent again alone, {same} of {len(chosen)} requests of the last load gave the same bytes.",
        ]
        harness.write(args.results / "serving.md", "Load on the server", lines)
        server.send_signal(signal.SIGTERM)
        ended = server.wait(60)
        return int(bool(ended or same < len(chosen) or any(row["lost"] for row in loads.values())))
    finally:
        server.kill()


if __name__ == "__main__":
    sys.exit(main())
