"""Checkpoints of the reference implementation are converted exactly, and nothing in them is executed."""

import argparse
import copy
import functools
import json
import os
import random
import time
import urllib.error
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
import torchvision
from helpers.command_line import read, refuse, succeed
from helpers.marks import one_of_each
from helpers.reference_files import NAMES, cut, cut_swin, make_module, run, save
from safetensors.torch import save_file
from timm.models.vision_transformer import ResPostBlock
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel

from isoprune_hf.checkpoint.fingerprint import fingerprint
from isoprune_hf.errors import CheckpointError, IsoPruneError, RecipeError
from isoprune_hf.legacy.convert import Converted, convert_file
from isoprune_hf.legacy.pickle_reader import ObjectRecord, read_pickle
from isoprune_hf.models import load_base

SIDES = {"deit": 16, "swin": 56, "convnext": 64, "resnet": 64, "mobilenet_v2": 64}
ARGS = {**{family: args for family, (_, args) in NAMES.items()}, "mobilenet_v2": {"width_mult": 0.25}}


def images(family: str) -> torch.Tensor:
    return torch.randn(2, 3, SIDES[family], SIDES[family], generator=torch.Generator().manual_seed(3))


def make(family: str, **options: Any) -> nn.Module:
    return copy.deepcopy(_made(family, **options))


@functools.cache
def _made(family: str, **options: Any) -> nn.Module:
    return cut_swin(**options) if family == "swin" else cut(make_module(family, **options), images(family)[:1])


def logits(converted: Converted, pixels: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return converted.model(pixels).logits


@pytest.mark.parametrize("family", one_of_each(SIDES, "deit"))
def test_converted_folder_gives_the_logits_of_module(family: str, tmp_path: Path) -> None:
    module = make(family)
    args = [f"--model_args={json.dumps(ARGS[family])}"]
    out = succeed("convert", save(module, tmp_path / "old.pth"), "--output", tmp_path / "new", *args)
    opened = load_base(str(tmp_path / "new")).model
    want = run(module, images(family))
    with torch.no_grad():
        assert (opened(images(family)).logits - want).abs().max() <= 1e-6
    assert want.std() > 0.1
    params = sum(parameter.numel() for parameter in module.parameters())
    assert read(tmp_path / "new", "config.json")["cost"]["pruned"]["params"] == params
    assert "no blocks removed" in out
    assert (tmp_path / "new" / "README.md").is_file()


def test_stale_widths_of_deit_are_recomputed(tmp_path: Path) -> None:
    module = make("deit")
    assert (module.blocks[0].attn.num_heads, module.blocks[0].attn.attn_dim) == (2, 32)  # 32: of the dense base
    converted = convert_file(save(module, tmp_path / "old.pth"), model_args=ARGS["deit"])
    part = converted.model.model.blocks[0].attn
    assert (part.num_heads, part.head_dim, part.attn_dim, part.scale) == (2, 4, 8, 0.5)


def test_renumbered_blocks_count_as_last_removed(tmp_path: Path) -> None:
    module = make("convnext")
    blocks = module.stages[2].blocks
    module.stages[2].blocks = nn.Sequential(blocks[0], blocks[2])
    converted = convert_file(save(module, tmp_path / "old.pth"), model_args=ARGS["convnext"])
    assert converted.model.config.structure["removed"] == ["stages.2.blocks.2"]
    assert "1 block removed" in converted.notes[1]
    assert (logits(converted, images("convnext")) - run(module, images("convnext"))).abs().max() <= 1e-6


def test_training_rates_are_recorded_outside_the_structure(tmp_path: Path) -> None:
    module = make("convnext", drop_path_rate=0.5)
    converted = convert_file(save(module, tmp_path / "old.pth"), model_args=ARGS["convnext"])
    rates = converted.model.config.recipe["convert"]["rates"]
    # Six blocks share 0 to 0.5 evenly; the first has none.
    assert rates["stages.1.blocks.0.drop_path"] == {"drop_prob": pytest.approx(0.1)}
    assert rates["stages.3.blocks.0.drop_path"] == {"drop_prob": pytest.approx(0.5)}
    assert "drop_prob 0.1 to 0.5 in 5 modules" in converted.notes[2]
    assert not any("drop_path" in path for path in converted.model.config.structure["attributes"])


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    return make("resnet")


@pytest.fixture(scope="module")
def averaged(resnet: nn.Module) -> nn.Module:
    other = copy.deepcopy(resnet)
    with torch.no_grad():
        other.fc.bias += 1
    return other


WRAPPED: dict[str, Callable[[nn.Module, nn.Module], Any]] = {
    "module": lambda raw, ema: {"model": raw, "model_ema": ema, "epoch": 3, "args": argparse.Namespace(lr=0.1)},
    "parallel": lambda raw, ema: {"model": nn.DataParallel(raw), "model_ema": nn.DataParallel(ema).state_dict()},
    "timm": lambda raw, ema: {"model": raw, "model_ema": ModelEmaV2(ema)},
    "timm, newer": lambda raw, ema: {"model": raw, "model_ema": ModelEmaV3(ema)},
    "averaged whole": lambda raw, ema: {"model": raw, "model_ema": AveragedModel(ema)},
    "timm's script": lambda raw, ema: {"state_dict": raw, "state_dict_ema": ema, "arch": "resnet50", "metric": 80.1},
    "synchronised": lambda raw, ema: {
        "model": nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(raw)),
        "ema": nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(ema)),
    },
    "torchvision": lambda raw, ema: {
        "model": raw,
        "model_ema": {"n_averaged": torch.tensor(5), **nn.DataParallel(ema).state_dict()},
        "optimizer": torch.optim.SGD(raw.parameters(), 0.1, momentum=0.9).state_dict(),
    },
}


