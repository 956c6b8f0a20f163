"""Load `mlmjax serve`: many clients, every answer compared with that of `Decider.decide`.

    python benchmarks/serving/load.py --requests 5000 --clients 32

starts a server of `mlmjax-small` in a process of its own, and prints requests per second one at a
time and with all clients, their latencies, wrong and lost answers, and the server's memory. With
`--plain` the same requests go to a server that answers one at a time with transformers and torch,
over a model of the same sizes with random weights; both then have the model that `--layers`,
`--hidden` and `--heads` describe.
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
from pathlib import Path

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


def load(port, requests, clients):
    """Send the requests by so many clients; return answers, latencies and seconds."""
    found, seconds = [None] * len(requests), [0.0] * len(requests)
    waiting = queue.SimpleQueue()
    for at in range(len(requests)):
        waiting.put(at)

    def run():
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


def memory(process):
    """Return the resident memory of a process in MiB."""
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def start(command, ready):
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    port = None
    for line in process.stderr:
        if found := re.search(r"127\.0\.0\.1:(\d+)", line):
            port = int(found[1])
        if line.startswith(ready):
            threading.Thread(target=process.stderr.read, daemon=True).start()
            return process, port
    raise SystemExit("the server has not started")


def report(name, seconds, total):
    """Print and return the requests per second."""
    rate = len(seconds) / total
    p50, p99 = statistics.median(seconds), float(np.quantile(seconds, 0.99))
    print(f"{name}: {rate:.1f} requests/s, median {1000 * p50:.0f} ms, p99 {1000 * p99:.0f} ms")
    return rate


def wrong_answers(decider, requests, found):
    """Return the number of answers that are lost or differ from those of `decide`."""
    from mlmjax.decisions.answers import answer_json

    wrong = 0
    for request, (status, body) in zip(requests, found, strict=True):
        direct = decider.decide(request["state"], request["questions"])
        shown = {key: answer_json(one) for key, one in direct.items()}
        wrong += status != 200 or body["answers"] != shown
    return wrong


def random_model(folder, given):
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


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--alone", type=int, default=300, help="requests one at a time")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--compare", type=int, default=500, help="answers to compare with decide")
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--heads", type=int, default=12)
    given = parser.parse_args()
    requests = list(make_requests(given.requests))
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(Path(folder) / "model", given) if given.plain else "mlmjax-small"
        options = ["--model", model, "--max-length", str(given.max_length), "--port", "0"]
        process, port = start([sys.executable, "-m", "mlmjax", "serve", *options], "ready")
        try:
            _, seconds, total = load(port, requests[: given.alone], 1)
            alone = report("one at a time", seconds, total)
            before = memory(process)
            found, seconds, total = load(port, requests, given.clients)
            rate = report(f"{given.clients} clients", seconds, total)
            print(
                f"ratio {rate / alone:.2f}; memory {before:.0f} MiB before, "
                f"{memory(process):.0f} MiB after {given.requests} requests"
            )
        finally:
            process.send_signal(signal.SIGTERM)
            print(f"exit code {process.wait()}")
        from mlmjax import Decider

        decider = Decider(model, max_length=given.max_length)
        wrong = wrong_answers(decider, requests[: given.compare], found[: given.compare])
        lost = sum(one is None or one[0] != 200 for one in found)
        print(f"lost {lost} of {len(found)}, wrong {wrong} of {given.compare} compared")
        if given.plain:
            plain = Path(__file__).with_name("plain_server.py")
            process, port = start([sys.executable, str(plain), model], "ready")
            try:
                _, seconds, total = load(port, requests, given.clients)
                plain_rate = report("transformers and torch, one at a time", seconds, total)
                print(f"ratio {rate / plain_rate:.2f}")
            finally:
                process.kill()
                process.wait()


if __name__ == "__main__":
    main()
