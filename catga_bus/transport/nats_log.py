"""What happens to a connection, as log lines that name the server and the client and no secret."""

import logging
from collections.abc import Callable

_logger = logging.getLogger("catga_bus.transport")

_QUIET_SECONDS = 1.0
# Of one kind of line at most one a second is written, with the number of those left out: a denied
# subject or a sink that raises can fail with every message.

_MAX_KINDS = 256
# Kinds remembered; forgotten all at once when full, which costs some lines that repeat too soon.


class ConnectionLog:
    """Writes the lines of one client.

    Args:
        name: The client's name, as the server shows it.
        now: Returns seconds that only rise.
    """

    def __init__(self, name: str, now: Callable[[], float]) -> None:
        self._name = name
        self._now = now
        self._quiet: dict[str, tuple[float, int]] = {}
        # By kind: when it may speak again, and how many lines were left out since it last did.

    def write(self, level: int, text: str, *args: object) -> None:
        """Write a line."""
        _logger.log(level, "%s: %s", self._name, text % args)

    def write_rarely(self, level: int, kind: str, text: str, *args: object, error: BaseException | None = None) -> None:
        """Write a line unless one of its kind was written within the last second.

        Args:
            level: As in `logging`.
            kind: What counts as the same line.
            text: Format of the line.
            *args: For the format.
            error: Its traceback goes with the line.
        """
        now = self._now()
        free_at, left_out = self._quiet.get(kind, (0.0, 0))
        if now < free_at:
            self._quiet[kind] = (free_at, left_out + 1)
            return
        if len(self._quiet) >= _MAX_KINDS:
            self._quiet.clear()
        self._quiet[kind] = (now + _QUIET_SECONDS, 0)
        more = f" ({left_out} more like it before)" if left_out else ""
        _logger.log(level, "%s: %s%s", self._name, text % args, more, exc_info=error)
