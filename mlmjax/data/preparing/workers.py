"""Run jobs in parallel; after a kill, finished work is on disk and not repeated."""

import json
import logging
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

from mlmjax.errors import RunError
from mlmjax.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

Job = dict[str, Any]
"""The arguments of a job, or its answer, as JSON values."""

Function = Callable[..., Job]
"""`function(tokenizer, progress, **job)` writes the file `out` and returns an answer."""

_PARENT_SECONDS = 0.1


class Workers:
    """Run jobs here, or in processes that start when they are needed and stay."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self._pool: Any = None
        self._size = 0

    def close(self) -> None:
        """End the processes."""
        if self._pool is not None:
            self._pool.shutdown(kill_workers=True)

    def run(
        self,
        function: Function,
        jobs: Sequence[Job],
        count: int,
        progress: Callable[[int, int], None] = lambda number, records: None,
    ) -> list[Job]:
        """Run jobs in up to `count` processes; return their answers in order.

        A file and the answer next to it appear whole, or not at all, and no job is repeated whose
        answer is there. `progress` gets the number of a job and its records so far, or only the
        last count from another process. Raises what a job raises, and `RunError` if a process dies.
        """
        notes = [_note(job) for job in jobs]
        answers = {
            n: json.loads(path.read_bytes()) for n, path in enumerate(notes) if path.exists()
        }
        if answers:
            log.info("%s: %d of %d parts are done", notes[0].parent, len(answers), len(jobs))
        left = {number: job for number, job in enumerate(jobs) if number not in answers}
        count = min(count, len(left))
        if count <= 1:
            for number, job in left.items():
                answers[number] = _do(function, self.tokenizer, partial(progress, number), job)
        else:
            for number, answer, records in self._in_processes(function, left, count):
                answers[number] = answer
                progress(number, records)
        return [answers[number] for number in range(len(jobs))]

    def _in_processes(
        self, function: Function, jobs: Mapping[int, Job], count: int
    ) -> Iterator[tuple[int, Job, int]]:
        """Yield number, answer and records of each job as a process finishes it."""
        # Not `multiprocessing`: a fork after jax has started its threads may hang, and a spawned
        # process would run the user's own script once more.
        from joblib.externals.loky import ProcessPoolExecutor

        if self._size < count:
            self.close()
            self._size = count
            self._pool = ProcessPoolExecutor(
                count,
                initializer=_begin,
                initargs=(os.getpid(), self.tokenizer),
                env={"TOKENIZERS_PARALLELISM": "false"},
            )
        try:
            with warnings.catch_warnings():
                # A process that has grown is replaced, which loses nothing.
                warnings.filterwarnings("ignore", "A worker stopped", UserWarning)
                submit = partial(self._pool.submit, _do_here, function)
                futures = {submit(job): number for number, job in jobs.items()}
                for future in as_completed(futures):
                    yield futures[future], *future.result()
        except BrokenProcessPool as error:
            raise RunError(
                f"{_note(next(iter(jobs.values()))).parent}: a process that prepares data died; is "
                "there enough memory? Run the same command again to resume, or with fewer "
                "data.workers"
            ) from error


def _note(job: Job) -> Path:
    return Path(f"{job['out']}.json")


def _do(function: Function, tokenizer: Tokenizer, progress: Callable[[int], None], job: Job) -> Job:
    # Every process has its own name, because a worker of a killed run may write for a moment.
    own = Path(f"{job['out']}.{os.getpid()}.partial")
    answer = json.dumps(function(tokenizer, progress, **job | {"out": str(own)}))
    own.rename(job["out"])
    own.write_text(answer, encoding="utf-8")
    own.rename(_note(job))
    return json.loads(answer)


_worker: Tokenizer
"""The tokenizer of this process, if it is a worker."""


def _begin(parent: int, tokenizer: Tokenizer) -> None:
    """Set up a worker, which ends with its parent process and ignores Ctrl-C."""
    global _worker
    _worker = tokenizer
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _do_here(function: Function, job: Job) -> tuple[Job, int]:
    records = [0]
    return _do(function, _worker, records.append, job), records[-1]
