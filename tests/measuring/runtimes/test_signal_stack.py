"""Signals are handled after models of OpenVINO were opened and closed in any order."""

import signal

import pytest
from helpers.fresh_python import FreshPython

SIGNAL_AFTER_MODELS = """
import faulthandler, signal, sys
import numpy, openvino
from openvino import opset13

{before}
faulthandler.enable()  # as pytest and many programs do; it puts a signal stack in place
pixels = opset13.parameter([1, 3, 8, 8], numpy.float32)
logits = openvino.Model([opset13.relu(pixels)], [pixels], "one")
logits.output(0).get_tensor().set_names({{"logits"}})
first = {open}(logits)
second = {open}(logits)
del first
del second
signal.signal(signal.SIGUSR1, lambda number, frame: print("handled"))
signal.raise_signal(signal.SIGUSR1)
"""


def test_signals_survive_models_closed_in_order(fresh_python: FreshPython) -> None:
    pytest.importorskip("openvino")
    before = "from isoprune_hf.measuring.runtimes.openvino import open_openvino"
    done = fresh_python.run(SIGNAL_AFTER_MODELS.format(before=before, open="open_openvino"))
    assert (done.returncode, done.stdout) == (0, "handled\n"), done.stderr


@pytest.mark.export
@pytest.mark.skipif("not sys.platform.startswith('linux')")
def test_openvino_alone_loses_the_signal_stack(fresh_python: FreshPython) -> None:
    """Once this fails, OpenVINO has mended it and the guard can go."""
    pytest.importorskip("openvino")
    own = "openvino.Core().compile_model"
    script = SIGNAL_AFTER_MODELS.replace("{open}(logits)", f'{own}(logits, "CPU")')
    assert fresh_python.run(script.format(before="")).returncode == -signal.SIGSEGV
