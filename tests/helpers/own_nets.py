"""A network of a caller, in a module that other programs can import."""

from torch import Tensor, nn


class OwnNet(nn.Module):
    """A classifier of vectors with one hidden layer."""

    def __init__(self, width: int, classes: int = 4):
        super().__init__()
        self.hidden = nn.Linear(5, width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(x).relu())
