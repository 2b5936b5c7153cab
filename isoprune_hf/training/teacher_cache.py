"""The teacher's logits for views that never change: computed once, then read.

A folder holds the logits of any number of trainings, one folder inside it for each key. In that are shards, as
`logits-00002.safetensors`: those of the images at the positions 8192 to 12287 of the split, in the type in which the
teacher gives them. A shard is written whole or not at all, and one that is there is not computed again.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BaseImageProcessor

from isoprune_hf.checkpoint.fingerprint import fingerprint
from isoprune_hf.checkpoint.folder import replace_file
from isoprune_hf.data.augmentation import Transform
from isoprune_hf.data.dataset import ImageData
from isoprune_hf.data.loading import view_loader
from isoprune_hf.data.pixels import normalised
from isoprune_hf.errors import CheckpointError
from isoprune_hf.recipes import FinetuneRecipe
from isoprune_hf.training.acceleration import PRECISIONS, Teacher

logger = get_logger(__name__)

_SHARD = 4096  # images
_PROBES = 64  # images whose pixels are part of the key


class CachedTeacher:
    """Gives the logits of a teacher from a folder; the teacher itself runs only to fill what is missing there.

    All ranks call this; each fills shards of its own, so they must see the same folder.

    Args:
        model: The teacher; it goes to the device only where shards are missing.
        data: Its `train` split has the images.
        transform: Makes their views, the same in each epoch.
        processor: The student's, whose pixels the transform gives.
        recipe: Has the folder as `teacher_cache`, and how the teacher computes.
        accelerator: The ranks.
        teacher_processor: The teacher's own, where it has another normalisation.
        batch_size: Images of a forward pass that fills the folder.
        num_workers: Loader processes that fill it.

    Raises:
        CheckpointError: A shard cannot be written, or is not there on this rank.
    """

    def __init__(
        self,
        model: nn.Module,
        data: ImageData,
        transform: Transform,
        processor: BaseImageProcessor,
        recipe: FinetuneRecipe,
        accelerator: Accelerator,
        *,
        teacher_processor: BaseImageProcessor | None = None,
        batch_size: int,
        num_workers: int = 0,
    ):
        self._views = {"transform": transform, "decoding": data.decoding, "num_workers": num_workers}
        self._data, self._processor, self._recipe, self._accelerator = data, processor, recipe, accelerator
        self._batch_size, images = batch_size, len(data.train)
        key = [self._key(model, teacher_processor) if accelerator.is_main_process else ""]
        self.folder = Path(recipe.teacher_cache).expanduser() / broadcast_object_list(key)[0]
        shards = [range(first, min(first + _SHARD, images)) for first in range(0, images, _SHARD)]
        missing = [number for number, shard in enumerate(shards) if self._read(number, shard) is None]
        accelerator.wait_for_everyone()  # all ranks have seen the same
        if missing:
            count = sum(len(shards[number]) for number in missing)
            logger.info(f"teacher: computing the logits of {count} images for {self.folder}")
            processors = None if teacher_processor is None else (processor, teacher_processor)
            teacher = Teacher(model, recipe, device=accelerator.device, processors=processors)
            mine = missing[accelerator.process_index :: accelerator.num_processes]
            for number, logits in self._compute(teacher, {number: shards[number] for number in mine}):
                replace_file(self._path(number), lambda path, logits=logits: save_file({"logits": logits}, path))
            accelerator.wait_for_everyone()
        else:
            logger.info(f"teacher: the logits of {images} images are those of {self.folder}")
        # Mapped into memory, not read: the system keeps what it has room for.
        self._shards = [self._read(number, shard) for number, shard in enumerate(shards)]
        if any(shard is None for shard in self._shards):
            raise CheckpointError(
                f"finetune.teacher_cache: {self.folder} lacks logits on rank {accelerator.process_index}; all ranks "
                "must see the same files"
            )

    def __call__(self, pixel_values: Tensor, positions: Tensor) -> Tensor:
        """Return logits of shape (B, C) for the images at some positions, on the device of their pixels."""
        places = torch.where(positions < 0, ~positions, positions).tolist()
        logits = torch.stack([self._shards[place // _SHARD][place % _SHARD] for place in places])
        return logits.to(pixel_values.device, non_blocking=True)

    def _key(self, model: nn.Module, teacher_processor: BaseImageProcessor | None) -> str:
        """Digest all that the logits depend on; the pixels of a few images stand for the transform and the files."""
        recipe, images = self._recipe, len(self._data.train)
        probes = sorted({images * number // _PROBES for number in range(_PROBES)})
        pixels = hashlib.sha256()
        for _, batch, _ in view_loader(self._data.train, [probes], **self._views):
            pixels.update(normalised(batch, self._processor).contiguous().numpy().tobytes())
        facts = {
            "teacher": fingerprint(model),
            "normalisation": None if teacher_processor is None else json.loads(teacher_processor.to_json_string()),
            "data": [self._data.fingerprint, images, pixels.hexdigest()],
            "decoding": [self._data.decoding.broken, self._data.decoding.exif],
            "precision": [recipe.precision, recipe.teacher_precision, recipe.channels_last, recipe.torch_compile],
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def _path(self, number: int) -> Path:
        return self.folder / f"logits-{number:05d}.safetensors"

    def _read(self, number: int, shard: range) -> Tensor | None:
        """Open a shard; None where it is not there, or damaged."""
        try:
            logits = load_file(self._path(number)).get("logits")
        except (OSError, SafetensorError):
            return None
        return logits if logits is not None and logits.ndim == 2 and len(logits) == len(shard) else None

    def _compute(self, teacher: Teacher, shards: dict[int, range]) -> Iterator[tuple[int, Tensor]]:
        """Give the logits (N, C) of shards, on the CPU."""
        device, precision, size = self._accelerator.device, self._recipe.precision, self._batch_size
        batches = {n: [shard[at : at + size] for at in range(0, len(shard), size)] for n, shard in shards.items()}
        stream = iter(view_loader(self._data.train, [*itertools.chain(*batches.values())], **self._views))
        for number, pieces in batches.items():
            parts = []
            for _, pixels, _ in itertools.islice(stream, len(pieces)):
                pixel_values = normalised(pixels.to(device, non_blocking=True), self._processor)
                with torch.autocast(device.type, PRECISIONS.get(precision), enabled=precision in PRECISIONS):
                    parts.append(teacher(pixel_values).cpu())
            yield number, torch.cat(parts)