@pytest.mark.parametrize("wrapped", one_of_each(WRAPPED, "timm"))
def test_raw_and_averaged_weights_are_found(
    wrapped: str, resnet: nn.Module, averaged: nn.Module, tmp_path: Path
) -> None:
    file = save(WRAPPED[wrapped](resnet, averaged), tmp_path / "old.pth")
    for weights, module in (("raw", resnet), ("ema", averaged)):
        converted = convert_file(file, model_args=ARGS["resnet"], weights=weights)
        assert (logits(converted, images("resnet")) - run(module, images("resnet"))).abs().max() <= 1e-6
        assert converted.model.config.stage == "finetuned"


def test_inconvertible_files_are_refused_in_one_line(resnet: nn.Module, tmp_path: Path) -> None:
    file = save(resnet, tmp_path / "old.pth")
    with pytest.raises(RecipeError, match=r"old\.pth .* average"):
        convert_file(file, weights="ema")
    with pytest.raises(CheckpointError, match=r"'layer1\.0' .*Bottleneck .*BasicBlock "):
        convert_file(file, base="timm/resnet18")
    state = resnet.state_dict()
    for content in (state, {"model": state, "epoch": 3}, {"state_dict": state, "epoch": 3}):
        with pytest.raises(CheckpointError, match=r"state\.pth .*state_dict"):
            convert_file(save(content, tmp_path / "state.pth"))
    with pytest.raises(RecipeError, match=r"torchvision.models.squeezenet.SqueezeNet .*--base"):
        convert_file(save(torchvision.models.squeezenet1_1(), tmp_path / "squeezenet.pth"))
    with pytest.raises(RecipeError, match="does not exist"):
        convert_file(tmp_path / "none.pth")


