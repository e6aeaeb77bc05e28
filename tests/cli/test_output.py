"""What is printed: nothing that was stored steers a terminal, and programs get it as it is."""

import json
import os
import pty
import sys
from contextlib import redirect_stdout

import pytest

from respcache.ops.cli.output import Output

EVIL = "a\x1b]0;title\x07\x9b31m\nb"


def test_control_characters_are_shown_as_pictures(capsys: pytest.CaptureFixture[str]) -> None:
    """In lines, tables, pairs and failures."""
    out = Output(as_json=False)
    out.print(EVIL)
    out.pairs([(EVIL, EVIL), ("name", [EVIL])])
    out.table(["one"], [[EVIL]])
    out.note(EVIL)
    shown = capsys.readouterr()
    assert not {*"\x1b\x07\x9b"} & {*shown.out, *shown.err}
    assert shown.out.count("␛") == 5
    assert len(shown.out.splitlines()) == 5
    assert len(shown.err.splitlines()) == 1


def test_json_holds_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    """Control characters as escapes."""
    evil = f"{EVIL}\x7fü"
    Output(as_json=True).emit({"evil": evil}, lambda: None)
    said = capsys.readouterr().out
    assert not {*"\x1b\x07\x9b\x7f"} & {*said}
    assert "ü" in said
    assert json.loads(said) == {"evil": evil}


def test_a_body_reaches_a_program_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """And a terminal without control characters, but for its lines."""
    Output(as_json=False).body(EVIL)
    assert capsys.readouterr().out == EVIL + "\n"
    ours, theirs = pty.openpty()
    with open(theirs, "w") as terminal, redirect_stdout(terminal):
        out = Output(as_json=False)
        assert out.terminal
        out.body(EVIL)
        shown = os.read(ours, 1000).decode()
    os.close(ours)
    assert shown.splitlines() == ["a␛]0;title␇\N{REPLACEMENT CHARACTER}31m", "b"]
    assert sys.stdout.isatty() is False
