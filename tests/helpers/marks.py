"""Cases of a test of which only some are run by default."""

from collections.abc import Iterable
from typing import Any

import pytest


def one_of_each(cases: Iterable[str], *always: str) -> list[Any]:
    """Return the cases as parameters, all but those of `always` marked `families`."""
    return [case if case in always else pytest.param(case, marks=pytest.mark.families) for case in cases]
