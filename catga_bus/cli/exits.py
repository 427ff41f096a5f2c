"""How commands end: exit codes, and the one line that says why."""

from enum import IntEnum

from catga_bus.errors import (
    AuthenticationError,
    BusStateError,
    CallError,
    CatgaError,
    ConfigurationError,
    DisconnectedError,
    RegistrationError,
)


class ExitCode(IntEnum):
    """What a command tells the shell."""

    OK = 0
    FAILED = 1
    USAGE = 2
    UNREACHABLE = 3
    BUG = 70
    INTERRUPTED = 130


EXIT_CODES_HELP = """\b
Exit codes:
    0  done; also `up`, `run` and `nodes --watch` ended by SIGTERM or Ctrl-C with nothing left unfinished
    1  the call failed or was refused, or a verdict was negative
    2  wrong usage or configuration: change the command, the module or the file
    3  no server could be reached or started, or it refused the credentials
   70  a bug; run again with --debug and report what it shows
  130  interrupted
"""


def exit_code_of(error: CatgaError) -> ExitCode:
    """Return the exit code that stands for an error of the bus."""
    if isinstance(error, DisconnectedError | AuthenticationError):
        return ExitCode.UNREACHABLE
    if isinstance(error, ConfigurationError | RegistrationError | BusStateError):
        return ExitCode.USAGE
    return ExitCode.FAILED


def text_of(error: CatgaError) -> str:
    """Return the line that says what went wrong; a failed call says its code and outcome, too."""
    # A server that is not there needs no code of the bus to be understood.
    return error.message if isinstance(error, DisconnectedError) else str(error)


def facts_of(error: CallError) -> dict[str, object]:
    """Return a failed call as the object that `--json` prints."""
    return {
        "ok": False,
        "code": error.code,
        "message": error.message,
        "details": error.details,
        "outcome": str(error.outcome),
        "retryable": error.retryable,
        "attempts": error.attempts,
        "node": error.node,
    }
