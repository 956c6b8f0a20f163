"""Load `mlmjax serve`: rates, latencies, wrong or lost answers, and memory.

    python benchmarks/serving/load.py clients --requests 5000
    python benchmarks/serving/load.py memory --requests 20000
    python benchmarks/serving/load.py plain --requests 200

`clients` sends requests of 1 to 5 questions to a server of `mlmjax-small`, first one at a time and
then by 32 clients at once, and compares all answers with those of `Decider.decide`. It prints
requests per second, latencies, the questions of a batch, and the CPU time of a request, which
bounds the rate. `memory` sends short requests and prints the memory of the server on the way.
`plain` sends the same requests to our server and to one that answers one question after the other
with transformers and torch, over a model of base size with random weights. The cores must be idle.
"""

import argparse
import http.client
import json
import os
import queue
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the comparison is of CPUs

WORDS = ["refund", "invoice", "card", "login", "password", "late", "broken", "order", "please"]
WORDS += ["today", "never", "again"]
CRITERIA = {f"option {n}": "a description" if n % 2 else None for n in range(6)}


def make_requests(count, seed=0):
    """Return requests of 1 to 5 questions about texts of 5 to 60 words."""
    rng = np.random.default_rng(seed)
    kinds = [
        {"type": "noul", "instructions": "Does the customer threaten to leave?"},
        {"type": "choice", "instructions": "Which team should answer?", "criteria": CRITERIA},
        {"type": "score", "instructions": "How urgent is it?", "criteria": ["low", "mid", "high"]},
        {"type": "choice", "instructions": "Language?", "criteria": {"en": None, "other": None}},
        {"type": "noul", "instructions": "Is it about money?", "criteria": {"true": "any sum"}},
    ]
    for _ in range(count):
        text = " ".join(rng.choice(WORDS, rng.integers(5, 60)))
        chosen = rng.permutation(len(kinds))[: rng.integers(1, 6)]
        questions = {f"q{n}": kinds[n] for n in chosen}
        yield {"model": "jev-latest", "state": text, "questions": questions}


