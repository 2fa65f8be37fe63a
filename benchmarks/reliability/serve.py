"""A load of mixed requests on `dalle-jax serve`: none lost, how long they take, how full the batches are.

    python -m benchmarks.reliability.serve DIR

Starts the server on a free port of 127.0.0.1 with its default settings, and sends every request from one of as many
clients as asked for, each of which sends its next when its last is answered. Requests mix captions, 1 to 4 pictures,
ranking and guidance (where the model can), temperature, top-k, completion of a picture, streams, urls and base64. A 429
is sent again after its Retry-After, as OpenAI's client does; a request counts as lost if it ends in anything but its
pictures. The load runs twice, because the first time programs are still compiled. Then a sample of the second load is
sent again, one at a time, and must give the same bytes.
"""

import base64
import concurrent.futures
import dataclasses
import http.client
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

from PIL import Image

from benchmarks import harness

CAPTIONS = (
    "a red circle above a blue square",
    "a small star",
    "a yellow triangle",
    "a green cross left of a red square",
    "a large blue circle",
)
SECONDS = 600  # one request may take, retries included


@dataclasses.dataclass(frozen=True)
class Answer:
    """files: PNG bytes. seconds: from the first attempt to the last byte. refused: answers of 429."""

    files: tuple[bytes, ...]
    seconds: float
    refused: int


def wishes(count: int, *, first_seed: int, model: dict) -> list[dict]:
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
    """Speaks to the server at a port of this machine."""

    def __init__(self, port: int, *, image: bytes = b""):
        self._port, self._image = port, image

    def get(self, path: str) -> bytes:
        return self._exchange("GET", path, None, {})[2]

    def ask(self, body: dict) -> Answer:
        """Sends a request until it is answered.

        Raises:
          RuntimeError: the request is lost.
        """
        start, refused = time.monotonic(), 0
        while True:
            status, headers, text = self._exchange("POST", *self._encoded(body))
            if status != 429:
                break
            refused += 1
            time.sleep(float(headers["retry-after"]))
        if status != 200:
            raise RuntimeError(f"{status}: {text[:300]!r}")
        files = self._files(body, text)
        if len(files) != body["n"]:
            raise RuntimeError(f"{len(files)} pictures instead of {body['n']}")
        return Answer(files, time.monotonic() - start, refused)

    def _files(self, body: dict, text: bytes) -> tuple[bytes, ...]:
        if body.get("stream"):
            events = [json.loads(line[6:]) for line in text.decode().splitlines() if line.startswith("data: ")]
            return tuple(
                base64.b64decode(event["b64_json"]) for event in events if event["type"].endswith(".completed")
            )
        data = json.loads(text)["data"]
        if body["response_format"] == "url":
            return tuple(self.get(urllib.parse.urlsplit(picture["url"]).path) for picture in data)
        return tuple(base64.b64decode(picture["b64_json"]) for picture in data)

    def _encoded(self, body: dict) -> tuple[str, bytes, dict]:
        if "keep_rows" not in body:
            return "/v1/images/generations", json.dumps(body).encode(), {"Content-Type": "application/json"}
        parts = [(f'name="{name}"', str(value).encode()) for name, value in body.items()]
        parts.append(('name="image"; filename="image.png"', self._image))
        form = b"".join(
            f"--edge\r\nContent-Disposition: form-data; {head}\r\n\r\n".encode() + data + b"\r\n"
            for head, data in parts
        )
        return "/v1/images/edits", form + b"--edge--\r\n", {"Content-Type": "multipart/form-data; boundary=edge"}

    def _exchange(self, method: str, path: str, data: bytes | None, headers: dict):
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=SECONDS)
        try:
            connection.request(method, path, data, headers)
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()
        finally:
            connection.close()


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
            except (RuntimeError, OSError, http.client.HTTPException) as error:
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
        port, told = int(ready.rsplit(":", 1)[1]), server.stdout.readline().strip()
        (model,) = json.loads(Client(port).get("/v1/models"))["data"]
        file = io.BytesIO()
        Image.linear_gradient("L").convert("RGB").resize((model["image_size"],) * 2).save(file, "PNG")
        client = Client(port, image=file.getvalue())
        loads = {}
        for number, name in enumerate(("first, compiling", "second")):
            bodies = wishes(args.requests, first_seed=1_000_000 * number, model=model)
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
            f"{args.clients} clients. The server {told}.",
            "",
            f"    {harness.command(args, note='...')}",
            "",
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
