"""Root on a node: `sudo` without a password, or with one that is asked for once and goes to sudo's standard input only."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from cluster.errors import FailedError
from cluster.transport.process import Process

# Seconds for sudo to come to the point: a wrong password costs 2 s, a directory service may take its time.
WITHIN = 30.0


class SudoError(FailedError):
    """Root was refused."""


class WrongPasswordError(SudoError):
    """sudo did not accept the password. It is forgotten, so the next command asks for it again."""


class Sudo:
    """The right to become root on both nodes, as far as the user has it there.

    `ask` gets a node's name and returns the password for `sudo` there, or None to give up; it is called once, and only if sudo
    wants one. The password lives in this object's memory and nowhere else.
    """

    def __init__(self, ask: Callable[[str], str | None] | None = None) -> None:
        self._ask = ask
        self._password: str | None = None
        self._asking = threading.Lock()

    def password(self, node: str) -> str | None:
        """The password; asks for it if that has not been done yet. None: there is none to be had."""
        with self._asking:  # both nodes may want it at once
            if self._password is None and self._ask is not None:
                self._password = self._ask(node)
            return self._password

    def forget(self) -> None:
        """Ask again next time."""
        with self._asking:
            self._password = None


@dataclass(frozen=True)
class Tokens:
    """Two words that nothing else prints: sudo's question for the password, and the sign that root has been reached."""

    prompt: str
    ready: str

    @classmethod
    def new(cls) -> Tokens:
        """Fresh ones: what a node prints in one run is of no use in another."""
        word = secrets.token_hex(8)
        return cls(f"[sparkctl-password-{word}]", f"[sparkctl-root-{word}]")


def elevated(argv: Sequence[str], tokens: Tokens) -> list[str]:
    """The argv that runs `argv` as root.

    The password is sent when the prompt is seen, and the command's own input only after the ready word: whether sudo asks for one
    or not, it can never reach the command.
    """
    announce = 'printf %s "$0"; printf %s "$0" >&2; exec "$@"'
    return ["sudo", "-S", "-p", tokens.prompt, "--", "sh", "-c", announce, tokens.ready, *argv]


def become_root(process: Process, sudo: Sudo, tokens: Tokens) -> None:
    """Talk a command made by `elevated` past sudo's question. Leaves in `process` only what came after.

    Raises:
        WrongPasswordError: sudo asked twice.
        SudoError: sudo wants a password and there is none to be had, or it refused for another reason.
    """
    prompt, ready = tokens.prompt.encode(), tokens.ready.encode()

    def reached() -> bool:
        return ready in process.stdout and ready in process.stderr

    try:
        if not process.listen(time.monotonic() + WITHIN, lambda: reached() or prompt in process.stderr):
            _refuse(process)
        if not reached():
            _give_password(process, sudo)
            if not process.listen(time.monotonic() + WITHIN, lambda: reached() or process.stderr.count(prompt) > 1):
                _refuse(process)
        if not reached():
            sudo.forget()
            _refuse_password(process)
    except BaseException:
        process.kill()
        raise
    for output in (process.stdout, process.stderr):
        del output[: output.index(ready) + len(ready)]


def _give_password(process: Process, sudo: Sudo) -> None:
    password = sudo.password(process.node)
    if password is None:
        raise SudoError(
            f"{process.node}: sudo wants a password, and there is nobody to ask for it",
            "run this on a terminal, or let this user use sudo without a password",
        )
    process.feed(password.encode() + b"\n", last=False)


def _refuse_password(process: Process) -> NoReturn:
    raise WrongPasswordError(f"{process.node}: sudo did not accept the password", "try again")


def _refuse(process: Process) -> NoReturn:
    said = process.stderr.decode(errors="replace").strip().splitlines()
    raise SudoError(
        f"{process.node}: sudo: {said[-1][:200] if said else 'ended without a word'}",
        "log in there as a user who may use sudo, and try `sudo true`",
    )
