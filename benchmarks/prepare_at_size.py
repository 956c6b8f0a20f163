"""Measure the time, memory and disk that preparing growing instruction data takes.

    python benchmarks/prepare_at_size.py make SHARDS --kept FILE.jsonl.zst --raw FILE.parquet ...
    python benchmarks/prepare_at_size.py run SHARDS --examples 250000,1000000 --workers 1,2

`make` draws records from real ones and puts a unique number before each text. For each record with
a one-token answer it draws 2.3 others, as in FLAN 2022 (396 M records, 120 M with one token, arXiv
2502.03793, section 2). `run` prepares the first shards in a separate process. It records processor
time, disk, and the peak of private memory, without mapped files, which the system can drop.
"""

import argparse
import io
import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage

KEPT_PER_SHARD = 78_125
DROPPED_PER_KEPT = 2.3
COLUMNS = ("inputs", "targets", "_task_name")
CONFIG = """
out = "unused"
steps = 1
init_from = "unused"
[data]
rows = {rows}
seq_length = 1024
validation_rows = 256
workers = {workers}
[data.select]
sizes = {sizes}
[[data.sources]]
name = "flan"
path = {paths}
prompt = "{{inputs}}"
answer = "targets"
task = "_task_name"
shorten = {{ inputs = "middle" }}
"""


def make(folder: Path, kept: Path, raw: list[Path], shards: int) -> None:
    """Write shards of records drawn from real ones; the same input gives the same shards."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    from mlmjax.text.tokenizer import Tokenizer

    schema = pa.schema([(name, pa.string()) for name in COLUMNS])
    with io.BufferedReader(pa.input_stream(str(kept), compression="zstd"), 2**20) as lines:
        records = [json.loads(line) for line in lines]
    columns = [
        [f"{record['definition']}\n{record['input']}" for record in records],
        [record["target"] for record in records],
        [record["task"] for record in records],
    ]
    one_token = pa.table(columns, schema=schema)
    others = pa.concat_tables(
        [pq.read_table(path, columns=list(COLUMNS)).cast(schema) for path in raw]
    )
    answers = [f" {answer.strip()}" for answer in others["targets"].to_pylist()]
    ids = Tokenizer.from_pretrained().encode_plain_batch(answers)
    others = others.filter(pa.array([len(one) != 1 for one in ids]))
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        rng = np.random.default_rng(shard)
        dropped = int(KEPT_PER_SHARD * DROPPED_PER_KEPT)
        drawn = pa.concat_tables(
            [
                one_token.take(pa.array(rng.integers(0, len(one_token), KEPT_PER_SHARD))),
                others.take(pa.array(rng.integers(0, len(others), dropped))),
            ]
        ).take(pa.array(rng.permutation(KEPT_PER_SHARD + dropped)))
        number = pa.array([f"Example {shard}-{row}. " for row in range(len(drawn))])
        text = pc.binary_join_element_wise(number, drawn["inputs"].combine_chunks(), "")
        path = folder / f"flan-{shard:03}.parquet"
        pq.write_table(
            drawn.set_column(0, "inputs", text), path, compression="zstd", row_group_size=20_000
        )


def run(folder: Path, examples: list[int], workers: list[int], work: Path) -> None:
    """Prepare growing parts of the shards, and print a row of figures for each."""
    shards = sorted(folder.glob("flan-*.parquet"))
    print(
        "| examples kept | records read | processes | minutes | CPU s | peak MiB, first process "
        "| peak MiB, all | rows GB | most disk GB | padding |\n" + "|---:" * 10 + "|"
    )
    for wanted in examples:
        for count in workers:
            used = shards[: -(-wanted // KEPT_PER_SHARD)]
            figures = measure(used, count, work)
            print("| " + " | ".join(figures) + " |", flush=True)


def measure(shards: list[Path], workers: int, work: Path) -> list[str]:
    """Prepare some shards in a separate process; return the cells of its row."""
    import shutil

    rows = work / "rows"
    shutil.rmtree(rows, ignore_errors=True)
    sizes = [len(shards) * KEPT_PER_SHARD // part for part in (8, 4, 2)]
    config = work / "config.toml"
    work.mkdir(parents=True, exist_ok=True)
    paths = json.dumps([str(path) for path in shards])
    config.write_text(
        CONFIG.format(rows=json.dumps(str(rows)), workers=workers, sizes=sizes, paths=paths)
    )
    program = (
        "import sys; from mlmjax.config.run import load_config; "
        "from mlmjax.data.preparing.prepare import prepare; "
        "from mlmjax.text.tokenizer import Tokenizer; "
        "prepare(load_config(sys.argv[1]).data, Tokenizer.from_pretrained())"
    )
    before, began = getrusage(RUSAGE_CHILDREN), time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", program, str(config)])
    peaks = {"first": 0.0, "all": 0.0, "disk": 0.0}
    watcher = threading.Thread(target=watch, args=(process, rows, peaks))
    watcher.start()
    if process.wait():
        raise SystemExit(f"preparing {len(shards)} shards failed")
    minutes = (time.perf_counter() - began) / 60
    watcher.join()
    after = getrusage(RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    manifest = json.loads((rows / "manifest.json").read_bytes())
    (source,) = manifest["sources"]
    train = manifest["splits"]["train"]
    filled = sum(f["tokens"] for f in train) / sum(f["rows"] for f in train) / 1024
    size = sum(path.stat().st_size for path in rows.rglob("*") if path.is_file())
    return [
        f"{source['examples']:,}",
        f"{source['records']:,}",
        str(workers),
        f"{minutes:.1f}",
        f"{cpu:.0f}",
        f"{peaks['first']:.0f}",
        f"{peaks['all']:.0f}",
        f"{size / 1e9:.2f}",
        f"{peaks['disk'] / 1e9:.2f}",
        f"{1 - filled:.2%}",
    ]


def watch(process: subprocess.Popen, rows: Path, peaks: dict[str, float]) -> None:
    """Record the peaks of memory and disk until the process ends."""
    partial = rows.with_name(rows.name + ".partial")
    while process.poll() is None:
        own = private(process.pid)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        try:
            others = [private(int(pid)) for pid in children.read_text().split()]
            used = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
        except OSError:
            continue
        peaks["first"] = max(peaks["first"], own)
        peaks["all"] = max(peaks["all"], own + sum(others))
        peaks["disk"] = max(peaks["disk"], used)
        time.sleep(0.2)


def private(pid: int) -> float:
    """Return the MiB of a process that belong to no file."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0.0
    sizes = [line.split() for line in status.splitlines() if line.startswith("RssAnon")]
    return sum(int(size) for _, size, _ in sizes) / 1024


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=["make", "run"])
    parser.add_argument("shards", type=Path)
    parser.add_argument("--kept", type=Path)
    parser.add_argument("--raw", type=Path, nargs="*", default=[])
    parser.add_argument("--number", type=int, default=64)
    parser.add_argument("--examples", default="250000,1000000")
    parser.add_argument("--workers", default="1,2")
    parser.add_argument("--work", type=Path, default=Path("bench-prepare"))
    given = parser.parse_args()
    if given.what == "make":
        make(given.shards, given.kept, given.raw, given.number)
    else:
        examples, workers = (
            [int(number) for number in text.split(",")] for text in (given.examples, given.workers)
        )
        run(given.shards, examples, workers, given.work)


if __name__ == "__main__":
    main()
