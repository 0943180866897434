import io
import json
import math
from pathlib import Path

import pytest
import typer

from launcher.errors import RunError
from launcher.output import Output
from launcher.verb import as_command


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_people_read_standard_output_and_programs_one_object() -> None:
    out, err = io.StringIO(), io.StringIO()
    output = Output(as_json=False, out=out, err=err)
    output.say("words")
    output.result({"x": 1})
    output.warn("careful")
    assert (out.getvalue(), err.getvalue()) == ("words\n", "careful\n")
    out, err = io.StringIO(), io.StringIO()
    output = Output(as_json=True, out=out, err=err)
    output.say("words")
    output.table(("a",), [("b",)])
    output.result({"x": 1})
    assert json.loads(out.getvalue()) == {"x": 1}
    assert err.getvalue() == "words\na\nb\n"


def test_what_json_does_not_have_is_null() -> None:
    out = io.StringIO()
    Output(as_json=True, out=out).result(
        {"a": math.nan, "b": [math.inf, 1.5], "c": {"d": (-math.inf,)}, "e": Path("x")}
    )
    assert json.loads(out.getvalue(), parse_constant=str) == {"a": None, "b": [None, 1.5], "c": {"d": [None]}, "e": "x"}


def test_a_failure_after_the_result_adds_no_second_object(capsys: pytest.CaptureFixture[str]) -> None:
    def verb(out: Output) -> int:
        out.result({"steps": 4})
        raise RunError("the disk is full")

    with pytest.raises(typer.Exit) as caught:
        as_command(verb)(as_json=True, debug=False)
    assert caught.value.exit_code == 1
    out, err = capsys.readouterr()
    assert json.loads(out) == {"steps": 4}
    assert err == "error: the disk is full\n"


def test_a_table_is_aligned_lines_where_there_is_no_terminal() -> None:
    out = io.StringIO()
    Output(as_json=False, out=out).table(("name", "value"), [("a", "1"), ("longer name", "")])
    assert out.getvalue() == "name         value\na            1\nlonger name\n"


def test_a_table_is_drawn_on_a_terminal() -> None:
    out = Terminal()
    Output(as_json=False, out=out).table(("name",), [("[train]",)])
    assert "[train]" in out.getvalue()  # not taken for markup
    assert "━" in out.getvalue()


def test_progress_is_a_line_a_stage_or_one_line_redrawn() -> None:
    err = io.StringIO()
    output = Output(as_json=False, err=err)
    for fraction in (0.0, 0.5, 1.0):
        output.progress("tokenizing", fraction)
    assert err.getvalue() == "tokenizing ...\n"
    terminal = Terminal()
    output = Output(as_json=False, err=terminal)
    for fraction in (0.0, 0.5, 1.0):
        output.progress("tokenizing", fraction)
    assert "\r\x1b[Ktokenizing: 50%" in terminal.getvalue()
    assert terminal.getvalue().endswith("100%\n")
