"""Adapters, quantisation and the Trainer of transformers take a pruned folder as they take its base."""

from pathlib import Path

import pytest
import torch
from helpers.folders import logits
from helpers.marks import one_of_each
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import Dataset
from transformers import (
    AutoModelForImageClassification,
    EvalPrediction,
    TorchAoConfig,
    Trainer,
    TrainingArguments,
    set_seed,
)

LABELS = torch.tensor([1, 3])
TARGETS = {
    "vit": ["qkv", "fc1"],
    "resnet": ["conv1", "conv2"],
    "hf-vit": ["q_proj", "v_proj"],
    "mobilenet_v2": "all-linear",
}


@pytest.mark.parametrize("family", TARGETS)
def test_adapter_trains_reloads_and_merges(family: str, pruned, tmp_path: Path) -> None:
    sample = pruned(family)

    def opened() -> torch.nn.Module:
        return AutoModelForImageClassification.from_pretrained(sample.folder)

    adapted = get_peft_model(opened(), LoraConfig(target_modules=TARGETS[family], r=2))
    optimizer = torch.optim.SGD((p for p in adapted.parameters() if p.requires_grad), lr=0.1)
    adapted.eval()
    for _ in range(2):  # the first step trains only one of the two matrices, the other begins at zero
        optimizer.zero_grad()
        adapted(pixel_values=sample.images, labels=LABELS).loss.backward()
        optimizer.step()
    trained = logits(adapted, sample.images)
    assert not torch.allclose(trained, sample.logits)
    adapted.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(opened(), tmp_path / "adapter").eval()
    assert torch.equal(logits(again, sample.images), trained)
    merged = again.merge_and_unload()
    torch.testing.assert_close(logits(merged, sample.images), trained, rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    reopened = AutoModelForImageClassification.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(reopened, sample.images), logits(merged, sample.images))


@pytest.mark.parametrize("family", ["vit", "hf-vit"])
def test_folder_opens_with_int8_weights(family: str, pruned) -> None:
    quantization = pytest.importorskip("torchao.quantization")  # an import of it prints to all that is tested here
    sample = pruned(family)
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    model = AutoModelForImageClassification.from_pretrained(sample.folder, quantization_config=config)
    assert {type(parameter.data).__name__ for parameter in model.parameters()} == {"Int8Tensor", "Tensor"}
    # The spacing of a row's largest weight over 127 steps, in a network of two blocks.
    assert (logits(model, sample.images) - sample.logits).norm() < 0.02 * sample.logits.norm()


class _Rows(Dataset):
    def __init__(self, images: torch.Tensor):
        self.images = images

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.images[index % 2] + index, "labels": torch.tensor(index % 7)}


def _accuracy(prediction: EvalPrediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def _train(folder: Path, output: Path, images: torch.Tensor, resume: str | None = None, **options) -> Trainer:
    set_seed(0)
    arguments = TrainingArguments(
        str(output),
        num_train_epochs=2,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        use_cpu=True,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    rows, model = _Rows(images), AutoModelForImageClassification.from_pretrained(folder)
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, compute_metrics=_accuracy)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("family", one_of_each(["vit", "hf-vit"], "vit"))
def test_trainer_keeps_the_best_and_resumes(family: str, pruned, tmp_path: Path) -> None:
    sample = pruned(family)
    whole = _train(sample.folder, tmp_path / "whole", sample.images)
    first = tmp_path / "whole" / "checkpoint-2"
    resumed = _train(sample.folder, tmp_path / "resumed", sample.images, str(first))
    assert torch.equal(logits(resumed.model, sample.images), logits(whole.model, sample.images))
    assert whole.state.best_model_checkpoint.startswith(str(tmp_path / "whole" / "checkpoint-"))
    reopened = AutoModelForImageClassification.from_pretrained(whole.state.best_model_checkpoint)
    assert torch.equal(logits(reopened, sample.images), logits(whole.model, sample.images))


def test_trainer_trains_in_bfloat16(pruned, tmp_path: Path) -> None:
    sample = pruned("vit")
    trained = _train(sample.folder, tmp_path, sample.images, bf16=True).model
    assert {parameter.dtype for parameter in trained.parameters()} == {torch.float32}
    assert not torch.equal(logits(trained, sample.images), sample.logits)
