"""Sampled text never steers the terminal."""

from __future__ import annotations

import io

from launcher.output import Output, visible


def test_control_characters_become_dots() -> None:
    assert visible("a\x07b\x1b[2Jc\x9bd\n\te\r") == "a·b·[2Jc·d\n\te·"
    assert visible("déjà vu → 漢字") == "déjà vu → 漢字"


def test_what_is_said_is_visible() -> None:
    out = io.StringIO()
    Output(as_json=False, out=out).say("x\x1b]0;title\x07y")
    assert out.getvalue() == "x·]0;title·y\n"
