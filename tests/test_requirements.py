"""A test that lacks something is skipped; MEGA_REQUIRE makes it fail."""

import importlib.util

import pytest

from tests.requirements import missing, require, requires


@pytest.fixture
def _nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def test_what_is_there_is_no_reason_to_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setenv("MEGA_REQUIRE", "transformers")
    assert missing("transformers") is None
    assert requires("transformers").args == (False,)
    require("transformers")


@pytest.mark.usefixtures("_nothing_installed")
@pytest.mark.parametrize("required", ["", "accelerate, datasets"])
def test_what_is_missing_skips_and_says_why(monkeypatch: pytest.MonkeyPatch, required: str) -> None:
    monkeypatch.setenv("MEGA_REQUIRE", required)
    mark = requires("transformers")
    assert mark.args == (True,)
    assert mark.kwargs == {"reason": "needs transformers, which is not here: install the extra hf"}
    with pytest.raises(pytest.skip.Exception, match="needs transformers"):
        require("transformers")


@pytest.mark.usefixtures("_nothing_installed")
def test_what_is_missing_and_required_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGA_REQUIRE", "accelerate, transformers")
    for use in (requires, require):
        with pytest.raises(pytest.fail.Exception, match=r"needs transformers, .* \(MEGA_REQUIRE asks for it\)"):
            use("transformers")


def test_a_typing_error_does_not_pass_for_a_requirement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGA_REQUIRE", "transformer")
    with pytest.raises(pytest.fail.Exception, match="MEGA_REQUIRE names transformer; known are compiler, cuda, "):
        missing("transformers")
