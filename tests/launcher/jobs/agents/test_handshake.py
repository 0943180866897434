"""Two ends that prove to each other that they know the token, and what nobody else can make them believe."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from launcher.jobs.agents.handshake import Seal, StrangerError, answer, new_nonce, take_answer


def _meet() -> tuple[Seal, Seal, list[bytes]]:
    """Who comes, who listens, and what was to be heard on the way."""
    nonce = new_nonce()
    words, listens = answer("secret", nonce)
    return take_answer("secret", nonce, words), listens, [nonce, words]


def test_who_knows_the_token_is_heard_and_the_token_is_not() -> None:
    comes, listens, heard = _meet()
    for line in (b"one", b"", b"one", b"x" * 1_000_000):
        for one, other in ((comes, listens), (listens, comes)):
            heard.append(one.seal(line))
            assert other.open(heard[-1]) == line
    assert not any(b"secret" in words for words in heard)
    assert len(set(heard)) == len(heard)


def test_who_comes_sees_who_does_not_know_the_token() -> None:
    nonce = new_nonce()
    guessed, _ = answer("guess", nonce)
    replayed, _ = answer("secret", new_nonce())
    for words in (guessed, replayed, b"", nonce, nonce + nonce, guessed[:32]):
        with pytest.raises(StrangerError):
            take_answer("secret", nonce, words)


@pytest.mark.parametrize("first_line", [b"", b"x" * 31, b"x" * 33, b"GET / HTTP/1.1"])
def test_what_is_no_nonce_is_not_answered(first_line: bytes) -> None:
    with pytest.raises(StrangerError):
        answer("secret", first_line)


@pytest.mark.parametrize(
    "harm",
    [
        lambda comes, listens: b"unsealed",
        lambda comes, listens: comes.seal(b"one")[:-1] + b"f",
        lambda comes, listens: [comes.seal(b"one"), comes.seal(b"two")][1],
        lambda comes, listens: listens.seal(b"its own word"),
        lambda comes, listens: _meet()[0].seal(b"of another connection"),
    ],
    ids=["unsealed", "changed", "left out", "given back", "replayed"],
)
def test_a_line_that_is_not_the_next_of_the_other_end_is_refused(harm: Callable[[Seal, Seal], bytes]) -> None:
    comes, listens, _ = _meet()
    with pytest.raises(StrangerError):
        listens.open(harm(comes, listens))


def test_a_line_is_heard_once() -> None:
    comes, listens, _ = _meet()
    line = comes.seal(b"one")
    assert listens.open(line) == b"one"
    with pytest.raises(StrangerError):
        listens.open(line)
