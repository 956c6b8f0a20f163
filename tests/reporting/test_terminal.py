"""Lines and progress bars."""

import sys

from mlmjax.reporting import terminal
from mlmjax.reporting.terminal import count_progress, progress_bar


def test_rows_are_counted_in_tenths(capsys):
    with count_progress("rows") as show:
        for done in range(1, 101):
            show(done, 100)
    err = capsys.readouterr().err
    assert err.splitlines() == [f"rows {done}/100" for done in range(10, 101, 10)]


def test_rows_are_counted_by_a_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with count_progress("rows") as show:
        show(3, 4)
    assert "3/4" in capsys.readouterr().err


def test_a_bar_appears_when_work_takes_long_or_is_asked_for(capsys, monkeypatch):
    with progress_bar("rows", False) as show:
        assert show is None
    with progress_bar("rows", None) as show:
        assert show is None  # no terminal
    with progress_bar("rows", True) as show:
        show(1, 2)
    assert capsys.readouterr().err == "rows 1/2\n"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress_bar("rows", None) as show:
        show(1, 2)
        assert not capsys.readouterr().err
        monkeypatch.setattr(terminal, "PATIENCE_SECONDS", -1.0)
        show(1, 2)
    assert "1/2" in capsys.readouterr().err
