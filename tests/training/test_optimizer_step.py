import copy

import pytest
import torch
from timm.utils import adaptive_clip_grad
from torch import nn

from isoprune_hf.errors import DivergedError
from isoprune_hf.recipes import FinetuneRecipe
from isoprune_hf.training.optimizer_step import check_faults, clip_gradient, take_step


def make_net() -> nn.Module:
    """Return three layers with gradients that are large compared with the weights."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3))
    (10 * net(torch.randn(5, 4)).square().sum()).backward()
    return net


def gradients(net: nn.Module) -> list[torch.Tensor]:
    return [parameter.grad.clone() for parameter in net.parameters()]


def norm_of(tensors: list[torch.Tensor]) -> float:
    return sum(tensor.double().square().sum().item() for tensor in tensors) ** 0.5


def test_norm_is_clipped_and_old_norm_returned():
    net = make_net()
    before = gradients(net)
    assert clip_gradient(net, FinetuneRecipe(clip_grad=0.5)) == pytest.approx(norm_of(before), rel=1e-5)
    factor = 0.5 / norm_of(before)
    for mine, was in zip(gradients(net), before, strict=True):
        torch.testing.assert_close(mine, was * factor, rtol=1e-4, atol=1e-7)


def test_values_are_clipped_one_by_one():
    net = make_net()
    before = gradients(net)
    assert clip_gradient(net, FinetuneRecipe(clip_grad=0.5, clip_mode="value")) == pytest.approx(norm_of(before))
    assert all(torch.equal(mine, was.clamp(-0.5, 0.5)) for mine, was in zip(gradients(net), before, strict=True))


def test_agc_equals_timm_and_excludes_the_last_layer():
    net, reference = make_net(), make_net()
    before = gradients(net)
    clip_gradient(net, FinetuneRecipe(clip_grad=0.05, clip_mode="agc"))
    adaptive_clip_grad(list(reference.parameters())[:-2], 0.05)
    assert all(torch.equal(*pair) for pair in zip(gradients(net), gradients(reference), strict=True))
    assert all(torch.equal(mine, was) for mine, was in zip(gradients(net)[-2:], before[-2:], strict=True))
    ratios = net[0].weight.grad.norm(dim=1) / net[0].weight.norm(dim=1)
    torch.testing.assert_close(ratios, torch.full_like(ratios, 0.05))  # all of them were above it


@pytest.mark.parametrize(("loss", "poison"), [(float("nan"), 0.0), (1.0, float("inf"))])
def test_a_step_that_is_not_finite_changes_nothing(loss: float, poison: float):
    net = make_net()
    net[1].weight.grad += poison
    before, optimizer = copy.deepcopy(net.state_dict()), torch.optim.AdamW(net.parameters())
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    step = take_step(net, optimizer, scaler, FinetuneRecipe(), loss=loss)
    assert step.fault == ("the loss is nan" if poison == 0 else "the norm of the gradient is inf")
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert not optimizer.state


def test_fp16_may_overflow_24_times_in_a_row():
    net, recipe = make_net(), FinetuneRecipe(precision="fp16", clip_grad=1.0)
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scaler.scale(torch.ones(()))  # makes the scale
    for number in range(1, 25):
        net[0].weight.grad.fill_(float("inf"))
        step = take_step(net, optimizer, scaler, recipe, loss=1.0)
        check_faults(step.fault, number, recipe, loss=1.0, place="update 3 of epoch 1")
    assert scaler.get_scale() == 2.0**-8
    with pytest.raises(DivergedError, match=r"update 3 of epoch 1, 25 .*finetune\.precision: bf16"):
        check_faults("the norm is inf", 25, recipe, loss=1.0, place="update 3 of epoch 1")