def test_differing_activation_or_flag_is_refused(tmp_path: Path) -> None:
    module = make("resnet")
    module.layer1[0].act1 = nn.GELU()
    with pytest.raises(CheckpointError, match=r"'layer1\.0\.act1' .*GELU .*ReLU "):
        convert_file(save(module, tmp_path / "a.pth"), model_args=ARGS["resnet"])
    module = make("deit")
    module.blocks[0].mlp.act = nn.GELU("tanh")
    with pytest.raises(CheckpointError, match=r"approximate .*'blocks\.0\.mlp\.act' .*'tanh' .*'none'"):
        convert_file(save(module, tmp_path / "b.pth"), model_args=ARGS["deit"])


def test_differing_module_class_or_order_is_refused(tmp_path: Path) -> None:
    module = make("deit")
    for block in module.blocks:
        block.__class__ = ResPostBlock
    with pytest.raises(CheckpointError, match=r"'blocks\.0' .*ResPostBlock .*\bBlock "):
        convert_file(save(module, tmp_path / "a.pth"), model_args=ARGS["deit"])
    module = make("convnext")
    blocks = module.stages[2].blocks._modules
    blocks["0"] = blocks.pop("0")
    with pytest.raises(CheckpointError, match=r"'stages\.2\.blocks' .* 1, 2, 0"):
        convert_file(save(module, tmp_path / "b.pth"), model_args=ARGS["convnext"])


@pytest.mark.parametrize(("name", "value", "was"), [("divisor_override", 1, "None"), ("stride", "2", "2")])
def test_value_of_another_type_is_refused(name: str, value: Any, was: str, tmp_path: Path) -> None:
    module = timm.create_model("resnet50d", num_classes=10, **ARGS["resnet"])
    setattr(next(part for part in module.modules() if isinstance(part, nn.AvgPool2d)), name, value)
    with pytest.raises(CheckpointError, match=rf"{name} of '.*' .*{value!r} .*{was} "):
        convert_file(save(module, tmp_path / "old.pth"), model_args=ARGS["resnet"])


def test_average_must_have_all_tensors_of_module(tmp_path: Path) -> None:
    module = make("deit")
    average = {name: tensor + 0 for name, tensor in module.state_dict().items()}
    del average["pos_embed"]
    with pytest.raises(CheckpointError, match=r"average .*'pos_embed'"):
        convert_file(
            save({"model": module, "model_ema": average}, tmp_path / "old.pth"), model_args=ARGS["deit"], weights="ema"
        )


class Hostile:
    """Pickles as a call."""

    def __init__(self, function: Any, *args: Any):
        self.call = (function, args)

    def __reduce__(self) -> tuple:
        return self.call


def _touch(place: Path) -> str:
    return f"open({str(place)!r}, 'w')"


def hostile(marker: Path) -> dict[str, tuple[Any, str]]:
    shell = Hostile(os.system, f"touch {marker}")
    module = nn.Linear(2, 2)
    module.extra = Hostile(eval, _touch(marker))
    tensor = nn.Linear(2, 2)
    tensor.weight.note = shell
    state = nn.Linear(2, 2)
    state._modules["x"] = Hostile(getattr, Hostile(__import__, "os"), "system")
    return {
        "os.system": (shell, "posix.system"),
        "eval": ({"model": Hostile(eval, _touch(marker))}, "__builtin__.eval"),
        "exec": ([Hostile(exec, _touch(marker))], "__builtin__.exec"),
        "getattr": (state, "__builtin__.getattr"),
        "in the state of a module": (module, "__builtin__.eval"),
        "on a parameter": (tensor, "torch._utils._rebuild_parameter_with_state"),
        "in a partial": (functools.partial(os.system, f"touch {marker}"), "posix.system"),
        "copyreg": (argparse.Action([], "x"), "argparse.Action"),
    }


@pytest.mark.parametrize("kind", hostile(Path("unused")))
def test_hostile_files_are_refused_and_do_not_run(kind: str, tmp_path: Path) -> None:
    content, name = hostile(tmp_path / "marker")[kind]
    file = save(content, tmp_path / "old.pth")
    line = refuse("convert", file, "--output", tmp_path / "new")
    assert f"old.pth contains {name}, which is not allowed" in line
    assert not (tmp_path / "marker").exists()
    assert not (tmp_path / "new").exists()


