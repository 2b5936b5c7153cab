"""Open the image processor of a folder or a Hub id as data, within the budget of `limits`: `saved_processor`."""

import math
from collections.abc import Iterator
from typing import Any

from transformers import AutoImageProcessor, BaseImageProcessor
from transformers.image_utils import SizeDict

from isoprune_hf.checkpoint.dense import LIBRARY_ERRORS, describe_error
from isoprune_hf.errors import CheckpointError
from isoprune_hf.limits import MAX_PROCESSED_SIDE


def saved_processor(place: str, revision: str | None = None) -> BaseImageProcessor:
    """Open the processor of a folder or a Hub id.

    Raises:
        CheckpointError: The processor is missing or damaged.
    """
    try:
        processor: BaseImageProcessor = AutoImageProcessor.from_pretrained(  # type: ignore[no-untyped-call]
            place, revision=revision or "main", trust_remote_code=False
        )
        settings = processor.to_dict()
    except (OSError, *LIBRARY_ERRORS) as error:
        raise CheckpointError(
            f"preprocessor_config.json of {place}: not a readable image processor ({describe_error(error)})"
        ) from error
    largest = max(_numbers(settings), default=0)
    if largest > MAX_PROCESSED_SIDE:
        raise CheckpointError(
            f"preprocessor_config.json of {place}: the image processor has a setting of {largest:.10g}; sizes and all "
            f"other numbers are at most {MAX_PROCESSED_SIDE}"
        )
    return processor


def _numbers(value: Any) -> Iterator[float]:
    """Yield the absolute values of the numbers in nested settings; infinity for nan and those that fill a line."""
    if isinstance(value, dict | SizeDict):
        value = list(dict(value).values())
    if isinstance(value, list | tuple):
        for part in value:
            yield from _numbers(part)
    elif isinstance(value, int | float):
        yield abs(value) if abs(value) < 10**18 else math.inf
