"""The script beside an exported model, which classifies an image without isoprune_hf: `write_script`."""

from isoprune_hf.export.formats import ExportFormat

SCRIPT_FILE = "classify.py"
_SCRIPT = """\
import json, sys
from pathlib import Path
import {package}
from PIL import Image
from transformers import AutoImageProcessor
folder = Path(__file__).parent
processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
pixels = processor(Image.open(sys.argv[1]), return_tensors="np")["pixel_values"]
logits = {logits}
print(json.loads((folder / "config.json").read_text(encoding="utf-8"))["id2label"][str(logits.argmax())])
"""


def write_script(target: ExportFormat) -> str:
    """Return a program of ten lines that prints the class of an image file, for a format."""
    package, logits = target.script
    return _SCRIPT.format(package=package, logits=logits)
