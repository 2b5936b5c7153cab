"""Images for an export (`ExportImages`): calibration, and figures of the exported model in its own runtime."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from isoprune_hf.checkpoint.folder import read_json, write_file
from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneForImageClassification
from isoprune_hf.commands.steps.opening import evaluation_split, with_data_transform
from isoprune_hf.commands.steps.sources import align_images
from isoprune_hf.data.dataset import ImageData, load_data
from isoprune_hf.data.loading import CalibrationBatches, LoaderOptions
from isoprune_hf.data.streaming import calibration_split
from isoprune_hf.errors import RecipeError
from isoprune_hf.evaluation.evaluate import compute_figures, predict_split
from isoprune_hf.evaluation.predictions import Predictions
from isoprune_hf.export.comparison import Export
from isoprune_hf.export.export import fingerprint_weights
from isoprune_hf.export.formats import FORMATS, Format
from isoprune_hf.export.running import ExportedModel, ExportedOutputs
from isoprune_hf.export.values import ExportPrecision
from isoprune_hf.measuring.exported import ExportedFile
from isoprune_hf.measuring.runtimes.onnx_runtime import Run
from isoprune_hf.models import BaseModel
from isoprune_hf.models.held import HeldModel, output_shapes
from isoprune_hf.recipes import DataRecipe
from isoprune_hf.recipes.values import RuntimeName
from isoprune_hf.reporting.export_card import build_export_card
from isoprune_hf.reporting.ornaments import ornament
from isoprune_hf.reporting.tables import Metrics
from isoprune_hf.tasks.registry import find_task

_BATCH = 16  # images of a calibration batch
_SEED = 0
_TIMED: Mapping[Format, RuntimeName] = {"onnx": "onnxruntime", "openvino": "openvino"}


@dataclass(frozen=True)
class ExportImages:
    """The labelled images of an export, numbered by the classes of the model.

    Attributes:
        data: How they are read.
        images: The two splits.
        base: The model, with the evaluation transform of the data section.
    """

    data: DataRecipe
    images: ImageData
    base: BaseModel

    def calibration(self, count: int) -> list[np.ndarray]:
        """Return batches of pixels (B, C, H, W) of so many training images, drawn with a fixed seed."""
        batches = CalibrationBatches(
            calibration_split(self.images, count, _SEED),
            self.base.processor,
            LoaderOptions(_BATCH, self.data.num_workers, self.images.decoding),
            batches=math.ceil(count / _BATCH),
            seed=_SEED,
        )
        pixels = [batch.numpy() for batch, _ in batches]
        pixels[-1] = pixels[-1][: count - sum(map(len, pixels[:-1]))]
        return [batch for batch in pixels if len(batch)]

    def measure(self, exported: Run, precision: ExportPrecision) -> Metrics:
        """Return the figures of the model in PyTorch and of the exported one, by name of the table row."""
        stage = self.base.model.config.stage
        size = sum(tensor.nbytes for tensor in self.base.model.state_dict().values()) / 1e6
        if isinstance(self.base.model, HeldModel):
            return self._compare(self.base.model, exported, {stage: size}, f"{stage}+{precision}")
        before, after = self._predict(self.base.model), self._predict(ExportedModel(exported))
        same = before.agreement(after)
        first, second = (self.images.with_provenance(compute_figures(found)) for found in (before, after))
        return {stage: {**first, "file_mb": size}, f"{stage}+{precision}": {**second, "agreement": same}}

    def _compare(self, model: HeldModel, exported: Run, sizes: Mapping[str, float], name: str) -> Metrics:
        """Return the figures of a model that is measured by another one: the exported one by that of PyTorch."""
        (stage,) = sizes
        found = HeldModel(model.config, ExportedOutputs(exported, output_shapes(model)), model.objective)
        split, options = evaluation_split(self.images, self.data), self._options
        pairs = ((stage, model, None), (name, found, model))
        figures = {
            row: self.images.with_provenance(
                find_task(model.config).evaluate(each, other, split, self.base.processor, options)
            )
            for row, each, other in pairs
        }
        return {stage: {**figures[stage], "file_mb": sizes[stage]}, name: figures[name]}

    @property
    def _options(self) -> LoaderOptions:
        return LoaderOptions(self.data.batch_size, self.data.num_workers, self.images.decoding)

    def _predict(self, model: nn.Module) -> Predictions:
        split = evaluation_split(self.images, self.data)
        return predict_split(model, split, self.base.processor, self._options)


def open_export_images(data: DataRecipe, base: BaseModel) -> ExportImages:
    """Open the images of an export.

    Raises:
        DatasetError: They cannot be opened, have no split for evaluation, or have other classes than the model.
    """
    images = align_images(load_data(data), base.model)
    evaluation_split(images, data)
    return ExportImages(data, images, with_data_transform(base, data))


def read_exported(place: str, model: IsoPruneForImageClassification) -> ExportedFile:
    """Find the file of an exported folder that a benchmark can time.

    Args:
        place: The folder.
        model: The model that it must have been exported from.

    Raises:
        RecipeError: It is no folder of an export, its format is not timed, or it is of other weights.
    """
    record = read_json(place, "export.json")
    if record is None:
        raise RecipeError(f"--exported {place} is not a folder that isoprune export wrote")
    target: Format | None = next((name for name in _TIMED if name == record.get("format")), None)
    if target is None:
        allowed = " and ".join(_TIMED)
        raise RecipeError(f"--exported {place} has the format {record.get('format')}; {allowed} are timed")
    if record.get("weights") != fingerprint_weights(model):
        raise RecipeError(f"--exported {place} is of other weights than --folder: export the model again")
    return ExportedFile(_TIMED[target], str(record.get("precision")), Path(place, FORMATS[target].file))


def write_results(folder: Path, name: str, exported: Export, metrics: Metrics) -> None:
    """Write the card and the figures of an export, to which the size of its files is added in place."""
    if metrics:
        # All files of the model: OpenVINO has two, ONNX beyond 2 GB as well, and Core ML has a folder.
        stem = Path(exported.file).stem
        files = [*folder.glob(f"{stem}.*"), *folder.glob(f"{stem}.*/**/*")]
        metrics[list(metrics)[-1]]["file_mb"] = sum(file.stat().st_size for file in files if file.is_file()) / 1e6
        write_file(folder / "metrics.json", json.dumps(metrics, indent=2, sort_keys=True) + "\n")
    card = None
    with ornament("the card"):
        card = str(build_export_card(folder, name=name))
    if card is not None:  # a disk that is full for the card is full for the model, and ends the export
        write_file(folder / "README.md", card)
