"""A pruned model behaves like the stock class of its base in transformers, row by row."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers.folders import assert_same, logits, tensors
from helpers.marks import one_of_each
from helpers.tiny_models import TIMM, TRANSFORMERS, make_base, make_images
from PIL import Image
from torch import nn
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    PreTrainedModel,
    ResNetBackbone,
    SwinBackbone,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    TimmWrapperModel,
    pipeline,
)

from isoprune_hf.checkpoint.modeling_isoprune import IsoPruneBackbone, IsoPruneForImageClassification, IsoPruneModel
from isoprune_hf.errors import CheckpointError

STOCK = ("vit", "resnet", "hf-vit", "hf-swin", "hf-resnet", "hf-convnext")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[PreTrainedModel, PreTrainedModel]]:
    """Return a function that returns the base of a family as our class and as the stock class, of equal weights."""

    def give(
        family: str, stock_class: type = TimmWrapperForImageClassification
    ) -> tuple[PreTrainedModel, PreTrainedModel]:
        ours = make_base(family, tmp_path_factory.mktemp("bases")).eval()
        if family in TRANSFORMERS:
            return ours, copy.deepcopy(ours.model).eval()
        name, args = TIMM[family]
        architecture = name.removeprefix("timm/")
        stock = stock_class(TimmWrapperConfig(architecture=architecture, model_args=args, num_labels=7)).eval()
        stock.timm_model.load_state_dict(ours.model.state_dict(), strict=stock_class is not TimmWrapperModel)
        return ours, stock

    return give


def assert_equal_outputs(ours: Any, stock: Any) -> None:
    assert list(ours) == list(stock)
    for name in stock:
        both = [output[name] if isinstance(output[name], tuple | list) else [output[name]] for output in (ours, stock)]
        assert [first.shape for first in both[0]] == [second.shape for second in both[1]]
        assert all(torch.equal(first, second) for first, second in zip(*both, strict=True)), name


@pytest.mark.parametrize("family", STOCK)
def test_outputs_equal_those_of_stock_class(family: str, pair) -> None:
    ours, stock = pair(family)
    images, labels = make_images(ours), torch.tensor([1, 3])
    with torch.no_grad():
        assert_equal_outputs(ours(images, labels=labels), stock(images, labels=labels))
        states = ours(images, output_hidden_states=True)
        assert_equal_outputs(states, stock(images, output_hidden_states=True))
        assert len(states.hidden_states) > 1
        assert_equal_outputs(
            dict(enumerate(ours(images, labels, return_dict=False))),
            dict(enumerate(stock(images, labels, return_dict=False))),
        )


@pytest.mark.parametrize("family", ["hf-vit", "hf-swin"])
def test_attentions_equal_those_of_stock_class(family: str, pair) -> None:
    ours, stock = pair(family)
    ours.set_attn_implementation("eager")
    stock.set_attn_implementation("eager")
    images = make_images(ours)
    with torch.no_grad():
        output = ours(images, output_attentions=True)
        assert_equal_outputs(output, stock(images, output_attentions=True))
    assert len(output.attentions) == 2 if family == "hf-vit" else 4


def test_positions_are_interpolated_for_larger_images(pair) -> None:
    ours, stock = pair("hf-vit")
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = stock(images, interpolate_pos_encoding=True).logits
        assert torch.equal(ours(images, interpolate_pos_encoding=True).logits, expected)


@pytest.mark.parametrize("family", [*STOCK, "mobilenet_v2"])
def test_unknown_argument_is_a_type_error(family: str, pair, tmp_path: Path) -> None:
    ours = make_base(family, tmp_path)
    with pytest.raises(TypeError, match="pixel_value"):
        ours(make_images(ours), pixel_value=1)


def test_outputs_that_base_lacks_are_refused(tmp_path: Path) -> None:
    ours = make_base("mobilenet_v2", tmp_path)
    for name in ("output_hidden_states", "output_attentions"):
        with pytest.raises(ValueError, match=f"^{name}: MobileNetV2"):
            ours(make_images(ours), **{name: True})


def test_attention_implementation_reaches_base(pruned, tmp_path: Path) -> None:
    sample = pruned("hf-vit")
    model = AutoModelForImageClassification.from_pretrained(sample.folder, attn_implementation="eager")
    assert model.model.config._attn_implementation == "eager"
    torch.testing.assert_close(logits(model, sample.images), sample.logits, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        first = model(sample.images, output_attentions=True).attentions[0]
    torch.testing.assert_close(first.sum(-1), torch.ones(first.shape[:3]))
    model.save_pretrained(tmp_path)  # what a folder is opened with is not a part of it
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert again.model.config._attn_implementation == "sdpa"
    assert torch.equal(logits(again, sample.images), sample.logits)
    model.set_attn_implementation("sdpa")
    assert model.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("family", ["hf-vit", "hf-swin"])
def test_input_embeddings_are_those_of_stock_class(family: str, pair) -> None:
    ours, stock = pair(family)
    assert type(ours.get_input_embeddings()) is type(stock.get_input_embeddings())


@pytest.mark.parametrize(
    ("family", "name"), [("vit", "patch_embed.proj"), ("resnet", "conv1"), ("hf-resnet", "resnet.embedder.embedder")]
)
def test_first_layer_stands_for_missing_embeddings(family: str, name: str, tmp_path: Path) -> None:
    ours = make_base(family, tmp_path)
    layer = ours.model.get_submodule(name)
    assert ours.get_input_embeddings() in [layer, *layer.children()]


@pytest.mark.parametrize("family", ["vit", "resnet", "hf-vit"])
def test_gradient_checkpointing_gives_the_same_gradients(family: str, pruned) -> None:
    sample = pruned(family)
    model = copy.deepcopy(sample.model).eval()

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(sample.images, labels=torch.tensor([1, 3])).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    calls = []
    handle = next(module for module in model.model.modules() if isinstance(module, nn.LayerNorm | nn.BatchNorm2d))
    layer = [module for module in model.model.modules() if isinstance(module, type(handle))][-2]
    layer.register_forward_hook(lambda *_: calls.append(0))
    plain, before = gradients(), len(calls)
    model.train()
    for module in model.modules():  # checkpointing acts in train mode only; statistics must not change the result
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    model.gradient_checkpointing_enable()
    assert_same(gradients(), plain)
    assert len(calls) - before == 2  # the layer runs again in the backward pass


def test_base_without_gradient_checkpointing_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^MobileNetV2 has no gradient checkpointing"):
        make_base("mobilenet_v2", tmp_path).gradient_checkpointing_enable()


@pytest.mark.parametrize("family", ["vit", "resnet", "hf-vit", "mobilenet_v2"])
@pytest.mark.parametrize("labels", one_of_each([3, 20], 3))
def test_other_number_of_classes_keeps_all_but_head(family: str, labels: int, pruned, tmp_path: Path) -> None:
    sample = pruned(family)
    model = AutoModelForImageClassification.from_pretrained(
        sample.folder, num_labels=labels, ignore_mismatched_sizes=True
    )
    output = logits(model, sample.images)
    assert output.shape == (2, labels) and output.isfinite().all()
    fresh = {name for name, t in tensors(sample.model).items() if t.shape != tensors(model)[name].shape}
    assert 1 <= len(fresh) <= 2 and all(tensors(model)[name].shape[0] == labels for name in fresh)
    kept = {name: tensor for name, tensor in tensors(model).items() if name not in fresh}
    assert_same(kept, {name: tensor for name, tensor in tensors(sample.model).items() if name not in fresh})
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert again.config.num_labels == labels and torch.equal(logits(again, sample.images), output)


def test_other_number_of_classes_by_config(pruned) -> None:
    folder = pruned("vit").folder
    config = AutoConfig.from_pretrained(folder, id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1})
    model = AutoModelForImageClassification.from_pretrained(folder, config=config, ignore_mismatched_sizes=True)
    assert model.model.get_classifier().weight.shape[0] == 2 and model.config.label2id == {"no": 0, "yes": 1}
    with pytest.raises(CheckpointError, match=r"ignore_mismatched_sizes=True"):
        AutoModelForImageClassification.from_pretrained(folder, num_labels=3)


@pytest.mark.parametrize("family", ["vit", "resnet"])
def test_features_equal_those_of_timm_wrapper(family: str, pair, tmp_path: Path) -> None:
    ours, stock = pair(family, TimmWrapperModel)
    ours.save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path)
    assert type(model) is IsoPruneModel
    images = make_images(ours)
    with torch.no_grad():
        assert_equal_outputs(model(images), stock(images))
        assert_equal_outputs(model(images, output_hidden_states=True), stock(images, output_hidden_states=True))


@pytest.mark.parametrize("family", ["hf-vit", "hf-swin", "hf-resnet"])
def test_features_equal_those_of_transformers(family: str, pair, tmp_path: Path) -> None:
    ours, stock = pair(family)
    ours.save_pretrained(tmp_path)
    images = make_images(ours)
    with torch.no_grad():
        assert_equal_outputs(AutoModel.from_pretrained(tmp_path)(images), stock.base_model(images))


def test_feature_maps_equal_those_of_resnet_backbone(pair, tmp_path: Path) -> None:
    ours, classifier = pair("hf-resnet")
    ours.save_pretrained(tmp_path)
    names = ["stage1", "stage3"]
    config = copy.deepcopy(classifier.config)
    config.out_features = names
    stock = ResNetBackbone(config).eval()
    stock.load_state_dict(
        {name.removeprefix("resnet."): t for name, t in classifier.state_dict().items()}, strict=False
    )
    model = IsoPruneBackbone.from_pretrained(tmp_path, out_features=names)
    assert (model.out_features, model.channels) == (stock.out_features, stock.channels)
    images = make_images(ours)
    with torch.no_grad():
        assert_equal_outputs(model(images), stock(images))


def test_feature_maps_equal_those_of_swin_backbone(pair, tmp_path: Path) -> None:
    ours, classifier = pair("hf-swin")
    ours.save_pretrained(tmp_path)
    names = ["stem", "stage1", "stage2"]
    config = copy.deepcopy(classifier.config)
    config.out_features = names
    stock = SwinBackbone(config).eval()
    stock.load_state_dict(classifier.state_dict(), strict=False)
    model = IsoPruneBackbone.from_pretrained(tmp_path, out_features=names)
    assert (model.out_features, model.channels) == (stock.out_features, stock.channels)
    images = make_images(ours)
    with torch.no_grad():
        maps, wanted = model(images).feature_maps, stock(images).feature_maps
    for found, normed in zip(maps, wanted, strict=True):  # by layer norms that the classifier does not have
        plain = torch.nn.functional.layer_norm(found.permute(0, 2, 3, 1), found.shape[1:2]).permute(0, 3, 1, 2)
        assert torch.allclose(plain, normed, atol=1e-5)


@pytest.mark.parametrize("family", ["hf-vit", "hf-deit"])
def test_feature_maps_of_a_vit_are_its_patches(family: str, pruned) -> None:
    sample = pruned(family)
    model = IsoPruneBackbone.from_pretrained(sample.folder, out_features=["stem", "stage2"])
    with torch.no_grad():
        maps = model(sample.images).feature_maps
        states = copy.deepcopy(sample.model)(sample.images, output_hidden_states=True).hidden_states
    assert model.channels == [states[0].shape[2]] * 2
    for found, state in zip(maps, (states[0], states[2]), strict=True):
        assert found.shape == (2, state.shape[2], 4, 4)
        assert torch.equal(found[:, :, 1, 3], state[:, state.shape[1] - 16 + 7])


def test_feature_maps_equal_those_of_timm(pair, tmp_path: Path) -> None:
    ours, _ = pair("resnet")
    ours.save_pretrained(tmp_path)
    name, args = TIMM["resnet"]
    stock = timm.create_model(name.removeprefix("timm/"), features_only=True, out_indices=(1, 4), **args).eval()
    stock.load_state_dict(ours.model.state_dict(), strict=False)
    model = IsoPruneBackbone.from_pretrained(tmp_path, out_indices=[1, -1])
    assert (model.out_features, model.channels) == (["layer1", "layer4"], stock.feature_info.channels())
    images = make_images(ours)
    with torch.no_grad():
        maps = model(images).feature_maps
        assert all(torch.equal(first, second) for first, second in zip(maps, stock(images), strict=True))


def test_backbone_of_pruned_folder_has_its_channels(pruned) -> None:
    sample = pruned("resnet")
    config = AutoConfig.from_pretrained(sample.folder)
    model = AutoBackbone.from_config(config)
    maps = model.eval()(sample.images).feature_maps
    assert [found.shape[1] for found in maps] == model.channels == [sample.model.model.fc.in_features]
    with pytest.raises(ValueError, match=r"^out_features or out_indices: "):
        IsoPruneBackbone.from_pretrained(sample.folder, out_features=["layer9"])
    with pytest.raises(ValueError, match=r"^MobileNetV2 does not return feature maps"):
        IsoPruneBackbone.from_pretrained(pruned("mobilenet_v2").folder)


def test_feature_pipeline_opens_pruned_folder(pruned) -> None:
    sample = pruned("vit")
    extract = pipeline("image-feature-extraction", model=str(sample.folder))
    features = torch.tensor(extract(Image.new("RGB", (20, 20), (200, 30, 90))))
    assert features.shape == (1, 17, sample.model.model.norm.weight.numel())


@pytest.mark.parametrize("family", ["vit", "hf-vit", "mobilenet_v2"])
def test_saving_takes_the_arguments_of_transformers(family: str, pruned, tmp_path: Path) -> None:
    sample = pruned(family)
    sample.model.save_pretrained(tmp_path / "no", False)
    assert not (tmp_path / "no" / "model.safetensors").exists()
    sample.model.save_pretrained(tmp_path / "shards", True, None, False, "10KB", variant="fp32")
    assert len(list((tmp_path / "shards").glob("model.fp32-*.safetensors"))) > 1
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "shards", variant="fp32")
    assert torch.equal(logits(model, sample.images), sample.logits)


@pytest.mark.parametrize("family", ["vit", "hf-vit", "mobilenet_v2"])
def test_replica_of_data_parallel_gives_the_same_logits(family: str, pruned) -> None:
    sample = pruned(family)
    replica = copy.deepcopy(sample.model)
    for module in list(replica.modules()):  # as torch.nn.parallel.replicate leaves the modules of a replica
        module._former_parameters = dict(module._parameters)
        module._parameters = {}
        for name, parameter in module._former_parameters.items():
            setattr(module, name, None if parameter is None else parameter.detach())
    assert not list(replica.parameters())
    assert torch.equal(logits(replica, sample.images.double()), sample.logits)


@pytest.mark.parametrize("family", ["vit", "hf-vit", "mobilenet_v2"])
def test_model_survives_pickle_of_a_process(family: str, pruned) -> None:
    sample = pruned(family)
    again = pickle.loads(pickle.dumps(sample.model))
    assert type(again) is IsoPruneForImageClassification
    assert torch.equal(logits(again, sample.images), sample.logits)


@pytest.mark.parametrize("family", one_of_each(["vit", "hf-vit"], "vit"))
def test_graph_of_compiled_model_is_whole(family: str, pruned) -> None:
    sample = pruned(family)
    compiled = torch.compile(sample.model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(sample.images).logits, sample.logits)
