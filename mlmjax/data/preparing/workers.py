"""The two kinds of work preparing is made of, each a function of files, and processes to do it."""

import json
import logging
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from mlmjax.config.data import ExcludeConfig, SourceConfig
from mlmjax.data.packing import pack_stream
from mlmjax.data.preparing.shuffle import read_bucket, write_stage
from mlmjax.data.reading.answers import Head
from mlmjax.data.reading.examples import Counts, Encoded, read_examples
from mlmjax.data.reading.exclusion import Exclusion
from mlmjax.data.reading.sources import source_files
from mlmjax.data.rows import write_rows
from mlmjax.errors import InputError, RunError
from mlmjax.storage import describe_file
from mlmjax.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)
Job = dict[str, Any]
"""What is to be done, as JSON values; `kind` names the function."""


_PROGRESS_EVERY = 1000


def stage_unit(
    tokenizer: Tokenizer,
    *,
    source: dict[str, Any],
    exclude: dict[str, Any] | None,
    seq_length: int,
    head: Head,
    out: str,
    progress: Callable[[int], None] = lambda records: None,
) -> Job:
    """Tokenise one unit of a source into `out`; give what was read, kept and dropped.

    The answer has `files` (with their hashes), the `counts`, and the names of the `tasks` in the
    order of their numbers.
    """
    unit = SourceConfig.model_validate(source, strict=False)
    exclusion = None if exclude is None else _exclusion(json.dumps(exclude))
    counts = Counts()
    tasks: dict[str, int] = {}

    def staged() -> Iterator[tuple]:
        for one in read_examples(unit, tokenizer, seq_length, counts, head, exclusion):
            counts.examples += 1
            if counts.examples % _PROGRESS_EVERY == 0:
                progress(counts.records)
            task = tasks.setdefault(one.task, len(tasks))
            answer = (
                int(one.ids[one.answer_position]) if one.answer_position >= 0 else _class(unit, one)
            )
            yield one.ids, answer, one.answer_position, task, one.key, one.label
        progress(counts.records)

    write_stage(Path(out), staged(), tokenizer.vocab_size)
    return {
        "files": [describe_file(path) for path in source_files(unit)],
        "counts": vars(counts),
        "tasks": list(tasks),
    }


def _class(source: SourceConfig, one: Encoded) -> int:
    """Return what stands for an answer that is no token: a class, 0 for a value, -1 for none."""
    if source.text is not None:
        return -1
    return 0 if source.labels is None else int(one.label)


@lru_cache(maxsize=1)
def _exclusion(config: str) -> Exclusion:
    """Read the evaluation sets once for all units of a process."""
    return Exclusion(ExcludeConfig.model_validate_json(config, strict=False))


def pack_bucket(tokenizer: Tokenizer, *, bucket: str, seq_length: int, pack: bool, out: str) -> Job:
    """Pack the examples of a bucket into rows and write them to `out`; give their counts."""
    vocab_size = tokenizer.vocab_size
    examples = read_bucket(Path(bucket), vocab_size)
    rows = pack_stream(examples, seq_length) if pack else ([example] for example in examples)
    path = Path(out)
    counts = write_rows(path, rows, vocab_size=vocab_size, seq_length=seq_length)
    described = describe_file(path)
    counts["per_task"] = {str(task): n for task, n in counts["per_task"].items()}
    return counts | {"bytes": described["bytes"], "sha256": described["sha256"]}


KINDS: dict[str, Callable[..., Job]] = {"stage": stage_unit, "pack": pack_bucket}


def do(
    jobs: Sequence[Job],
    tokenizer: Tokenizer,
    workers: int,
    progress: Callable[[int, int], None] = lambda job, records: None,
) -> list[Job]:
    """Do jobs, in `workers` processes if more than one; give their answers in order.

    A job's `out` is written under another name first, and its answer beside it: where that is there
    already, from a time before, the job is done. `progress` gets the number of a job and the
    records read. Raises what the first job to fail raises; `RunError` for a process that dies.
    """
    answers: dict[int, Job] = {}
    for number, job in enumerate(jobs):
        note = Path(f"{job['out']}.json")
        if note.exists():
            answers[number] = json.loads(note.read_bytes())
    if answers:
        log.info("%s: %d of %d parts are there already", _place(jobs), len(answers), len(jobs))
    left = [number for number in range(len(jobs)) if number not in answers]
    workers = min(workers, len(left))
    if workers <= 1:
        for number in left:
            answers[number] = _do_one(jobs[number], tokenizer, partial(progress, number))
        return [answers[number] for number in range(len(jobs))]
    telling = threading.Lock()

    def told(number: int, records: int) -> None:
        with telling:
            progress(number, records)

    with _Pool(workers, tokenizer) as pool, ThreadPoolExecutor(workers) as threads:
        doing = {
            threads.submit(pool.do, jobs[number], partial(told, number)): number for number in left
        }
        try:
            for future in as_completed(doing):
                answers[doing[future]] = future.result()
        except BaseException:
            pool.stop()
            for future in doing:
                future.cancel()
            raise
    return [answers[number] for number in range(len(jobs))]


