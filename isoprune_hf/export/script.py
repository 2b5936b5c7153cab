"""The script beside an exported model, which classifies an image without isoprune_hf: `write_script`."""

from pathlib import Path

from transformers import BaseImageProcessor

from isoprune_hf.checkpoint.image_processor import IsoImageProcessor
from isoprune_hf.export.formats import ExportFormat

SCRIPT_FILE = "classify.py"
PROCESSOR_FILE = "image_processing_isoprune.py"
_SCRIPT = """\
import json, sys
from pathlib import Path
import {package}
from {module} import {processor}
from PIL import Image
folder = Path(__file__).parent
processor = {processor}.from_pretrained(folder)
pixels = processor(Image.open(sys.argv[1]), return_tensors="np")["pixel_values"]
logits = {logits}
print(json.loads((folder / "config.json").read_text(encoding="utf-8"))["id2label"][str(logits.argmax())])
"""


def write_script(target: ExportFormat, processor: BaseImageProcessor) -> str:
    """Return a program of ten lines that prints the class of an image file.

    Args:
        target: Format of the exported model.
        processor: Its image processor. If it is one of this package, its code must be in `PROCESSOR_FILE`, which needs
            no torch; others are those of transformers.
    """
    package, logits = target.script
    is_own = isinstance(processor, IsoImageProcessor)
    module, name = (
        (Path(PROCESSOR_FILE).stem, "IsoImageProcessor") if is_own else ("transformers", "AutoImageProcessor")
    )
    return _SCRIPT.format(package=package, logits=logits, module=module, processor=name)
