"""The package on Windows: without the modules and signals that only Unix has."""

from pathlib import Path

import pytest
from helpers.fresh_python import FreshPython

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "tests" / "fixtures" / "folders_0.1.0.dev0" / "vit"
# Takes away what Windows lacks, modules only from this package, and runs the script that continuous integration runs.
WINDOWS = f"""
import builtins
import os
import runpy
import signal
import sys

def refuse(name, globals=None, *rest, load=builtins.__import__):
    importer = (globals or {{}}).get("__name__", "")
    if importer.startswith("isoprune_hf") and name in ("fcntl", "grp", "pwd", "pty", "resource", "termios", "tty"):
        raise ModuleNotFoundError(f"{{importer}} imports {{name}}", name=name)
    return load(name, globals, *rest)

builtins.__import__ = refuse
for name in ("SIGALRM", "SIGHUP", "SIGUSR1", "SIGUSR2", "ITIMER_REAL", "setitimer", "alarm", "pthread_sigmask"):
    delattr(signal, name)
for name in ("fork", "geteuid", "killpg", "setsid", "fchmod"):
    delattr(os, name)
sys.path.insert(0, {str(ROOT)!r})
sys.argv = ["smoke.py", {str(FOLDER)!r}]
runpy.run_path({str(ROOT / ".ci" / "smoke.py")!r}, run_name="__main__")
"""


@pytest.mark.launch
def test_package_works_without_unix_only_modules(fresh_python: FreshPython) -> None:
    done = fresh_python.run(WINDOWS)
    assert done.returncode == 0, done.stderr
    assert "saved and opened again with the same answer" in done.stdout