def _do_one(job: Job, tokenizer: Tokenizer, progress: Callable[[int], None]) -> Job:
    arguments = {name: value for name, value in job.items() if name != "kind"}
    out, partial = Path(job["out"]), f"{job['out']}.partial"
    if job["kind"] == "stage":
        arguments["progress"] = progress
    answer = KINDS[job["kind"]](tokenizer, **arguments | {"out": partial})
    Path(partial).rename(out)
    note = Path(f"{out}.json")
    note.with_suffix(".partial").write_text(json.dumps(answer), encoding="utf-8")
    note.with_suffix(".partial").rename(note)
    return json.loads(note.read_bytes())


def _place(jobs: Sequence[Job]) -> Path:
    return Path(jobs[0]["out"]).parent


class _Pool:
    """Processes of this very module, each doing one job after another as lines of JSON.

    Not `multiprocessing`: a fork after jax has started its threads may hang, and a spawned process
    would run the user's own script once more.
    """

    def __init__(self, count: int, tokenizer: Tokenizer):
        environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
        self._stopped = False
        self._free = threading.Semaphore(0)
        self._idle: list[subprocess.Popen] = []
        self._all = []
        root = str(Path(__file__).parents[3])
        environment["PYTHONPATH"] = os.pathsep.join(
            filter(None, [root, environment.get("PYTHONPATH")])
        )
        files = {name: data.decode("latin-1") for name, data in tokenizer.files.items()}
        for _ in range(count):
            process = subprocess.Popen(
                [sys.executable, "-m", "mlmjax.data.preparing.workers"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                text=True,
                # The lock of the folder goes along: nobody else works there before all are gone.
                close_fds=False,
                # Ctrl-C is for us, who then end them.
                start_new_session=True,
            )
            self._all.append(process)
        for process in self._all:
            try:
                self._send(process, files)
            except OSError as error:
                self.stop()
                raise RunError(
                    f"{sys.executable}: a process that should read data died at once; set "
                    "data.workers = 1 to do without"
                ) from error
            self._idle.append(process)
            self._free.release()

    def __enter__(self) -> "_Pool":
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def stop(self) -> None:
        """End all processes, whatever they do."""
        self._stopped = True
        self._free.release()
        for process in self._all:
            process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream:
                    stream.close()

    def do(self, job: Job, progress: Callable[[int], None]) -> Job:
        """Do one job in a process that is free."""
        self._free.acquire()
        if self._stopped:
            self._free.release()  # For the next one who waits.
            raise RunError(f"{job['out']}: not done, because another process failed")
        process = self._idle.pop()
        try:
            self._send(process, job)
            assert process.stdout is not None
            while "read" in (answer := json.loads(process.stdout.readline() or "{}")):
                progress(answer["read"])
        except (OSError, ValueError):
            answer = {}
        if not answer:
            raise RunError(
                f"{job['out']}: the process working on it died"
                f" (exit code {process.wait()}); is there enough memory? Run the same command "
                "again to go on, or with fewer data.workers"
            )
        self._idle.append(process)
        self._free.release()
        if "refused" in answer:
            raise InputError(answer["refused"], answer["details"])
        if "failed" in answer:
            raise RunError(answer["failed"])
        return answer["done"]

    def _send(self, process: subprocess.Popen, value: Any) -> None:
        assert process.stdin is not None
        process.stdin.write(f"{json.dumps(value)}\n")
        process.stdin.flush()


def serve() -> None:
    """Do the jobs that come in, line by line; end when nobody is there to send more."""
    files = {name: text.encode("latin-1") for name, text in json.loads(input()).items()}
    tokenizer = Tokenizer(files)
    jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()

    def take() -> None:
        for line in sys.stdin:
            jobs.put(json.loads(line))
        # Whoever asked is gone, and may come again to do the very job that is being done here.
        os._exit(1)

    threading.Thread(target=take, daemon=True).start()
    while True:
        job = jobs.get()
        answer: Job
        try:
            answer = {"done": _do_one(job, tokenizer, lambda read: _say({"read": read}))}
        except InputError as error:
            answer = {"refused": error.message, "details": list(error.details)}
        except OSError as error:
            answer = {"failed": f"{job['out']}: writing failed: {error.strerror or error}"}
        _say(answer)


def _say(value: Job) -> None:
    print(json.dumps(value), flush=True)


def merge(counts: Sequence[dict[str, Any]]) -> Counts:
    """Add up the counts of the units of a source."""
    total = Counts()
    for one in counts:
        total.add(Counts(**one))
    return total


if __name__ == "__main__":
    serve()
