"""Count what the server does, in the form that Prometheus reads."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Hold the figures of one server; `waiting` tells how many questions wait."""

    def __init__(self, waiting: Callable[[], int]):
        self.registry = CollectorRegistry()
        own = {"namespace": "mlmjax", "registry": self.registry}
        self.requests = Counter("requests", "Requests by status.", ["status"], **own)  # type: ignore[arg-type]
        self.seconds = Histogram(
            "request_seconds",
            "Time from the whole body to the answer.",
            buckets=SECONDS,
            **own,  # type: ignore[arg-type]
        )
        self.batches = Histogram("batch_questions", "Questions of a batch.", buckets=SIZES, **own)  # type: ignore[arg-type]
        self.questions = Counter("questions", "Answered questions by type.", ["type"], **own)  # type: ignore[arg-type]
        self.shortened = Counter(
            "shortened_questions",
            "Questions whose state was too long and was shortened.",
            **own,  # type: ignore[arg-type]
        )
        self.tokens = Counter("tokens", "Tokens of all prompts.", **own)  # type: ignore[arg-type]
        queue = Gauge("waiting_questions", "Questions that wait or are being answered.", **own)  # type: ignore[arg-type]
        queue.set_function(waiting)

    def text(self) -> bytes:
        """Return all figures as text."""
        return generate_latest(self.registry)
