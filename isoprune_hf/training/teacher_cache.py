"""The teacher's logits for views that never change: computed once, then read from files.

The folder `teacher_cache` has one folder per key, shared by all trainings with this key. It contains shards such as
`logits-00002.safetensors`: the logits of the images at the positions 8192 to 12287 of the split, in the type that the
teacher returns. A shard is written whole or not at all, and an existing shard is not computed again.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BaseImageProcessor

from isoprune_hf.checkpoint.fingerprint import fingerprint
from isoprune_hf.checkpoint.folder import replace_file
from isoprune_hf.data.dataset import ImageData
from isoprune_hf.data.loading import ImageLoader, LoaderOptions, view_loader
from isoprune_hf.data.pixels import Transform, normalised
from isoprune_hf.data.streaming import map_style_split
from isoprune_hf.errors import CheckpointError, RecipeError
from isoprune_hf.recipes import FinetuneRecipe
from isoprune_hf.terminal import with_progress
from isoprune_hf.training.acceleration import autocast
from isoprune_hf.training.teacher import Teacher, TeacherModel, TeacherOutputs

logger = get_logger(__name__)

_SHARD_IMAGES = 4096
_PROBE_IMAGES = 64  # their pixels are part of the key


class CachedTeacher:
    """Reads the logits of a teacher from a folder; the teacher runs only for the shards that are missing.

    All ranks call this. Each rank computes a part of the missing shards, so all ranks must see the same folder.

    Args:
        teacher: The teacher; moved to the device only if shards are missing.
        data: The images are in its `train` split.
        transform: Makes the views of the images, the same in each epoch.
        processor: The student's image processor, which belongs to the transform.
        recipe: The folder, as `teacher_cache`, and the precision of the teacher.
        accelerator: The ranks.
        options: How the images are loaded for the missing shards.

    Raises:
        CheckpointError: A shard cannot be written, or does not exist on this rank.
    """

    def __init__(
        self,
        teacher: TeacherModel,
        data: ImageData,
        transform: Transform,
        processor: BaseImageProcessor,
        recipe: FinetuneRecipe,
        accelerator: Accelerator,
        options: LoaderOptions,
    ):
        if recipe.teacher_cache is None:
            raise RecipeError("finetune.teacher_cache is not set; set it to a folder")
        self._data = data
        self._split = map_style_split(data)
        self._transform = transform
        self._processor = processor
        self._recipe = recipe
        self._accelerator = accelerator
        self._options = options
        images = len(self._split)
        key = [self._key(teacher) if accelerator.is_main_process else ""]
        self.folder: Path = Path(recipe.teacher_cache).expanduser() / broadcast_object_list(key)[0]
        shards = [range(first, min(first + _SHARD_IMAGES, images)) for first in range(0, images, _SHARD_IMAGES)]
        missing = [number for number, shard in enumerate(shards) if self._read(number, shard) is None]
        accelerator.wait_for_everyone()  # all ranks have the same list
        if missing:
            count = sum(len(shards[number]) for number in missing)
            logger.info(f"teacher: computing the logits of {count:,} images for {self.folder}")
            self._fill(teacher, {number: shards[number] for number in missing})
            accelerator.wait_for_everyone()
        else:
            logger.info(f"teacher: reading the logits of {images:,} images from {self.folder}")
        # Mapped into memory, not read: the operating system keeps what fits.
        self._shards = [self._open(number, shard) for number, shard in enumerate(shards)]

    def __call__(self, pixel_values: Tensor, positions: Tensor) -> tuple[Tensor]:
        """Return the logits (B, C) of the images at the positions, on the device of the pixel values."""
        logits = torch.stack(
            [self._shards[place // _SHARD_IMAGES][place % _SHARD_IMAGES] for place in positions.tolist()]
        )
        return (logits.to(pixel_values.device, non_blocking=True),)

    def _key(self, teacher: TeacherModel) -> str:
        """Return a digest of everything that the logits depend on; a few images represent transform and files."""
        recipe, images = self._recipe, len(self._split)
        probes = sorted({images * number // _PROBE_IMAGES for number in range(_PROBE_IMAGES)})
        pixels = hashlib.sha256()
        for batch in self._load([probes]):
            pixels.update(normalised(batch.pixels, self._processor).contiguous().numpy().tobytes())
        decoding = self._data.decoding
        facts = {
            "teacher": fingerprint(teacher.model),
            "normalisation": None if teacher.processor is None else json.loads(teacher.processor.to_json_string()),
            "data": [self._data.fingerprint, images, pixels.hexdigest()],
            "decoding": [decoding.broken, decoding.exif],
            "precision": [recipe.precision, recipe.teacher_precision, recipe.channels_last, recipe.torch_compile],
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def _load(self, batches: Sequence[Sequence[int]]) -> ImageLoader:
        return view_loader(self._split, batches, self._transform, self._options)

    def _path(self, number: int) -> Path:
        return self.folder / f"logits-{number:05d}.safetensors"

    def _read(self, number: int, shard: range) -> Tensor | None:
        """Map a shard into memory; return None if it does not exist or is damaged."""
        try:
            logits = load_file(self._path(number)).get("logits")
        except (OSError, SafetensorError):
            return None
        return logits if logits is not None and logits.ndim == 2 and len(logits) == len(shard) else None

    def _open(self, number: int, shard: range) -> Tensor:
        logits = self._read(number, shard)
        if logits is None:
            raise CheckpointError(
                f"finetune.teacher_cache: {self.folder} lacks logits on rank {self._accelerator.process_index}; all "
                "ranks must see the same files"
            )
        return logits

    def _fill(self, teacher: TeacherModel, missing: dict[int, range]) -> None:
        """Compute this rank's part of the missing shards."""
        accelerator = self._accelerator
        processors = None if teacher.processor is None else (self._processor, teacher.processor)
        network = Teacher(teacher.model, self._recipe, device=accelerator.device, processors=processors)
        numbers = list(missing)[accelerator.process_index :: accelerator.num_processes]
        for number, logits in self._compute(network, {number: missing[number] for number in numbers}):
            replace_file(self._path(number), partial(save_file, {"logits": logits}))

    def _compute(self, teacher: Teacher, shards: dict[int, range]) -> Iterator[tuple[int, Tensor]]:
        """Yield the logits (N, C) of shards, on the CPU."""
        device, size = self._accelerator.device, self._options.batch_size
        pieces = [(n, shard[at : at + size]) for n, shard in shards.items() for at in range(0, len(shard), size)]
        loader, rank = self._load([piece for _, piece in pieces]), self._accelerator.process_index
        loaded = zip(pieces, with_progress(loader, "teacher's logits", "batch", rank=rank), strict=True)
        for number, of_shard in itertools.groupby(loaded, key=lambda pair: pair[0][0]):
            parts = []
            for _, batch in of_shard:
                pixel_values = normalised(batch.pixels.to(device, non_blocking=True), self._processor)
                with autocast(device, self._recipe):
                    parts.append(teacher(pixel_values)[0].cpu())
            yield number, torch.cat(parts)


def open_teacher(
    teacher: TeacherModel,
    data: ImageData,
    transform: Transform,
    processor: BaseImageProcessor,
    recipe: FinetuneRecipe,
    accelerator: Accelerator,
    options: LoaderOptions,
) -> TeacherOutputs:
    """Return the teacher as the recipe uses it: computed for each batch, or cached; see `CachedTeacher`."""
    if recipe.teacher_cache is not None:
        return CachedTeacher(teacher, data, transform, processor, recipe, accelerator, options)
    processors = None if teacher.processor is None else (processor, teacher.processor)
    return Teacher(teacher.model, recipe, device=accelerator.device, processors=processors)
