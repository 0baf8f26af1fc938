"""How far a long job is: on a terminal, and in a log."""

import io
import sys
import time

from fot_jax.common import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_what_is_going_on_is_said_where_it_takes_long(capsys):
    with progress.said_if_slow("at once"):
        pass
    with progress.said_if_slow("slowly", seconds=0):
        while not capsys.readouterr().err == "slowly\n":
            time.sleep(0.01)


def test_a_bar_on_a_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress.bar(5000, name="passkey") as update:
        for _ in range(5):
            update(1000)
    said = sys.stderr.getvalue()
    assert "passkey: 100%" in said and "5.00k/5.00k" in said


def test_a_line_now_and_then_elsewhere(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress.bar(5000, seconds=0) as update:
        update(1000)
        update(1500)
    lines = sys.stderr.getvalue().splitlines()
    assert lines == ["1,000 of 5,000 tokens", "2,500 of 5,000 tokens"]
    with progress.bar(10, "read", seconds=0, name="passkey") as update:
        update(1)
    lines += ["passkey: 1 of 10 reads"]
    assert sys.stderr.getvalue().splitlines() == lines
    with progress.bar(5000) as update:
        update(1000)
    assert sys.stderr.getvalue().splitlines() == lines  # no line for what is done at once
