"""Write the tokenizer of a base beside a network that reads texts, so that its pipeline opens: `save_tokenizer`."""

import logging
from pathlib import Path

from transformers import AutoTokenizer

from isoprune_hf.checkpoint.dense import LIBRARY_ERRORS, IsoPruneConfig, describe_error
from isoprune_hf.checkpoint.task_forms import task_of

logger = logging.getLogger(__name__)


def save_tokenizer(folder: Path, config: IsoPruneConfig) -> None:
    """Write the tokenizer of the base that a config names into a folder, if its network reads texts.

    A base that has none, or cannot be reached, is named in a warning: the weights are complete without it.
    """
    source = config.source or {}
    if not task_of(config.base).reads_texts or not source.get("name"):
        return
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source["name"], revision=source.get("revision") or "main", trust_remote_code=False
        )
        if tokenizer.vocab_size <= len(tokenizer.all_special_tokens):  # made from nothing, as for CLIP
            raise OSError("it has no words")
        tokenizer.save_pretrained(folder)
    except (OSError, *LIBRARY_ERRORS) as error:
        logger.warning(
            f"no tokenizer is written, which the pipeline needs: that of {source['name']} cannot be opened "
            f"({describe_error(error)})"
        )