def ask(connection, request):
    body = json.dumps(request)
    connection.request("POST", "/v1/systemone", body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    content = response.read()
    return response.status, json.loads(content)


class Server(NamedTuple):
    """A server in a process of its own."""

    process: subprocess.Popen
    port: int

    def cpu_seconds(self) -> float:
        """Return the CPU time that it has taken."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory(self) -> float:
        """Return its resident memory in MiB."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def figure(self, name: str) -> float:
        """Return a figure of `/metrics`."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        connection.close()
        return float(re.search(rf"^{name} (.*)$", text, flags=re.MULTILINE)[1])


@contextmanager
def running(command: list[str]) -> Iterator[Server]:
    """Start a server, wait until it is ready, and end it with SIGTERM."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    port = None
    try:
        for line in process.stderr:
            if found := re.search(r"127\.0\.0\.1:(\d+)", line):
                port = int(found[1])
            if line.startswith("ready"):
                break
        else:
            raise SystemExit("the server has not started")
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield Server(process, port)
    finally:
        process.send_signal(signal.SIGTERM)
        print(f"exit code {process.wait()}")


def ours(model: str, given: argparse.Namespace) -> list[str]:
    """Return the command of our server."""
    options = ["--model", model, "--max-length", str(given.max_length), "--port", "0"]
    return [sys.executable, "-m", "mlmjax", "serve", *options]


def send(port: int, requests: list, clients: int) -> tuple[list, list[float], float]:
    """Send the requests by so many clients; return answers, latencies and seconds."""
    found: list[Any] = [None] * len(requests)
    seconds = [0.0] * len(requests)
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for at in range(len(requests)):
        waiting.put(at)

    def run() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1800)
        while True:
            try:
                at = waiting.get_nowait()
            except queue.Empty:
                connection.close()
                return
            started = time.perf_counter()
            found[at] = ask(connection, requests[at])
            seconds[at] = time.perf_counter() - started

    started = time.perf_counter()
    threads = [threading.Thread(target=run) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found, seconds, time.perf_counter() - started


def measured(name: str, server: Server, requests: list, clients: int) -> tuple[list, float]:
    """Send requests and print figures; return the answers and the requests per second."""
    before = server.cpu_seconds()
    found, seconds, total = send(server.port, requests, clients)
    each = (server.cpu_seconds() - before) / len(requests)
    rate = len(seconds) / total
    p50, p99 = statistics.median(seconds), float(np.quantile(seconds, 0.99))
    print(
        f"{name}: {rate:.1f} requests/s, median {1000 * p50:.0f} ms, p99 {1000 * p99:.0f} ms, "
        f"CPU {1000 * each:.0f} ms/request ({os.cpu_count()} cores allow "
        f"{os.cpu_count() / each:.1f} requests/s)",
        flush=True,
    )
    return found, rate


def wrong_answers(decider: Any, requests: list, found: list) -> int:
    """Return the number of answers that differ from those of `decide`."""
    from mlmjax.decisions.answers import answer_json

    wrong = 0
    for request, (status, body) in zip(requests, found, strict=True):
        direct = decider.decide(request["state"], request["questions"])
        shown = {key: answer_json(one) for key, one in direct.items()}
        wrong += status != 200 or body["answers"] != shown
    return wrong


def random_model(folder: Path, given: argparse.Namespace) -> str:
    """Write a model of random weights with the packaged tokenizer."""
    from flax import nnx

    import mlmjax

    sizes = {
        "num_hidden_layers": given.layers,
        "hidden_size": given.hidden,
        "intermediate_size": given.hidden * 3 // 2,
        "num_attention_heads": given.heads,
    }
    config = mlmjax.ModelConfig(**sizes)
    model = mlmjax.ModernBertForMaskedLM(config, rngs=nnx.Rngs(0))
    mlmjax.save_pretrained(model, mlmjax.Tokenizer.from_pretrained(), folder)
    return str(folder)


def by_clients(given: argparse.Namespace) -> None:
    """Measure one client and many, and compare all answers with `decide`."""
    requests = list(make_requests(given.requests))
    with running(ours("mlmjax-small", given)) as server:
        name = "mlmjax_batch_questions"
        _, alone = measured("one at a time", server, requests[: given.alone], 1)
        batches, asked = (server.figure(f"{name}_{one}") for one in ("count", "sum"))
        before = server.memory()
        found, rate = measured(f"{given.clients} clients", server, requests, given.clients)
        batches, asked = (
            server.figure(f"{name}_count") - batches,
            server.figure(f"{name}_sum") - asked,
        )
        print(f"ratio {rate / alone:.2f}; {asked / batches:.1f} questions in a batch")
        print(f"memory {before:.0f} MiB before, {server.memory():.0f} MiB after")
    from mlmjax import Decider

    compared = slice(None, given.compare)
    decider = Decider("mlmjax-small", max_length=given.max_length, progress=False)
    wrong = wrong_answers(decider, requests[compared], found[compared])
    lost = sum(one is None or one[0] != 200 for one in found)
    print(f"lost {lost} of {len(found)}, wrong {wrong} of {len(found[compared])} compared")


def memory(given: argparse.Namespace) -> None:
    """Print the memory of a server on the way through many requests of one question."""
    question = {"type": "noul", "instructions": "Is it urgent?"}
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, rng.integers(1, 8))) for _ in range(given.requests)]
    requests = [
        {"model": "jev-latest", "state": text, "questions": {f"q{n}": question}}
        for n, text in enumerate(texts)
    ]
    step = max(1, len(requests) // 10)
    with running(ours("mlmjax-small", given)) as server:
        print(f"memory {server.memory():.0f} MiB at the start")
        for start in range(0, len(requests), step):
            part = requests[start : start + step]
            measured(f"requests {start + 1} to {start + len(part)}", server, part, given.clients)
            print(f"memory {server.memory():.0f} MiB", flush=True)


def plain(given: argparse.Namespace) -> None:
    """Compare with a server of transformers and torch that answers one question at a time."""
    requests = list(make_requests(given.requests))
    rates = {}
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(Path(folder) / "model", given)
        other = [sys.executable, str(Path(__file__).with_name("plain_server.py")), model]
        for name, command in (("mlmjax", ours(model, given)), ("transformers and torch", other)):
            with running(command) as server:
                few = requests[: given.alone]
                measured(f"{name}, one at a time", server, few, 1)
                _, rates[name] = measured(
                    f"{name}, {given.clients} clients", server, requests, given.clients
                )
    ours_rate, other_rate = rates.values()
    print(f"ratio {ours_rate / other_rate:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=["clients", "memory", "plain"])
    parser.add_argument(
        "--requests", type=int, help="default: 5000, for plain 200, for memory 20000"
    )
    parser.add_argument("--alone", type=int, default=100, help="requests one at a time")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--compare", type=int, help="compare only the first answers with decide")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--heads", type=int, default=12)
    given = parser.parse_args()
    parts = {"clients": (by_clients, 5000), "memory": (memory, 20000), "plain": (plain, 200)}
    run, usual = parts[given.part]
    given.requests = given.requests or usual
    run(given)


if __name__ == "__main__":
    main()
