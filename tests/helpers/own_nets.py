"""Networks of a caller, in a module that other programs can import."""

from torch import Tensor, nn


class OwnNet(nn.Module):
    """A classifier of vectors with one hidden layer."""

    def __init__(self, width: int, classes: int = 4):
        super().__init__()
        self.hidden = nn.Linear(5, width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(x).relu())


def make_own(num_classes: int, width: int = 8) -> OwnNet:
    return OwnNet(width, num_classes)


class TwoInputs(nn.Module):
    """A classifier of images with a vector beside each, which returns a mapping."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.side = nn.Linear(6, 4)
        self.head = nn.Linear(width, 4)

    def forward(self, image: Tensor, extra: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.conv(image).relu().mean((2, 3))) + self.side(extra)}
