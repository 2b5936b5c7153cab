"""The script beside an exported model, which runs it on an image without isoprune_hf: `write_script`."""

from collections.abc import Sequence
from pathlib import Path
from string import Template

from transformers import BaseImageProcessor

from isoprune_hf.checkpoint.image_processor import IsoImageProcessor
from isoprune_hf.export.formats import ExportFormat
from isoprune_hf.export.values import LOGITS

_CLASSIFY = "classify.py"
_EXTRACT = "extract.py"
PROCESSOR_FILE = "image_processing_isoprune.py"
_SCRIPT = """\
import {modules}
from pathlib import Path
import {package}
from {module} import {processor}
from PIL import Image
folder = Path(__file__).parent
processor = {processor}.from_pretrained(folder)
pixels = processor(Image.open(sys.argv[1]), return_tensors="np")["pixel_values"]
{result}
"""
_CLASS = """\
logits = {expression}
print(json.loads((folder / "config.json").read_text(encoding="utf-8"))["id2label"][str(logits.argmax())])"""
_ARRAY = """\
{name} = {expression}
numpy.save("{name}.npy", {name})
print({name}.shape)"""


def script_file(*, has_classes: bool) -> str:
    """Return the name of the script: a classifier names a class, other models save an output."""
    return _CLASSIFY if has_classes else _EXTRACT


def write_script(
    target: ExportFormat,
    processor: BaseImageProcessor,
    outputs: Sequence[str] = LOGITS,
    *,
    has_classes: bool = True,
) -> str:
    """Return a short program that prints the class of an image file, or saves the last output for it.

    The last one of several are the pooled features.

    Args:
        target: Format of the exported model.
        outputs: Names of its outputs.
        has_classes: They are logits of the classes of an image.
        processor: Its image processor. If it is one of this package, its code must be in `PROCESSOR_FILE`, which needs
            no torch; others are those of transformers.
    """
    package, expression = target.script
    number = len(outputs) - 1
    place = f"[{number}]" if number else ""
    expression = Template(expression).substitute(name=outputs[number], number=number, place=place)
    is_own = isinstance(processor, IsoImageProcessor)
    module, name = (
        (Path(PROCESSOR_FILE).stem, "IsoImageProcessor") if is_own else ("transformers", "AutoImageProcessor")
    )
    result = (_CLASS if has_classes else _ARRAY).format(name=outputs[number], expression=expression)
    modules = "json, sys" if has_classes else "numpy, sys"
    return _SCRIPT.format(modules=modules, package=package, result=result, module=module, processor=name)
