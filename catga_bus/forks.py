"""Whether this process is a fork of the one in which something was made, told without a system call.

`os.getpid()` costs 0.1 to 1 microseconds, and every call would pay it.
"""

import os

count = 0
"""How many forks lie between the first interpreter and this one."""


def _forked() -> None:
    global count
    count += 1


if hasattr(os, "register_at_fork"):  # not on Windows, which knows no forks
    os.register_at_fork(after_in_child=_forked)
