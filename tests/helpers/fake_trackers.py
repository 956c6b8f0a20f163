"""Trackers that keep what they get, in the places of real ones."""


class FakeTracker:
    """A tracker that keeps what it gets, and fails in the methods named by `fails`."""

    def __init__(self, *fails):
        self.fails, self.calls = fails, []

    def _take(self, name, *values):
        self.calls.append((name, *values))
        if name in self.fails:
            print("words of a package")
            raise RuntimeError(f"no {name}\nmore")

    def start(self, run):
        self._take("start", run)
        return run.id or "id-1"

    def log(self, step, figures):
        self._take("log", step, figures)

    def finish(self):
        self._take("finish")
