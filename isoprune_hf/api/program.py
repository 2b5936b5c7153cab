"""Write a module whose class cannot be imported as a program of `torch.export`, beside its weights: `save_program`."""

import json
import logging
import zipfile
from pathlib import Path

import torch
from safetensors.torch import save_model
from torch import Tensor, nn

from isoprune_hf.api.holding import share
from isoprune_hf.checkpoint.dense import LIBRARY_ERRORS, describe_error
from isoprune_hf.checkpoint.fingerprint import fingerprint
from isoprune_hf.checkpoint.folder import replace_folder, write_file
from isoprune_hf.errors import CheckpointError
from isoprune_hf.models.calling import CallForm, input_dtype
from isoprune_hf.models.nested import separate
from isoprune_hf.pruning.plan import PruningPlan
from isoprune_hf.version import __version__

logger = logging.getLogger(__name__)  # not accelerate's, which needs an accelerator

PROGRAM = "model.pt2"
_SAMPLES = (2, 3)  # batches that the program is compared on
_MAX_DIFFERENCE = 1e-5  # relative to the largest output: a traced operation may be computed by another kernel
_CARD = """---
library_name: pytorch
tags: [isoprune, pruned]
---

# {name}: a program of torch.export

A pruned `{kind}`, written by isoprune_hf {version} with torch {torch}. This folder has no config: `from_pretrained`
does not open it.

- `model.pt2`: the traced network in eval mode, for inputs {inputs}. Its Python code is not needed:
  `torch.export.load("model.pt2").module()`. The reader of torch may execute what is in such a file: open only one that
  you trust.
- `model.safetensors`: its weights by name, for the code that builds the network. There is no pickle in either file.
- `pruning_plan.json`: the channels that were kept.
"""


def save_program(folder: str | Path, module: nn.Module, form: CallForm, plan: PruningPlan) -> None:
    """Write the folder of a program, whole or not at all; the program must compute the same as the module.

    Args:
        folder: Folder to write.
        module: The pruned module; left untouched.
        form: Its inputs.
        plan: The plan.

    Raises:
        CheckpointError: The module cannot be traced, the program computes other outputs or would contain a pickle, or
            the folder cannot be written.
    """
    kind = type(module).__name__
    plain = share(module).cpu().eval()
    batches = [_draw(form, plain, samples) for samples in _SAMPLES]

    def write(temporary: Path) -> None:
        try:
            _write_program(temporary / PROGRAM, plain, form, batches[0])
            program = torch.export.load(temporary / PROGRAM).module()
            for inputs in batches:
                _compare(_run(plain, form, inputs), _run(program, form, inputs), kind)
        except CheckpointError:
            raise
        except LIBRARY_ERRORS as error:  # of torch.export
            raise CheckpointError(
                f"{kind} is not a model of timm, torchvision or transformers with known arguments, and cannot be "
                f"traced by torch.export: {describe_error(error)}; pass the class or function that builds it as "
                "builder=, with its arguments"
            ) from error
        save_model(plain, str(temporary / "model.safetensors"))
        write_file(temporary / "pruning_plan.json", plan.to_json())
        taken = [{"name": name, "shape": [*shape]} for name, shape in zip(form.names, form.shapes, strict=True)]
        record = {
            "format": "torch.export",
            "class": kind,
            "inputs": taken,
            "weights": fingerprint(plain),
            "versions": {"torch": torch.__version__, "isoprune_hf": __version__},
        }
        write_file(temporary / "program.json", json.dumps(record, indent=2, sort_keys=True) + "\n")
        shapes = ", ".join(f"(B, {', '.join(map(str, shape))})" for shape in form.shapes)
        card = _CARD.format(
            name=Path(folder).name, kind=kind, version=__version__, torch=torch.__version__, inputs=shapes
        )
        write_file(temporary / "README.md", card)

    replace_folder(folder, write)
    logger.warning(
        f"{folder} holds {kind} as a program of torch.export, which from_pretrained does not open: what builds it is "
        "not known; pass the class or function as builder=, with its arguments, for a folder that opens as the class"
    )


def _draw(form: CallForm, module: nn.Module, samples: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    dtype = input_dtype(module)
    return [torch.randn(samples, *shape, generator=generator).to(dtype) for shape in form.shapes]


def _run(module: nn.Module, form: CallForm, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    with torch.no_grad():
        outputs, _ = separate(form.call(module, inputs))
    return outputs


def _write_program(file: Path, module: nn.Module, form: CallForm, inputs: list[Tensor]) -> None:
    """Trace a module for batches of any size and write the program.

    Raises:
        CheckpointError: The file contains a pickle.
    """
    pairs = [*zip(form.names, inputs, strict=True)]
    program = torch.export.export(
        module,
        tuple(value for name, value in pairs if name is None),
        {name: value for name, value in pairs if name is not None},
        dynamic_shapes=[{0: torch.export.Dim.AUTO}] * len(pairs),
        strict=False,
    )
    program.example_inputs = None  # they would be saved as a pickle
    torch.export.save(program, file)
    with zipfile.ZipFile(file) as archive:
        if [name for name in archive.namelist() if _is_pickle(archive, name)]:
            raise CheckpointError(
                f"{PROGRAM}: a tensor would be a pickle; the module has tensors of a class of its own"
            )


def _is_pickle(archive: zipfile.ZipFile, name: str) -> bool:
    """Return whether a part of a program is unpickled when it is opened: by a list of tensors, or inputs."""
    if "/sample_inputs/" in name:
        return archive.getinfo(name).file_size > 0
    if not name.endswith("_config.json"):
        return name.endswith(".pt")
    entries = json.loads(archive.read(name))["config"].values()
    return any(entry["use_pickle"] for entry in entries)


def _compare(expected: tuple[Tensor, ...], found: tuple[Tensor, ...], kind: str) -> None:
    """Compare outputs.

    Raises:
        CheckpointError: They differ.
    """
    for wanted, given in zip(expected, found, strict=True):
        limit = _MAX_DIFFERENCE * float(wanted.abs().max())
        if wanted.shape != given.shape or not torch.allclose(wanted, given, rtol=0, atol=limit, equal_nan=True):
            raise CheckpointError(
                f"{kind} is not saved: its program of torch.export returns other outputs; pass the class or function "
                "that builds it as builder=, with its arguments"
            )
