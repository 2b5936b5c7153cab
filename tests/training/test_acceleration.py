import functools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.tiny_models import make_base, make_images
from helpers.training import ACCELERATOR, make_data, make_net, make_recipe, train
from PIL import Image
from torch import nn

from isoprune_hf.checkpoint.folder import save_model_folder
from isoprune_hf.checkpoint.modeling_isoprune import IsoImageProcessor
from isoprune_hf.errors import RecipeError
from isoprune_hf.models import load_base
from isoprune_hf.recipes import FinetuneRecipe
from isoprune_hf.training.finetune import finetune
from isoprune_hf.training.teacher import Teacher

CPU = torch.device("cpu")


def train_model(model: nn.Module, side: int, **options: object) -> dict:
    recipe = FinetuneRecipe(epochs=1, batch_size=4, crop_scale=(1.0, 1.0), distillation="none", learning_rate=1e-2)
    recipe = FinetuneRecipe(**{**vars(recipe), "optimizer": "sgd", **options})
    processor = IsoImageProcessor(size={"height": side, "width": side}, do_center_crop=False)
    data = make_data(train=8, evaluation=0, side=side)
    return finetune(model, data, processor, recipe, accelerator=ACCELERATOR)


@pytest.mark.parametrize(("family", "side"), [("resnet", 64), ("vit", 16)])
def test_channels_last_trains_same_weights_and_is_undone(family: str, side: int, tmp_path: Path):
    plain, model = (make_base(family, tmp_path, labels=3) for _ in range(2))
    formats = []
    conv = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    conv.register_forward_hook(
        lambda module, inputs, output: formats.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
    )
    train_model(plain, side)
    train_model(model, side, channels_last=True, ema_decay=0.5)
    assert formats and all(formats)
    assert all(parameter.is_contiguous() for parameter in model.parameters())
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), atol=1e-4, rtol=1e-3)


def test_channels_last_checkpoint_opens_normally(tmp_path: Path):
    model = make_base("resnet", tmp_path, labels=3)
    images = make_images(model)
    with torch.no_grad():
        logits = model.eval()(images).logits
        model.to(memory_format=torch.channels_last)
        torch.testing.assert_close(model(images).logits, logits, atol=1e-5, rtol=1e-5)
    save_model_folder(tmp_path / "saved", model, IsoImageProcessor())
    with torch.no_grad():
        again = load_base(str(tmp_path / "saved")).model.eval()(images).logits
    assert torch.equal(again, logits)


@pytest.mark.parametrize(("family", "side"), [("resnet", 64), ("vit", 16), ("hf-vit", 16)])
def test_checkpointing_recomputes_the_blocks_and_changes_no_weight(family: str, side: int, tmp_path: Path):
    states, calls = [], []
    for is_on in (False, True):
        model = make_base(family, tmp_path, labels=3)
        norms = [m for m in model.modules() if isinstance(m, (nn.BatchNorm2d, nn.LayerNorm))]
        count = []
        norms[-2].register_forward_hook(lambda *_, count=count: count.append(1))
        train_model(model, side, grad_checkpointing=is_on, grad_accumulation=2)
        states.append(model.state_dict())
        calls.append(len(count))
    assert calls[1] == 2 * calls[0] > 0
    torch.testing.assert_close(states[0], states[1], atol=1e-6, rtol=1e-5)


def test_network_without_checkpointing_support_raises(tmp_path: Path):
    with pytest.raises(RecipeError, match=r"finetune\.grad_checkpointing.*MobileNetV2"):
        train_model(make_base("mobilenet_v2", tmp_path, labels=3), 64, grad_checkpointing=True)


def test_compiled_models_train_the_same_weights(monkeypatch: pytest.MonkeyPatch):
    compiled, compile_ = [], functools.partial(torch.compile, backend="eager")

    def record(module: nn.Module) -> nn.Module:
        compiled.append(module)
        return compile_(module)

    nets, teacher = [make_net(), make_net()], make_net(seed=1)
    train(nets[0], make_recipe(), teacher=teacher)
    monkeypatch.setattr(torch, "compile", record)
    train(nets[1], make_recipe(torch_compile=True), teacher=teacher)
    assert {id(module) for module in compiled} == {id(nets[1]), id(teacher)}
    torch.testing.assert_close(nets[0].state_dict(), nets[1].state_dict(), atol=1e-6, rtol=1e-5)


def test_bf16_teacher_is_a_copy_without_autocast():
    model, images = make_net(), torch.randn(5, 3, 4, 4)
    exact = Teacher(model, FinetuneRecipe(), device=CPU)(images)[0]
    half = Teacher(model, FinetuneRecipe(teacher_precision="bf16", channels_last=True), device=CPU)(images)[0]
    assert model.stem.weight.dtype == torch.float32 and half.dtype == torch.bfloat16
    assert torch.equal(exact, model(images).logits) and not torch.equal(half.float(), exact)
    torch.testing.assert_close(half.float(), exact, atol=3e-2, rtol=3e-2)
    with torch.autocast("cpu", torch.bfloat16):
        full = Teacher(model, FinetuneRecipe(teacher_precision="no"), device=CPU)(images)[0]
    assert full.dtype == torch.float32 and torch.equal(full, exact)
    assert not exact.is_inference() and not exact.requires_grad


def test_teacher_gets_its_own_normalisation():
    student = IsoImageProcessor(image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.3, 0.4])
    own = IsoImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7])
    raw = torch.rand(2, 3, 4, 4)

    def normalise(processor: IsoImageProcessor) -> torch.Tensor:
        mean, std = (torch.tensor(v)[:, None, None] for v in (processor.image_mean, processor.image_std))
        return (raw - mean) / std

    class Echo(nn.Module):
        def forward(self, pixel_values: torch.Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=pixel_values)

    seen = Teacher(Echo(), FinetuneRecipe(), device=CPU, processors=(student, own))(normalise(student))[0]
    torch.testing.assert_close(seen, normalise(own), atol=1e-5, rtol=1e-5)
    same = Teacher(Echo(), FinetuneRecipe(), device=CPU, processors=(student, student))(raw)[0]
    assert torch.equal(same, raw)


def test_teacher_of_rgb_images_reads_grey_ones():
    class Echo(nn.Module):
        def forward(self, pixel_values: torch.Tensor) -> SimpleNamespace:
            return SimpleNamespace(logits=pixel_values)

    grey = Image.effect_mandelbrot((32, 32), (-2, -1, 1, 1), 30)
    sizes = {"size": {"height": 16, "width": 16}, "do_center_crop": False}
    student = IsoImageProcessor(image_mean=[0.4], image_std=[0.2], **sizes)
    own = IsoImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7], **sizes)
    pixels, expected = (processor(grey, return_tensors="pt").pixel_values for processor in (student, own))
    seen = Teacher(Echo(), FinetuneRecipe(), device=CPU, processors=(student, own))(pixels)[0]
    torch.testing.assert_close(seen, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("student", "teacher"), [(3, 1), (4, 3), (1, 4), (6, 3)])
def test_teacher_of_other_channels_is_refused(student: int, teacher: int):
    processors = tuple(IsoImageProcessor(image_mean=[0.5] * n, image_std=[0.5] * n) for n in (student, teacher))
    with pytest.raises(RecipeError, match=r"finetune\.teacher"):
        Teacher(nn.Linear(1, 1), FinetuneRecipe(), device=CPU, processors=processors)
