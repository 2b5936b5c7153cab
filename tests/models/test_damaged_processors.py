"""Damaged image processors are refused, and code that they name is not run."""

import json

import pytest
from helpers.bases import (
    copy_of,
    refused,
)

from isoprune_hf.checkpoint.modeling_isoprune import IsoImageProcessor
from isoprune_hf.errors import IsoPruneError
from isoprune_hf.models import load_base


@pytest.mark.parametrize(
    ("family", "text"),
    [
        ("vit", None),
        ("hf-vit", None),
        ("vit", ""),
        ("vit", "{"),
        ("hf-vit", "{"),
        ("vit", "[]"),
        ("vit", "5"),
        ("vit", "null"),
        ("vit", b"\xff\xfe{"),
        ("vit", "[" * 10**5),
        ("vit", '{"size": "x"}'),
        ("hf-vit", '{"size": "x"}'),
        ("vit", '{"crop_size": "x"}'),
        ("vit", '{"size": {"shortest_edge": -5}}'),
        ("vit", '{"size": {"shortest_edge": 0}}'),
        ("vit", '{"crop_size": {"height": 1000000000, "width": 1000000000}}'),
        ("vit", '{"crop_size": {"height": 4097, "width": 4097}}'),
        ("hf-vit", '{"size": {"height": 16384, "width": 16384}, "image_processor_type": "ViTImageProcessor"}'),
        (
            "hf-vit",
            '{"image_processor_type": "ViTImageProcessor", "do_pad": true, "pad_size": {"height": 99999, "width": 1}}',
        ),
        ("vit", '{"rescale_factor": 1e999}'),
        ("vit", '{"rescale_factor": %s}' % ("9" * 400)),
        ("vit", '{"image_mean": "x"}'),
        ("vit", '{"image_mean": [1, 2]}'),
        ("vit", '{"image_std": [0, 0, 0]}'),
        ("hf-vit", '{"image_std": [0, 0, 0]}'),
        ("vit", '{"resample": "x"}'),
        ("hf-vit", '{"resample": "x"}'),
        ("vit", '{"resample": 99}'),
        ("vit", '{"image_processor_type": "Evil"}'),
        ("vit", '{"image_processor_type": 5}'),
        ("vit", '{"auto_map": 5}'),
        ("vit", "{}"),  # the default makes images of 224 x 224
    ],
)
def test_damaged_processor_is_refused(family: str, text: str | bytes | None, pruned, tmp_path) -> None:
    folder = copy_of(pruned(family).folder, tmp_path)
    file = folder / "preprocessor_config.json"
    if text is None:
        file.unlink()
    else:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert "processor" in refused(str(folder), IsoPruneError)


def test_empty_mapping_of_processors_is_refused(pruned, tmp_path) -> None:
    folder = copy_of(pruned("vit").folder, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"]["AutoImageProcessor"] = {}
    (folder / "config.json").write_text(json.dumps(config))
    assert "processor" in refused(str(folder), IsoPruneError)


@pytest.mark.parametrize("text", ["", "{", '{"image_processor_type": "Evil"}', '{"size": "x"}'])
def test_damaged_processor_is_not_replaced_by_default(text: str, transformers_folder, tmp_path) -> None:
    folder = copy_of(transformers_folder("hf-vit"), tmp_path)
    (folder / "preprocessor_config.json").write_text(text)
    assert refused(str(folder), IsoPruneError).startswith("preprocessor_config.json of ")


def test_code_named_by_processor_is_not_run(pruned, tmp_path, monkeypatch) -> None:
    folder = copy_of(pruned("vit").folder, tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": {"AutoImageProcessor": "evil.Evil"}}))
    (folder / "evil.py").write_text("raise SystemExit('run')")
    try:
        assert type(load_base(str(folder)).processor) is IsoImageProcessor
    except IsoPruneError as error:
        assert "\n" not in str(error)
