"""Damaged and hostile folders: each raises an IsoPruneError or opens as a correct model.

`make fuzz` tries ten thousand; the suite a few. `ISOPRUNE_FUZZ` sets how many.
"""

import copy
import json
import os
import resource
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.pruned_models import Pruned
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from safetensors.torch import load

from isoprune_hf.errors import IsoPruneError
from isoprune_hf.models import load_base
from isoprune_hf.pruning.plan import PruningPlan
from isoprune_hf.reporting.plan_text import show_plan

pytestmark = pytest.mark.fuzz

INPUTS = int(os.environ.get("ISOPRUNE_FUZZ", "120"))
SECONDS, MEMORY = 60, 2**30  # for one folder: far above what an honest one takes
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
    "a\x00b",
]
NUMBERS = [-1, 0, 1, 2, 3, 7, 64, 2**20, 2**31, 2**63, 10**30, 0.5, -0.0, 1e308, float("inf"), float("nan")]
WORDS = [None, True, False, "", "timm", "torchvision", "transformers", "resnet50", "vit", "swin", "x" * 10_000]
NESTED = [[], {}, [[]], {"a": {"b": []}}, [1] * 1000, {"__class__": "x"}, [None, "x", 3]]
VALUES = st.sampled_from([*CODE, *PATHS, *NUMBERS, *WORDS, *NESTED]) | st.integers() | st.text(max_size=20)
KEYS = st.sampled_from(
    ["auto_map", "_name_or_path", "quantization_config", "torch_dtype", "pretrained", "checkpoint_path"]
)

counts: Counter[str] = Counter()
# What must not happen while a folder is opened.
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


@contextmanager
def guarded(folder: Path) -> Iterator[None]:
    """Fail a case that hangs, runs code, uses the network, or allocates much memory."""

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
    assert 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) < MEMORY


def open_folder(folder: Path, kind: str) -> Any:
    """Open a folder; None if it raises an IsoPruneError."""
    with guarded(folder):
        try:
            opened = load_base(str(folder))
        except IsoPruneError as error:
            counts[f"{kind} refused"] += 1
            assert str(error).strip()
            return None
    counts[f"{kind} opened"] += 1
    return opened


@pytest.fixture(scope="module")
def honest(pruned: Callable[[str], Pruned], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Pruned]:
    sample = pruned("vit")
    return shutil.copytree(sample.folder, tmp_path_factory.mktemp("fuzz") / "vit"), sample


@pytest.fixture(scope="module", autouse=True)
def offline() -> Iterator[None]:
    sys.addaudithook(_watch)  # nothing removes it: only a process that runs these tests may pay for it
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield
    print(f"\nfuzz: {dict(sorted(counts.items()))}")


LIMITS = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=False)


def test_damaged_config_is_refused_or_opens_correctly(honest: tuple[Path, Pruned]) -> None:
    folder, sample = honest
    file = folder / "config.json"
    original = json.loads(file.read_text())

    @seed(1)
    @settings(LIMITS, max_examples=max(INPUTS // 2, 1))
    @given(st.data())
    def attempt(data: st.DataObject) -> None:
        values = damage(data.draw, original)
        file.write_text(json.dumps(values))
        opened = open_folder(folder, "config")
        if opened is None:
            return
        assert {k: t.shape for k, t in opened.model.state_dict().items()} == {
            k: t.shape for k, t in sample.model.state_dict().items()
        }
        with torch.no_grad():
            logits = opened.model(sample.images.to(opened.model.dtype)).logits
        assert logits.shape == sample.logits.shape
        parts = ("base", "structure", "dtype", "torch_dtype", "image_size")
        if all(values.get(part) == original.get(part) for part in parts):
            assert torch.equal(logits, sample.logits)

    try:
        attempt()
    finally:
        file.write_text(json.dumps(original))


def test_damaged_weights_are_refused_or_read_exactly(honest: tuple[Path, Pruned]) -> None:
    folder, _ = honest
    file = folder / "model.safetensors"
    original = file.read_bytes()
    header = 8 + int.from_bytes(original[:8], "little")
    spots = st.integers(0, 15) | st.integers(0, header - 1) | st.integers(0, len(original) - 1)

    @seed(2)
    @settings(LIMITS, max_examples=max(INPUTS // 4, 1))
    @given(
        st.lists(st.tuples(spots, st.integers(1, 255)), min_size=1, max_size=4),
        st.none() | st.integers(0, len(original)),
    )
    def attempt(flips: list[tuple[int, int]], length: int | None) -> None:
        content = bytearray(original)
        for spot, change in flips:
            content[spot] ^= change
        content = bytes(content[:length])
        file.write_bytes(content)
        opened = open_folder(folder, "weights")
        if opened is None:
            return
        # By an independent reader: every tensor is bit for bit what the file holds.
        found, held = opened.model.state_dict(), load(content)
        assert found.keys() == held.keys()
        assert all(found[name].numpy().tobytes() == held[name].numpy().tobytes() for name in held)

    try:
        attempt()
    finally:
        file.write_bytes(original)


def test_damaged_plan_is_refused_or_read(honest: tuple[Path, Pruned]) -> None:
    folder, _ = honest
    file = folder / "pruning_plan.json"
    original = json.loads(file.read_text())

    @seed(3)
    @settings(LIMITS, max_examples=INPUTS - INPUTS // 2 - INPUTS // 4)
    @given(st.data())
    def attempt(data: st.DataObject) -> None:
        values = damage(data.draw, original)
        file.write_text(json.dumps(values))
        with guarded(folder):
            try:
                plan = PruningPlan.load(folder)
                show_plan(plan, title="fuzz")
            except IsoPruneError:
                counts["plan refused"] += 1
                return
        counts["plan read"] += 1
        assert {name: list(indices) for name, indices in plan.kept.items()} == values["kept"]

    try:
        attempt()
    finally:
        file.write_text(json.dumps(original))
