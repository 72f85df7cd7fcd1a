"""What went wrong, in the two lines that a user reads, and the exit status that a script reads."""

from __future__ import annotations


class SparkctlError(Exception):
    """Something a user can act on: `message` says what was seen and where, `fix` what to do.

    Printed as at most two lines, without a traceback. The subclass decides the exit status.
    """

    status = 1

    def __init__(self, message: str, fix: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix


class FailedError(SparkctlError):
    """It was tried and failed: exit status 1."""


class PassingError(FailedError):
    """It failed for something that may pass, a full disk say: a job tries again. `echo`: the cause is what another rank tells."""

    def __init__(self, message: str, fix: str = "", *, echo: bool = False) -> None:
        super().__init__(message, fix)
        self.echo = echo


class WrongInputError(SparkctlError):
    """Wrong usage or a wrong input file: exit status 2; nothing was started or made."""

    status = 2


class RefusedError(SparkctlError):
    """Understood, but refused (does not fit, link below its bar, pair locked): exit status 3."""

    status = 3
