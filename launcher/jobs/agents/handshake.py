"""How two ends of a connection prove to each other that they know the job's token, which itself is never sent.

Who comes sends a nonce of its own; who listens answers with another, and proves that it knows the token: whoever else listens
at that port learns nothing, and is not obeyed. Every line after that carries a proof too, HMAC-SHA256 under a key that both
nonces make, one for each direction, over its number and its words: so who listens knows who comes, and nobody between the two
can say, change, repeat or leave out a line. What is said can be read: this is no encryption.
"""

from __future__ import annotations

import hmac
import secrets

_NONCE_LENGTH = 32
_PROOF_LENGTH = 32
"""Hexadecimal digits: 128 bits."""


class StrangerError(Exception):
    """Who is at the other end has not proved that it knows the token."""


class Seal:
    """One end of a connection, once both nonces are known."""

    def __init__(self, *, own_key: bytes, other_key: bytes) -> None:
        self._own_key = own_key
        self._other_key = other_key
        self._said = 0
        self._heard = 0

    def seal(self, line: bytes) -> bytes:
        """The next line to be sent, with its proof before it. Lines must be sent in the order of these calls."""
        self._said += 1
        return _proof(self._own_key, self._said, line) + line

    def open(self, sealed: bytes) -> bytes:
        """The line that the other end has given to `seal`. Raises StrangerError where it is not its next one."""
        self._heard += 1
        line = sealed[_PROOF_LENGTH:]
        if not hmac.compare_digest(sealed[:_PROOF_LENGTH], _proof(self._other_key, self._heard, line)):
            raise StrangerError("it says what nobody says who knows the token of this job")
        return line


def new_nonce() -> bytes:
    """The first line of who comes."""
    return secrets.token_hex(_NONCE_LENGTH // 2).encode()


def answer(token: str, first_line: bytes) -> tuple[bytes, Seal]:
    """The first line of who listens, to one that began with `first_line`. Raises StrangerError where that is no nonce."""
    if len(first_line) != _NONCE_LENGTH:
        raise StrangerError("it does not begin with a nonce")
    own = new_nonce()
    keys = _Keys(token, first_line, own)
    return own + keys.proof, Seal(own_key=keys.of_who_listens, other_key=keys.of_who_comes)


def take_answer(token: str, nonce: bytes, line: bytes) -> Seal:
    """For who has come with `nonce`, and was answered `line`. Raises StrangerError where that proves nothing."""
    other, proof = line[:_NONCE_LENGTH], line[_NONCE_LENGTH:]
    keys = _Keys(token, nonce, other)
    if len(other) != _NONCE_LENGTH or not hmac.compare_digest(proof, keys.proof):
        raise StrangerError("it does not know the token of this job: perhaps it belongs to another one")
    return Seal(own_key=keys.of_who_comes, other_key=keys.of_who_listens)


class _Keys:
    def __init__(self, token: str, nonce_of_who_comes: bytes, nonce_of_who_listens: bytes) -> None:
        # Each for one use alone: what one end says can never be given back to it as the other's word.
        nonces = nonce_of_who_comes + nonce_of_who_listens
        self.proof, self.of_who_comes, self.of_who_listens = (
            hmac.digest(token.encode(), use + nonces, "sha256").hex().encode()
            for use in (b"proof:", b"comes:", b"listens:")
        )


def _proof(key: bytes, number: int, line: bytes) -> bytes:
    made = hmac.new(key, number.to_bytes(8, "big"), "sha256")
    made.update(line)
    return made.hexdigest()[:_PROOF_LENGTH].encode()