def test_hostile_files_would_run_in_an_unpickler(tmp_path: Path) -> None:
    content, _ = hostile(tmp_path / "marker")["in the state of a module"]
    torch.load(save(content, tmp_path / "old.pth"), weights_only=False)
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (b"cos\nsystem\n(S'touch MARKER'\ntR.", "contains os.system"),
        (b"(S'touch MARKER'\nios\nsystem\n.", "contains the pickle opcode STRING"),
        (b"(ios\nsystem\n.", "contains the pickle opcode INST"),
        (b"\x82\x01.", "contains the pickle opcode EXT1"),
        (
            b"\x8c\x17torch.nn.modules.linear\x8c\x0bos.system()\x93.",
            r"contains torch.nn.modules.linear.os.system\(\)",
        ),
        (b"\x8c\x08torch.nn\x8c\x0emodules.system\x93.", "contains torch.nn.modules.system"),
        (b"ccopyreg\n_reconstructor\n.", "contains copyreg._reconstructor"),
        (b"ctorch.storage\n_load_from_bytes\n.", "contains torch.storage._load_from_bytes"),
        (b"h\x05.", "is damaged"),
        (b"R.", "is damaged"),
        (b"", "is damaged"),
        (b"}q\x00.extra", None),
        (b"}((Ktd.", "is damaged|contains"),
        (b"})\x85)\x85s.", "contains a mapping with a tuple for a key"),
    ],
)
def test_foreign_opcodes_and_names_are_refused(code: bytes, message: str | None) -> None:
    if message is None:
        assert read_pickle(code) == {}
    else:
        with pytest.raises(CheckpointError, match=message):
            read_pickle(code)


def test_setstate_is_recorded_and_never_called() -> None:
    code = b"ctorch.nn.modules.linear\nLinear\n)\x81}\x8c\x0c__setstate__ctorch.nn.functional\ngelu\nsb."
    noted = read_pickle(code)
    assert isinstance(noted, ObjectRecord)
    assert noted.kind == "torch.nn.modules.linear.Linear"
    assert list(noted.state) == ["__setstate__"]


@pytest.mark.parametrize("keep", [0, 10, 0.3, 0.9, 0.999])
def test_truncated_file_is_refused_in_one_line(keep: float, resnet: nn.Module, tmp_path: Path) -> None:
    whole = save(resnet, tmp_path / "whole.pth").read_bytes()
    (tmp_path / "old.pth").write_bytes(whole[: int(keep * len(whole)) if keep < 1 else int(keep)])
    assert "cut off or damaged" in refuse("convert", tmp_path / "old.pth", "--output", tmp_path / "new")


def test_noise_is_refused_without_side_effects(tmp_path: Path) -> None:
    (tmp_path / "noise.pth").write_bytes(random.Random(0).randbytes(5000))
    assert "cut off or damaged" in refuse("convert", tmp_path / "noise.pth", "--output", tmp_path / "new")
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    whole = _read_pickle(save({"model": module, "epoch": 3}, tmp_path / "whole.pth"))
    read_pickle(whole)
    for seed in range(300):
        noise = random.Random(seed)
        data = bytearray(whole)
        for _ in range(3):
            data[noise.randrange(len(data))] = noise.randrange(256)
        try:
            read_pickle(bytes(data))
        except IsoPruneError as error:
            assert str(error).isprintable()


def test_format_before_zip_files_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert "written by torch before 1.6" in refuse("convert", tmp_path / "old.pth", "--output", tmp_path / "new")


