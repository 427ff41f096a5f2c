"""Log lines that a stranger can cause: each kind once in a while, with the number left out in between."""

import logging

from catga_bus.clock import Clock

QUIET_SECONDS = 5.0
# Chosen: an operator sees within seconds that something goes on, and a flood of bad messages writes twelve
# lines a minute instead of filling the disk.

_MAX_KINDS = 1_000


class RareLog:
    """Writes a line of each kind at most once in `QUIET_SECONDS`.

    Args:
        logger: Where lines go.
        clock: Monotonic seconds.
    """

    def __init__(self, logger: logging.Logger, clock: Clock) -> None:
        self._logger = logger
        self._clock = clock
        self._kinds: dict[str, tuple[float, int]] = {}  # when the next line may come, and how many were left out

    def write(self, level: int, kind: str, text: str, *args: object, error: BaseException | None = None) -> None:
        """Write a line, unless one of its kind was written a moment ago.

        Args:
            level: Of the logging module.
            kind: Lines of one kind stand for each other.
            text: As for `logging`.
            *args: For the `%s` and the like in it.
            error: Its traceback is added.
        """
        now = self._clock()
        due, left_out = self._kinds.get(kind, (0.0, 0))
        if now < due:
            self._kinds[kind] = (due, left_out + 1)
            return
        if len(self._kinds) >= _MAX_KINDS:
            self._kinds.clear()
        self._kinds[kind] = (now + QUIET_SECONDS, 0)
        more = f" (and {left_out} more like it)" if left_out else ""
        self._logger.log(level, text + "%s", *args, more, exc_info=error)  # noqa: G003 - a format, not a value

    def warn(self, kind: str, text: str, *args: object) -> None:
        """Write a warning, unless one of its kind was written a moment ago."""
        self.write(logging.WARNING, kind, text, *args)
