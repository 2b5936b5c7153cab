"""Read the licence of a base from its card on the Hub: call `find_base_license`."""

import logging
from collections.abc import Mapping
from typing import Any

import yaml
from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]  # not exported

from isoprune_hf.reporting.card_metadata import License, base_on_hub, license_of_timm

logger = logging.getLogger(__name__)


def find_base_license(config: Mapping[str, Any], *, local_only: bool = False) -> License | None:
    """Return the licence in the card of the base, read at the revision that was pruned.

    None where the base is not on the Hub, timm records its licence, or its card has none or cannot be read; the last
    is logged.

    Args:
        config: IsoPruneConfig fields of the pruned model.
        local_only: Read the card only where an earlier call has stored it.
    """
    name = base_on_hub(config)
    if name is None or license_of_timm(config) is not None:
        return None
    revision = (config.get("source") or {}).get("revision")
    try:
        card = ModelCard.load(hf_hub_download(name, "README.md", revision=revision, local_files_only=local_only))
    except (HfHubHTTPError, HTTPError, OSError, ValueError, TypeError, yaml.YAMLError) as error:
        if not local_only:
            logger.warning(
                f"the licence of {name} is not in the card: its card cannot be read ({type(error).__name__})"
            )
        return None
    found = card.data.to_dict()
    if not isinstance(found.get("license"), str):
        return None
    named = [found.get(key) if isinstance(found.get(key), str) else None for key in ("license_name", "license_link")]
    return License(found["license"], *named)
