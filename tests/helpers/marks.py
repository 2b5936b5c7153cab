"""Cases of a test of which only some are run by default."""

from collections.abc import Iterable
from typing import Any

import pytest


def one_of_each(cases: Iterable[str], *always: str, mark: str = "families") -> list[Any]:
    """Return the cases as parameters, all but those of `always` with a mark."""
    return [case if case in always else pytest.param(case, marks=getattr(pytest.mark, mark)) for case in cases]
