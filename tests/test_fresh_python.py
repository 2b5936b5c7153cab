"""The helper interpreter of the tests."""

import os
import signal
import time
from pathlib import Path

from helpers.fresh_python import FreshPython


def test_helper_ends_while_forked_process_holds_its_input(tmp_path: Path) -> None:
    helper = FreshPython(tmp_path)
    child = os.fork()
    if child == 0:
        time.sleep(120)
        os._exit(0)
    try:
        begin = time.monotonic()
        helper.close()
        assert time.monotonic() - begin < 60
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
