import datetime
import tomllib
from typing import Any

import pytest

from launcher.toml_writing import to_toml


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"a": 1, "b": True, "c": 1e-8, "d": -0.5, "e": 10**20},
        {"text": 'quotes " and \\ and \n, \t, \x7f, \x01, ü and 🐍', "": "empty key", "a b.c": 1},
        {"list": [1, 2], "nested": [[1], []], "tables": [{"x": 1}, {"y z": "w"}], "strings": ["def ", ""]},
        {"outer": {"inner": {"deep": 1}, "value": 2}, "empty": {}, "only": {"tables": {"a": {}}}},
        {"inf": float("inf"), "minus": float("-inf")},
    ],
)
def test_what_is_written_reads_back_as_itself(data: dict[str, Any]) -> None:
    assert tomllib.loads(to_toml(data)) == data


def test_values_come_before_tables() -> None:
    assert to_toml({"table": {"x": 1}, "value": 2}) == "value = 2\n\n[table]\nx = 1\n"


def test_none_is_left_out() -> None:
    assert (
        to_toml({"a": None, "b": {"c": None, "d": 1}, "e": [{"f": None, "g": 1}]}) == "e = [{ g = 1 }]\n\n[b]\nd = 1\n"
    )


def test_notes_stand_behind_their_keys() -> None:
    notes = {("a", "b"): "from x.toml"}
    text = to_toml({"a": {"b": 1, "c": 2}}, note=lambda path: notes.get(path, ""))
    assert text == "[a]\nb = 1  # from x.toml\nc = 2\n"


def test_what_toml_cannot_hold_is_refused() -> None:
    with pytest.raises(TypeError, match="TOML cannot hold a date"):
        to_toml({"a": datetime.date(2026, 1, 1)})
