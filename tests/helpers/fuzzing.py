"""Damaged and hostile inputs: values to put into them, ways to damage them, and the bounds of one attempt."""

import copy
import os
import resource
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

# Inputs of each kind in `make fuzz`; a few for the suite.
INPUTS = int(os.environ.get("ISOPRUNE_FUZZ", "120"))
FEW = 20
SECONDS, MEMORY = 60, 2**30  # for one input: far above what an honest one takes
LIMITS = settings(
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    print_blob=False,
    phases=[Phase.generate],  # to shrink a failing input takes minutes
)
CANARY = "isoprune_canary"
CODE = [
    f"__import__('os').system('touch {CANARY}')",
    f"!!python/object/apply:os.system ['touch {CANARY}']",
    "os.system",
]
PATHS = [
    "../../etc/passwd",
    "/etc/passwd",
    "..",
    "~/.ssh/id_rsa",
    "file:///etc/passwd",
    "https://example.com/x.py",
    "hf-hub:someone/model",
    "a\x00b",
]
NUMBERS = [-1, 0, 1, 2, 3, 7, 64, 2**20, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, float("inf"), float("nan")]
WORDS = [None, True, False, "", "timm", "torchvision", "transformers", "resnet50", "vit", "swin", "x" * 10_000]
NESTED = [[], {}, [[]], {"a": {"b": []}}, [1] * 1000, {"__class__": "x"}, [None, "x", 3], {"model_type": "detr"}]
VALUES = st.sampled_from([*CODE, *PATHS, *NUMBERS, *WORDS, *NESTED]) | st.integers() | st.text(max_size=20)
KEYS = st.sampled_from(
    ["auto_map", "_name_or_path", "quantization_config", "torch_dtype", "pretrained", "checkpoint_path", "backbone"]
)

counts: Counter[str] = Counter()
growth: Counter[str] = Counter()  # MiB of the largest input of each kind beyond the largest before it
# What must not happen while an input is read; None outside of it.
_forbidden: list[str] | None = None


def _watch(event: str, arguments: tuple) -> None:
    if _forbidden is not None and event in (
        "os.system",
        "subprocess.Popen",
        "os.exec",
        "socket.connect",
        "pickle.find_class",
    ):
        _forbidden.append(f"{event} {arguments!r:.99}")


def watch_process() -> None:
    """Note events that no reader of data causes; nothing removes the watch, and the process pays for it."""
    sys.addaudithook(_watch)


@pytest.fixture(scope="module")
def watched() -> Iterator[None]:
    """Watch the process without a network, and print what was tried."""
    watch_process()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield
    print(f"\nfuzz: {dict(sorted(counts.items()))}; MiB {dict(sorted(growth.items()))}")


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Yield every place in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def damage(draw: Callable[[st.SearchStrategy], Any], honest: dict[str, Any]) -> dict[str, Any]:
    """Change one to three places of a JSON object."""
    values = copy.deepcopy(honest)
    for _ in range(draw(st.integers(1, 3))):
        known = list(places(values))
        if not known:
            break
        # By section first: a long list would take all of the attempts.
        top = draw(st.sampled_from(sorted({str(path[0]) for path in known})))
        path = draw(st.sampled_from([path for path in known if str(path[0]) == top]))
        owner = values
        for key in path[:-1]:
            owner = owner[key]
        kind = draw(st.sampled_from(["replace", "replace", "nudge", "delete", "add", "swap"]))
        if kind == "replace":
            owner[path[-1]] = copy.deepcopy(draw(VALUES))
        elif kind == "nudge" and type(owner[path[-1]]) in (int, float):
            owner[path[-1]] += draw(st.sampled_from([-1, 1, 0.5, 1000]))
        elif kind == "delete":
            del owner[path[-1]]
        elif kind == "add" and isinstance(owner, dict):
            owner[draw(KEYS | st.text(max_size=8))] = copy.deepcopy(draw(VALUES))
        elif kind == "swap":
            other = draw(st.sampled_from(known))
            inner = values
            for key in other:
                inner = inner[key] if isinstance(inner, dict | list) and _has(inner, key) else None
            owner[path[-1]] = copy.deepcopy(inner)
    return values


def _has(owner: Any, key: Any) -> bool:
    return key in owner if isinstance(owner, dict) else isinstance(key, int) and key < len(owner)


def damage_bytes(draw: Callable[[st.SearchStrategy], Any], honest: bytes, tokens: list[bytes]) -> bytes:
    """Change one to four places of a text or a binary: other bytes, a token, a part left out or repeated, an end."""
    content = honest
    for _ in range(draw(st.integers(1, 4))):
        spot = draw(st.integers(0, max(len(content) - 1, 0)))
        kind = draw(st.sampled_from(["byte", "byte", "token", "token", "cut", "repeat", "end"]))
        length = draw(st.integers(1, 40))
        if kind == "byte":
            content = content[:spot] + bytes([draw(st.integers(0, 255))]) + content[spot + 1 :]
        elif kind == "token":
            content = content[:spot] + draw(st.sampled_from(tokens)) + content[spot + draw(st.integers(0, 8)) :]
        elif kind == "cut":
            content = content[:spot] + content[spot + length :]
        elif kind == "repeat":
            part = content[spot : spot + length] * draw(st.sampled_from([2, 3, 1000]))
            content = content[:spot] + part + content[spot + length :]
        else:
            content = content[:spot]
    return content


@contextmanager
def guarded(kind: str, folder: Path) -> Iterator[None]:
    """Fail an attempt that hangs, runs code, uses the network, or allocates much memory."""

    def stop(*_: Any) -> None:
        raise AssertionError(f"longer than {SECONDS} s")

    global _forbidden
    before = signal.signal(signal.SIGALRM, stop)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.alarm(SECONDS)
    _forbidden = []
    try:
        yield
    finally:
        found, _forbidden = _forbidden, None
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert found == []
    assert not Path(CANARY).exists() and not (folder / CANARY).exists()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    growth[kind] = max(growth[kind], grown // 1024)
    assert 1024 * grown < MEMORY
