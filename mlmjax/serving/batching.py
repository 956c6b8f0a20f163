"""Gather requests into batches, which one thread answers."""

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Any

from mlmjax.decisions.decider import AnyAnswer, Decider
from mlmjax.errors import InputError, RunError
from mlmjax.serving.protocol import Asked, InvalidRequestError, Limits, RequestError
from mlmjax.text.words import word_spans

log = logging.getLogger(__name__)
Answers = Mapping[str, AnyAnswer]
Seen = Callable[[int], None]
"""Called with the number of questions of each batch."""


@dataclass
class _Job:
    asked: Asked
    result: "asyncio.Future[Answers]"
    loop: asyncio.AbstractEventLoop


class Batcher:
    """Answer requests from many tasks by one thread, many requests at once.

    `answer` is called from one event loop. A request that would make more questions wait than
    `limits.waiting` is refused at once, unless none waits.
    """

    def __init__(self, limits: Limits, seen: Seen = lambda count: None):
        self.limits, self.waiting = limits, 0
        self.decider: Decider | None = None
        self._seen = seen
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self, decider: Decider) -> None:
        """Start to answer with this decider."""
        self.decider = decider
        self._thread.start()

    def stop(self) -> None:
        """Answer what waits, and end the thread."""
        if self._thread.is_alive():
            self._jobs.put(None)
            self._thread.join()

    async def answer(self, asked: Asked, pool: Executor | None = None) -> Answers:
        """Return the answers of a request; raise `RequestError` if it cannot be answered.

        It is prepared in a thread of `pool`, or in one of the loop's usual ones.
        """
        count, limits = len(asked.questions), self.limits
        if self.decider is None:
            raise RequestError(
                503, "not_ready", "the model is loading; try again", {"Retry-After": "2"}
            )
        if self.waiting and self.waiting + count > limits.waiting:
            raise RequestError(
                503,
                "overloaded",
                f"{self.waiting} questions wait, and at most {limits.waiting} may; try again",
                {"Retry-After": "1"},
            )
        self.waiting += count
        try:
            async with asyncio.timeout(limits.answer_seconds):
                loop = asyncio.get_running_loop()
                await loop.run_in_executor(pool, _prepare, self.decider, asked, limits.tokens)
                job = _Job(asked, loop.create_future(), loop)
                self._jobs.put(job)
                return await job.result
        except TimeoutError as error:
            raise RequestError(
                503,
                "timeout",
                f"there was no answer in {limits.answer_seconds:g} s; try again",
                {"Retry-After": "5"},
            ) from error
        finally:
            self.waiting -= count

    def _run(self) -> None:
        going = True
        jobs: list[_Job] = []
        while going:
            job = self._jobs.get()
            # A client that is alone does not wait for others.
            wait = self.limits.gather_seconds if len(jobs) > 1 else 0.0
            until = time.monotonic() + wait
            jobs = []
            while job is not None:
                if not job.result.cancelled():  # its client may have gone
                    jobs.append(job)
                if sum(len(one.asked.questions) for one in jobs) >= self.limits.together:
                    break
                try:
                    job = self._jobs.get(timeout=max(0.0, until - time.monotonic()))
                except queue.Empty:
                    break
            going = job is not None
            if jobs:
                self._answer(jobs)

    def _answer(self, jobs: Sequence[_Job]) -> None:
        self._seen(sum(len(job.asked.questions) for job in jobs))
        assert self.decider is not None
        try:
            found = self.decider.decide_all([(j.asked.state, j.asked.questions) for j in jobs])
            found = [self._explained(job.asked, own) for job, own in zip(jobs, found, strict=True)]
        except Exception as error:
            if len(jobs) > 1:  # one request must not fail another
                for job in jobs:
                    self._answer([job])
                return
            if isinstance(error, RunError):
                log.error("a request failed: %s", error)
            elif not isinstance(error, InputError):  # its message could hold texts
                log.error("a request failed: %s", type(error).__name__)
            _settle(jobs[0], error)
            return
        for job, answers in zip(jobs, found, strict=True):
            _settle(job, answers)

    def _explained(self, asked: Asked, answers: dict[str, AnyAnswer]) -> dict[str, AnyAnswer]:
        """Return answers with the importance of the words, if the request wants it."""
        if not asked.explain:
            return answers
        assert self.decider is not None
        found = {}
        for key, question in asked.questions.items():
            words = self.decider.explain(asked.state, question)
            found[key] = replace(answers[key], words=words)
        return found


def _prepare(decider: Decider, asked: Asked, most: int) -> None:
    """Check and lay out a request outside the engine's thread; raise `RequestError`."""
    problems: list[tuple[list[Any], str, str]] = []
    tokens, repeats = 0, 1
    if asked.explain:  # one prompt more for each word
        repeats += len(word_spans(decider.tokenizer, asked.state.text))
    for key, question in asked.questions.items():
        try:
            tokens += decider.cost(asked.state, question) * repeats
        except InputError as error:
            problems.append((["questions", key], error.message, "value_error"))
    if problems:
        raise InvalidRequestError(problems)
    if tokens > most:
        text = f"its prompts have about {tokens:,} tokens; expected at most {most:,} in one request"
        raise RequestError(413, "request_too_large", text)


def _settle(job: _Job, outcome: Any) -> None:
    """Hand the outcome of a job to the loop that waits for it."""

    def settle() -> None:
        if job.result.done():
            return
        if isinstance(outcome, InputError):
            job.result.set_exception(
                InvalidRequestError([(["questions"], outcome.message, "value_error")])
            )
        elif isinstance(outcome, Exception):
            text = "the model could not answer; try again"
            job.result.set_exception(RequestError(503, "engine_error", text, {"Retry-After": "5"}))
        else:
            job.result.set_result(outcome)

    try:
        job.loop.call_soon_threadsafe(settle)
    except RuntimeError:
        log.warning("an answer came after the server had closed")
