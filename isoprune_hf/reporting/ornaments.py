"""Parts that a result can do without, such as pictures and cards: their failure is one warning, see `ornament`."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)


@contextmanager
def ornament(name: str, *, then: str = "the result is complete without it") -> Iterator[None]:
    """Turn any error within the context into one warning.

    Args:
        name: Name of the part.
        then: End of the warning.
    """
    try:
        yield
    except Exception as error:  # noqa: BLE001 - libraries may raise anything, and the work must not be lost
        reason = (str(error).splitlines() or [""])[0]
        logger.warning(f"{name} failed ({type(error).__name__}: {reason:.200}); {then}")
