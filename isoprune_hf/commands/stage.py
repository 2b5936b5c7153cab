"""Declare a stage of the command line: `Stage`, its `Flag`s, and the `Answer` that it returns."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import GenericAlias
from typing import Any


class Heading(StrEnum):
    """Headings that group the stages in `isoprune --help`."""

    SHRINK = "make a smaller model"
    MEASURE = "inspect and measure"
    DELIVER = "export and publish"


@dataclass(frozen=True)
class Answer:
    """Result of a stage.

    Attributes:
        text: Printed for a reader.
        figures: Printed for a program with `--json`.
        code: Exit code of the process.
        store: Stores the figures; called on the main process once they are printed.
    """

    text: str
    figures: Mapping[str, Any] = field(default_factory=dict)
    code: int = 0
    store: Callable[[], None] | None = None


@dataclass(frozen=True)
class Flag:
    """A flag of a stage besides the settings of its recipe sections.

    Attributes:
        name: Name without dashes; also the keyword of `run`.
        type: Annotation that the value is parsed and checked by.
        default: Value if the flag is not given.
        text: Help text.
        required: The flag has no default and must be given.
    """

    name: str
    type: Any
    default: Any
    text: str
    required: bool = False

    @property
    def is_list(self) -> bool:
        """The value is a list."""
        return isinstance(self.type, GenericAlias) and self.type.__origin__ is list


@dataclass(frozen=True)
class Stage:
    """A stage of the command line; one of two words (`plan show`) is an action of a `StageGroup`.

    Attributes:
        name: Words that select it.
        run: Its work. It takes keyword arguments: one for each section and flag, and `accelerator` unless it is local.
        text: Help text.
        heading: Heading of `isoprune --help` that lists it.
        order: Position among all stages.
        sections: Recipe sections that it reads.
        flags: Its other flags.
        positional: Names of the flags and settings (`prune.model`) whose values may be given first, without them.
        examples: Command lines for the help.
        is_local: It runs in one process, without an accelerator and without a log.
    """

    name: str
    run: Callable[..., Answer]
    text: str
    heading: Heading
    order: int
    sections: tuple[str, ...] = ()
    flags: tuple[Flag, ...] = ()
    positional: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()
    is_local: bool = False


@dataclass(frozen=True)
class StageGroup:
    """Stages that share their first word.

    Attributes:
        name: The shared word.
        text: Help text of the group.
        stages: Its actions, in the order of the help; their `heading` and `order` are those of the group.
    """

    name: str
    text: str
    stages: tuple[Stage, ...]