def test_bombs_are_refused_before_unpacking(resnet: nn.Module, tmp_path: Path) -> None:
    whole = save(resnet, tmp_path / "whole.pth")
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(CheckpointError, match="compressed"):
        convert_file(tmp_path / "packed.pth")
    with pytest.raises(CheckpointError, match=r"\[1000000, 1000000\]"):
        convert_file(save({"model": torch.zeros(1).expand(10**6, 10**6)}, tmp_path / "wide.pth"))
    deep = b"]q\x00" + b"h\x00a" * 100_000 + b"."
    assert len(read_pickle(deep)) == 100_000
    with pytest.raises(CheckpointError, match="a module inside itself"):
        module = nn.Sequential(nn.Linear(2, 2))
        module._modules["0"] = module
        convert_file(save(module, tmp_path / "circle.pth"), base="timm/resnet18")


def _pack(code: bytes, file: Path) -> Path:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02" + code)
    return file


def _text(value: str) -> bytes:
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


def test_exponentially_growing_names_are_refused_at_once(tmp_path: Path) -> None:
    parts = b"}(" + _text("_parameters") + b"}" + _text("_buffers") + b"}" + _text("_modules")
    module = b"ctorch.nn.modules.container\nSequential\n)\x81q\x00"
    start = time.process_time()
    with pytest.raises(CheckpointError, match="a name of 1000000 characters"):
        convert_file(_pack(module + parts + b"}" + _text("n" * 10**6) + b"h\x00sub.", tmp_path / "long.pth"))
    many = b"".join(_text(f"n{number}") + b"h\x00s" for number in range(3000))
    with pytest.raises(CheckpointError, match="a module inside itself"):
        convert_file(_pack(module + parts + b"}" + many + b"ub.", tmp_path / "many.pth"))
    doubled = b")q\x010" + b"h\x01h\x01\x86q\x010" * 40  # printed: 2^40 brackets
    key = doubled + b"ctorch.nn.modules.linear\nLinear\nh\x01R"
    with pytest.raises(CheckpointError, match=r"'model' .*torch\.nn\.modules\.linear\.Linear"):
        convert_file(_pack(b"}" + key + b"Ns.", tmp_path / "key.pth"))
    assert time.process_time() - start < 20


