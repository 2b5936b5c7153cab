"""The budget of a recipe as a value: parse it once with `Budget.parse`, then resolve it against a base."""

import re
from dataclasses import dataclass
from typing import Literal

from isoprune_hf.errors import RecipeError
from isoprune_hf.recipes.values import shorten

BudgetKind = Literal["macs", "params", "latency"]

_COUNT_UNITS: dict[str, float] = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_TIME_UNITS: dict[str, float] = {"": 1.0, "US": 1e-3, "MS": 1.0, "S": 1e3}
_MAX_VALUE = 10**18  # of MACs, parameters or milliseconds, and of per cent
_NUMBER_WITH_UNIT = re.compile(r"\s*([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*([a-z]*|%)\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Budget:
    """An upper bound on the size or the latency of a pruned model.

    Args:
        kind: The bounded quantity.
        value: MACs, parameters or milliseconds; per cent of the base if `is_share`.
        is_share: The budget is relative to the base.
    """

    kind: BudgetKind
    value: float
    is_share: bool

    @classmethod
    def parse(cls, text: str | float, kind: BudgetKind) -> "Budget":
        """Parse `4.2G`, `350M`, `12ms`, a plain number, or a share of the base such as `50%`.

        Raises:
            RecipeError: `text` is not a size or time, or not above zero.
        """
        units = _TIME_UNITS if kind == "latency" else _COUNT_UNITS
        match = _NUMBER_WITH_UNIT.fullmatch(text if isinstance(text, str) else shorten(text))
        if match is not None:
            unit = match[2].upper()
            value = float(match[1]) * units.get(unit, 1)
            if 0 < value <= _MAX_VALUE and (unit == "%" or unit in units):
                return cls(kind, value, is_share=unit == "%")
        example = "a time such as 12ms, 0.5s or 50%" if kind == "latency" else "a size such as 4.2G, 350M or 50%"
        raise RecipeError(f"prune.target_{kind} must be {example}, got {shorten(text)}")

    @property
    def setting(self) -> str:
        """Recipe key of this budget, such as `target_macs`."""
        return f"target_{self.kind}"

    def resolve(self, base: float) -> float:
        """Return the bound for a base: a whole number of MACs or parameters, or milliseconds.

        Args:
            base: The same quantity of the base.
        """
        value = base * self.value / 100 if self.is_share else self.value
        return value if self.kind == "latency" else round(value)

    def __str__(self) -> str:
        """Return the budget in a form that `parse` reads."""
        if self.is_share:
            return f"{self.value:.15g}%"
        if self.kind == "latency":
            return f"{self.value:.15g}ms"
        size, unit = max((size, unit) for unit, size in _COUNT_UNITS.items() if size <= max(self.value, 1))
        return f"{self.value / size:.15g}{unit}"
