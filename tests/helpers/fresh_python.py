"""Scripts in clean processes: one helper interpreter imports torch and transformers once and forks for each script.

A script sees neither this package nor what the tests have imported, as in an interpreter of its own, but starts at
once. `FreshPython.run` is what tests call; the fixture `fresh_python` of tests/conftest.py holds the interpreter.
"""

import gc
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple


class Finished(NamedTuple):
    """The exit code of a script and the text it wrote."""

    returncode: int
    stdout: str
    stderr: str


class FreshPython:
    """The helper interpreter; `folder` is its Hugging Face home and holds the output of the scripts."""

    def __init__(self, folder: Path):
        self._folder, self._count = folder, 0
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {"HF_HOME": str(folder / "hf_home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(
        self,
        code: str,
        *arguments: object,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        absent: Sequence[str] = (),
    ) -> Finished:
        """Run a script to its end.

        Args:
            code: The script.
            arguments: Its `sys.argv[1:]`.
            cwd: The folder it runs in; None for an empty one.
            env: Variables that it sees besides those of the helper interpreter.
            absent: Packages that it cannot import.
        """
        self._count += 1
        folder = self._folder / str(self._count)
        folder.mkdir()
        request = {"code": code, "arguments": [str(argument) for argument in arguments], "output": str(folder)}
        request |= {"cwd": str(cwd or folder), "env": dict(env or {}), "absent": list(absent)}
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        out, err = ((folder / name).read_text(encoding="utf-8") for name in ("out", "err"))
        return Finished(int(answer), out, err)

    def close(self) -> None:
        """End the helper interpreter; closing its input would not, if a process forked since then holds it open."""
        self._process.terminate()
        with self._process:
            pass


def _serve() -> None:
    gc.disable()
    import safetensors.torch
    import torchvision.transforms.v2
    from PIL import Image
    from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, pipeline

    assert all((safetensors.torch, torchvision.transforms.v2, Image, AutoConfig, AutoImageProcessor, pipeline))
    assert AutoModelForImageClassification
    gc.freeze()
    gc.enable()
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            _run(json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _run(request: dict[str, Any]) -> None:
    for name, descriptor in (("out", 1), ("err", 2)):
        os.dup2(os.open(Path(request["output"], name), os.O_WRONLY | os.O_CREAT), descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(request["cwd"])
    os.environ.update(request["env"])
    sys.modules.update(dict.fromkeys(request["absent"]))  # importing a name whose module is None raises
    sys.argv = ["-c", *request["arguments"]]
    sys.modules["__main__"] = ModuleType("__main__")
    code = 1
    try:
        exec(compile(request["code"], "<script>", "exec"), sys.modules["__main__"].__dict__)
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
    finally:
        if sys.exc_info()[0] is not None:  # nothing rises past os._exit
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
