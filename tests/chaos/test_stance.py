"""What the rig sees of a process that it stops."""

import os
import signal
import subprocess
import sys

from catga_bus.testing import eventually
from tests.chaos.processes import stance


async def test_the_system_says_whether_a_process_stands_still() -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        try:
            assert stance(process.pid) == "going"
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
            assert stance(process.pid) == "stopped"
            process.send_signal(signal.SIGCONT)
            await eventually(lambda: stance(process.pid) == "going")
        finally:
            process.kill()