def _number(value: int) -> bytes:
    content = value.to_bytes(value.bit_length() // 8 + 1, "little")
    return b"\x8a" + bytes([len(content)]) + content


def _entries(count: int) -> bytes:
    return b"}(" + b"".join(_text(f"{number:06d}") + b"N" for number in range(count)) + b"u"


def _module(parameters: bytes, modules: bytes) -> bytes:
    """Return the state of a module."""
    return b"}(" + _text("_parameters") + parameters + _text("_buffers") + b"}" + _text("_modules") + modules + b"u"


LINEAR = b"ctorch.nn.modules.linear\nLinear\n)\x81"
ONES = b"(" + b"K\x01" * 10**5 + b"tq\x00"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n(NK\x00h\x00h\x00tR"
LEAVES = b"}(" + b"".join(_text(f"n{number}") + LINEAR + b"h\x02b" for number in range(5_000)) + b"u"
TREE = _module(_entries(20_000), b"}") + b"q\x020" + LINEAR + _module(b"}", LEAVES) + b"b"
# Pickles of few MB whose reading would take minutes: each entry is small, and is read again and again.
ENDLESS = {
    "keys": (b"}(" + b"".join(_number(k * (2**61 - 1)) + b"N" for k in range(1, 10**5)) + b"u", "60 bits"),
    "states": (LINEAR + _entries(60_000) + b"q\x00b" + b"h\x00b" * 10**6, "2,000,000 steps"),
    "slots": (LINEAR + ONES + b"b" + b"h\x00b" * 10**5, "2,000,000 steps"),
    "arguments": (ONES + b"ctorch\nSize\nh\x00R" * 10**5, "2,000,000 steps"),
    "shapes": (ONES + TENSOR * 10**4, "without a storage"),
    "names": (_text("a" * 10**6) + b"q\x000" + b"h\x00h\x00\x93" * 10**5, "cannot be read"),
    "modules": (TREE, "2,000,000 steps"),
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_pickle_that_is_read_endlessly_is_refused(kind: str, tmp_path: Path) -> None:
    code, message = ENDLESS[kind]
    file = _pack(code + b".", tmp_path / "endless.pth")
    assert file.stat().st_size < 4 * 10**6
    start = time.process_time()
    with pytest.raises(CheckpointError, match=message):
        convert_file(file, base="timm/resnet18")
    assert time.process_time() - start < 15


def test_names_of_an_average_are_short(resnet: nn.Module, tmp_path: Path) -> None:
    average = {"module." * 10**5: torch.zeros(1)}
    with pytest.raises(CheckpointError, match="an average has a name of 700000 characters"):
        convert_file(save({"model": resnet, "model_ema": average}, tmp_path / "long.pth"), weights="ema")


@pytest.mark.parametrize("rate", ["x", 2**1500, (1.0, 2.0), float("nan"), -1.0])
def test_invalid_rates_are_ignored(rate: Any, resnet: nn.Module, tmp_path: Path) -> None:
    module = copy.deepcopy(resnet)
    module.drop_rate = rate
    converted = convert_file(save(module, tmp_path / "old.pth"), model_args=ARGS["resnet"])
    assert converted.model.config.recipe["convert"]["rates"] == {}


def test_num_classes_without_a_layer_is_refused(resnet: nn.Module, tmp_path: Path) -> None:
    module = copy.deepcopy(resnet)
    module.num_classes = 2**20
    with pytest.raises(CheckpointError, match=r"\['num_classes'\]: 1048576 "):
        convert_file(save(module, tmp_path / "old.pth"), model_args=ARGS["resnet"])


@pytest.fixture
def no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Disable the network; return the empty cache of the Hub."""

    def refuse_connection(*_: Any, **__: Any) -> Any:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "urlopen", refuse_connection)
    return tmp_path / "cache"


def test_base_is_recorded_with_its_fingerprint(no_network: Path, tmp_path: Path) -> None:
    place = no_network / "models--timm--test_resnet.r160_in1k"
    for folder in ("refs", f"snapshots/{'a' * 40}"):
        (place / folder).mkdir(parents=True)
    (place / "refs" / "main").write_text("a" * 40)
    trained = timm.create_model("test_resnet")
    save_file(trained.state_dict(), place / "snapshots" / ("a" * 40) / "model.safetensors")
    converted = convert_file(save(trained, tmp_path / "old.pth"), base="timm/test_resnet")
    source = converted.model.config.source
    assert (source["revision"], source["fingerprint"]) == ("a" * 40, fingerprint(trained))
    assert fingerprint(trained) in converted.notes[-1]


@pytest.mark.families
def test_unproven_assumptions_are_noted(no_network: Path, tmp_path: Path) -> None:
    whole = torchvision.models.mobilenet_v2().half()
    converted = convert_file(save(whole, tmp_path / "old.pth"))
    assert converted.model.config.source == {
        "name": "torchvision/mobilenet_v2",
        "pretrained": True,
        "seed": 0,
        "model_args": {},
    }
    assert converted.notes[1].endswith("cut from the trained weights of that base")
    assert "raw weights in float16" in converted.notes[1]
    assert converted.notes[-1].startswith("not recorded: the fingerprint")
    part = convert_file(save(make("resnet"), tmp_path / "part.pth"), model_args=ARGS["resnet"])
    assert part.model.config.source == {} and part.notes[1].endswith("stage pruned")


def test_messages_contain_no_control_characters(tmp_path: Path) -> None:
    line = refuse("convert", save({"a\x1b[31m": 1}, tmp_path / "old.pth"), "--output", tmp_path / "new")
    assert "\x1b" not in line and "its entries are 'a\\x1b[31m'" in line


def _read_pickle(file: Path) -> bytes:
    with zipfile.ZipFile(file) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))


def test_safetensors_file_is_sent_to_weights(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"fc.weight": torch.ones(2, 2)}, file)
    with pytest.raises(RecipeError, match=r"--prune\.weights"):
        convert_file(file)
