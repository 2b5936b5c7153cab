"""Small networks that each do one unusual thing; `NETWORKS` lists them, registered with timm as `isoprune_odd_NAME`.

Every network takes (B, 3, 32, 32) images and has channels that can be removed. A tool that prunes them must leave the
unusual part as it is, or handle it; it must never refuse or break the network.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
import timm
import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.nn import functional

from isoprune_hf.models import BaseModel, load_base

WIDTH, CLASSES = 32, 5
NETWORKS: dict[str, type["Net"]] = {}


def odd(cls: type["Net"]) -> type["Net"]:
    """Register a network under its class's name."""
    name = "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in cls.__name__).strip("_")
    NETWORKS[name] = cls

    def build(num_classes: int = CLASSES, **_: Any) -> nn.Module:
        net = cls(num_classes)
        net.pretrained_cfg = {"input_size": (net.in_channels, 32, 32), "num_classes": num_classes}
        return net

    build.__name__ = f"isoprune_odd_{name}"
    build.__module__ = __name__
    globals()[build.__name__] = build
    timm.models.register_model(build)
    return cls


class Net(nn.Module):
    """A stem to (B, WIDTH, 8, 8), a body, and a linear head on the mean over positions."""

    in_channels = 3

    def __init__(self, num_classes: int):
        super().__init__()
        self.num_classes = num_classes
        self.stem = nn.Conv2d(self.in_channels, WIDTH, 4, 4)
        self.build()
        self.head = nn.Linear(WIDTH, num_classes)

    def build(self) -> None:
        raise TypeError("a network defines its body")

    def body(self, x: Tensor) -> Tensor:
        raise TypeError("a network defines its body")

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(self.stem(images)).mean((2, 3)))


class TokenNet(Net):
    """The same over tokens: (B, 64, WIDTH)."""

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(self.stem(images).flatten(2).transpose(1, 2)).mean(1))


class Mlp(nn.Module):
    def __init__(self, width: int = WIDTH, hidden: int = 2 * WIDTH):
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(functional.gelu(self.up(x)))


class Block(nn.Module):
    def __init__(self, width: int = WIDTH, hidden: int = WIDTH):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, hidden, 3, padding=1, bias=False), nn.BatchNorm2d(hidden)
        self.conv2, self.norm2 = nn.Conv2d(hidden, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(x + self.norm2(self.conv2(functional.relu(self.norm1(self.conv1(x))))))


class BatchNormAttention(nn.Module):
    """Attention whose projections are followed by BatchNorm, as LeViT's: buffers lie inside its group."""

    def __init__(self, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.qkv, self.norm = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.BatchNorm1d(3 * WIDTH)
        self.project, self.norm2 = nn.Linear(WIDTH, WIDTH, bias=False), nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        qkv = self.norm(self.qkv(x).flatten(0, 1)).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        scores = (query @ key.transpose(-2, -1)) * query.shape[-1] ** -0.5
        out = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        return x + self.norm2(self.project(out).flatten(0, 1)).view(batch, tokens, -1)


@odd
class BuffersInAttention(TokenNet):
    def build(self) -> None:
        self.blocks = nn.Sequential(BatchNormAttention(), Mlp(), BatchNormAttention(), Mlp())

    def body(self, x: Tensor) -> Tensor:
        return self.blocks(x)


@odd
class KeywordCalls(Net):
    """Layers are called by keyword."""

    def build(self) -> None:
        self.conv1, self.norm = nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH)
        self.conv2, self.mlp = nn.Conv2d(WIDTH, WIDTH, 1), nn.Linear(WIDTH, WIDTH)

    def body(self, x: Tensor) -> Tensor:
        x = x + self.conv2(input=self.norm(input=self.conv1(input=x)).relu())
        return x + self.mlp(input=x.movedim(1, -1)).movedim(-1, 1)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(input=self.body(self.stem(input=images)).mean((2, 3)))


@odd
class SharedParameter(TokenNet):
    """Two layers own one weight."""

    def build(self) -> None:
        self.first, self.second = Mlp(), Mlp()
        self.second.up.weight, self.second.down.weight = self.first.up.weight, self.first.down.weight

    def body(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


@odd
class TwoNames(TokenNet):
    """One module is registered under two names, and called through both."""

    def build(self) -> None:
        self.first, self.between = Mlp(), Mlp()
        self.again = self.first

    def body(self, x: Tensor) -> Tensor:
        return self.again(self.between(self.first(x)))


@odd
class TokenMixer(TokenNet):
    """A linear layer runs over the tokens, so the channels are its rows."""

    def build(self) -> None:
        self.norm, self.mix, self.back = nn.LayerNorm(WIDTH), nn.Linear(64, 48), nn.Linear(48, 64)
        self.mlp = Mlp()

    def body(self, x: Tensor) -> Tensor:
        x = x + self.back(functional.gelu(self.mix(self.norm(x).transpose(1, 2)))).transpose(1, 2)
        return self.mlp(x)


@odd
class KeepsMaps(TokenNet):
    """A module keeps tensors of its last pass, with their graph."""

    def build(self) -> None:
        self.maps: list[Tensor] = []
        self.named: dict[str, Tensor] = {}
        self.last: Tensor | None = None
        self.attention, self.mlp = nn.Linear(WIDTH, WIDTH), Mlp()

    def body(self, x: Tensor) -> Tensor:
        weights = (self.attention(x) @ x.transpose(1, 2) * WIDTH**-0.5).softmax(-1)
        self.maps.append(weights)
        self.named["last"], self.last = weights, weights
        return self.mlp(x + weights @ x)


@odd
class CachesBias(TokenNet):
    """A module computes a table in train mode and caches it for eval mode, as LeViT does."""

    def build(self) -> None:
        self.table = nn.Parameter(torch.randn(4, 16) * 0.1)
        self.register_buffer("index", torch.arange(64 * 64).remainder(16).view(64, 64), persistent=False)
        self.cache: dict[str, Tensor] = {}
        self.attention, self.mlp = nn.Linear(WIDTH, 3 * WIDTH), Mlp()

    def bias(self, device: torch.device) -> Tensor:
        if self.training:
            return self.table[:, self.index]
        key = str(device)
        if key not in self.cache:
            self.cache[key] = self.table[:, self.index]
        return self.cache[key]

    def body(self, x: Tensor) -> Tensor:
        query, key, value = self.attention(x).view(len(x), 64, 3, 4, -1).permute(2, 0, 3, 1, 4).unbind(0)
        scores = query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5 + self.bias(x.device)
        return self.mlp(x + (scores.softmax(-1) @ value).transpose(1, 2).flatten(2))


@odd
class BareTokens(TokenNet):
    """Register tokens and positions are parameters without a layer."""

    def build(self) -> None:
        self.registers = nn.Parameter(torch.randn(1, 4, WIDTH))
        self.positions = nn.Parameter(torch.randn(1, 64, WIDTH))
        self.gate = nn.Parameter(torch.ones(4))
        self.attention, self.mlp = nn.MultiheadAttention(WIDTH, 4, batch_first=True), Mlp()

    def body(self, x: Tensor) -> Tensor:
        x = torch.cat([self.registers.expand(len(x), -1, -1), x + self.positions], dim=1)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.mlp(x)[:, 4:]


@odd
class GroupNormPerChannel(Net):
    def build(self) -> None:
        self.blocks = nn.Sequential(
            *(nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.GroupNorm(WIDTH, WIDTH), nn.ReLU()),
            *(nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.GroupNorm(WIDTH, WIDTH)),
        )

    def body(self, x: Tensor) -> Tensor:
        return x + self.blocks(x)


@odd
class OtherKeysAndValues(TokenNet):
    """MultiheadAttention with key and value dims of their own."""

    def build(self) -> None:
        self.keys, self.values = nn.Linear(WIDTH, 24), nn.Linear(WIDTH, 40)
        self.attention = nn.MultiheadAttention(WIDTH, 4, kdim=24, vdim=40, batch_first=True)
        self.mlp = Mlp()

    def body(self, x: Tensor) -> Tensor:
        attended, _ = self.attention(x, self.keys(x), self.values(x), need_weights=False)
        return self.mlp(x + attended)


@odd
class AuxiliaryHead(Net):
    """A part runs in train mode only."""

    def build(self) -> None:
        self.blocks = nn.Sequential(Block(), Block())
        self.auxiliary = nn.Sequential(nn.Conv2d(WIDTH, 16, 1), nn.Flatten(), nn.Linear(16 * 64, CLASSES))

    def forward(self, images: Tensor) -> Tensor:
        x = self.blocks(self.stem(images))
        logits = self.head(x.mean((2, 3)))
        return logits + 0.0 * self.auxiliary(x) if self.training else logits

    def body(self, x: Tensor) -> Tensor:
        return self.blocks(x)


@odd
class ZeroScale(Net):
    """The last norm of each block starts at zero, as timm initialises residual networks."""

    def build(self) -> None:
        self.blocks = nn.Sequential(Block(), Block())
        for block in self.blocks:
            nn.init.zeros_(block.norm2.weight)

    def body(self, x: Tensor) -> Tensor:
        return self.blocks(x)


@odd
class DeadBranch(Net):
    """A branch returns only zeros."""

    def build(self) -> None:
        self.dead, self.after, self.block = nn.Conv2d(WIDTH, WIDTH, 1), nn.Conv2d(WIDTH, WIDTH, 1), Block()
        nn.init.constant_(self.dead.bias, -1e4)

    def body(self, x: Tensor) -> Tensor:
        return self.block(x + self.after(functional.relu(self.dead(x))))


@odd
class HugeWeight(TokenNet):
    def build(self) -> None:
        self.first, self.second = Mlp(), Mlp()
        with torch.no_grad():
            self.first.up.weight.mul_(1e6)
            self.first.down.weight.mul_(1e-6)

    def body(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


@odd
class RotaryTable(TokenNet):
    """Sines and cosines in a buffer that is not saved."""

    def build(self) -> None:
        angles = torch.arange(64)[:, None] * torch.logspace(0, -2, 4)
        self.register_buffer("sine", angles.sin().repeat(1, 2), persistent=False)
        self.register_buffer("cosine", angles.cos().repeat(1, 2), persistent=False)
        self.qkv, self.project, self.mlp = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), Mlp()

    def turn(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * self.cosine + torch.cat([-second, first], -1) * self.sine

    def body(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).view(len(x), 64, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind(0)
        out = functional.scaled_dot_product_attention(self.turn(query), self.turn(key), value)
        return self.mlp(x + self.project(out.transpose(1, 2).flatten(2)))


class RotaryAttention(nn.Module):
    """Attention whose queries and keys are rotated by angles that others made; it keeps heads and dims as numbers."""

    def __init__(self, heads: int = 4):
        super().__init__()
        self.heads, self.dim = heads, WIDTH // heads
        self.query, self.key, self.value, self.project = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def turn(self, x: Tensor, angles: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * angles.cos() + torch.cat([-second, first], -1) * angles.sin()

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        query, key, value = (
            layer(x).view(*x.shape[:2], self.heads, self.dim).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        out = functional.scaled_dot_product_attention(self.turn(query, angles), self.turn(key, angles), value)
        return x + self.project(out.transpose(1, 2).flatten(2))


@odd
class RotaryFrequencies(TokenNet):
    """Two attentions have their dims in common, as both rotate them by the same frequencies (DINOv3)."""

    def build(self) -> None:
        self.register_buffer("frequencies", torch.logspace(0, -2, 4), persistent=False)
        self.first, self.second, self.mlp = RotaryAttention(), RotaryAttention(), Mlp()

    def body(self, x: Tensor) -> Tensor:
        angles = (torch.arange(64)[:, None] * self.frequencies).tile(2)
        return self.mlp(self.second(self.first(x, angles), angles))


@odd
class Recurrent(TokenNet):
    def build(self) -> None:
        self.stem = nn.Conv2d(self.in_channels, WIDTH, 16, 16)  # four tokens: on the meta device a step takes 1 ms
        self.lstm, self.mlp = nn.LSTM(WIDTH, WIDTH // 2, batch_first=True, bidirectional=True), Mlp()

    def body(self, x: Tensor) -> Tensor:
        return self.mlp(x + self.lstm(x)[0])


@odd
class SizesByNumel(TokenNet):
    """A size is read by `numel`, a count by `len`, and both are compared."""

    def build(self) -> None:
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.norm, self.mlp = nn.LayerNorm(WIDTH), Mlp()

    def body(self, x: Tensor) -> Tensor:
        assert self.scale.numel() == x.shape[-1] == len(self.scale)
        x = x + functional.layer_norm(x, (self.scale.numel(),), self.norm.weight, self.norm.bias) * self.scale
        return self.mlp(x)


@odd
class SizesInConfigs(TokenNet):
    """Sizes are read from configs while the network runs; the modules share one of them."""

    def build(self) -> None:
        self.config = SimpleNamespace(widths=[WIDTH, 2 * WIDTH], heads=4)
        self.options = {"last": WIDTH}
        self.mlp = ConfiguredMlp(self.config)

    def body(self, x: Tensor) -> Tensor:
        return self.mlp(x).reshape(len(x), -1, self.options["last"])


class ConfiguredMlp(nn.Module):
    def __init__(self, config: SimpleNamespace):
        super().__init__()
        self.config, self.qkv, self.project = config, nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).reshape(*x.shape[:2], 3, self.config.heads, -1).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(*qkv.unbind(0)).transpose(1, 2).flatten(2)
        x = (x + self.project(attended)).view(*x.shape[:2], self.config.widths[0])
        return x + self.down(functional.gelu(self.up(x)).view(*x.shape[:2], self.config.widths[1]))


@odd
class ValuesInConstructor(Net):
    """Rates are read from a tensor while the network is built."""

    def build(self) -> None:
        self.rates = [rate.item() for rate in torch.linspace(0, 0.2, 3)]
        self.more = torch.linspace(0, 0.1, 3).tolist()
        self.total = float(torch.tensor([0.5, 0.5]).sum())
        self.rate = torch.linspace(0, 0.2, 3)[1].item()
        self.is_deep = bool(torch.tensor(self.rates).sum() > 0.1)
        self.scales = np.sqrt(np.cumsum(torch.ones(3).numpy()) + np.asarray(torch.arange(3))).tolist()
        count = int(torch.tensor([1.0, 1.0, 1.0]).sum()) if self.is_deep else 1
        self.blocks = nn.ModuleList(Block(hidden=int(width)) for width in torch.full((count,), 24))

    def body(self, x: Tensor) -> Tensor:
        for block, scale in zip(self.blocks, self.scales, strict=True):
            x = block(x) * (scale + self.rate)
        return x


@odd
class OneChannel(Net):
    in_channels = 1

    def build(self) -> None:
        self.blocks = nn.Sequential(Block(), Block())

    def body(self, x: Tensor) -> Tensor:
        return self.blocks(x)


@odd
class SixChannels(OneChannel):
    in_channels = 6


@odd
class ChannelAttention(Net):
    """A convolution runs along the channels, with a kernel size that follows from their number (ECA)."""

    def build(self) -> None:
        self.blocks, self.mix = nn.Sequential(Block(), Block()), nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def body(self, x: Tensor) -> Tensor:
        x = self.blocks(x)
        return x * self.mix(x.mean((2, 3))[:, None])[:, 0, :, None, None].sigmoid()


@odd
class SplitPaths(Net):
    """Each half of the channels goes through a path of its own, and the paths are weighed (SKNet)."""

    def build(self) -> None:
        self.channels, self.num_paths = WIDTH, 2
        self.paths = nn.ModuleList(nn.Conv2d(WIDTH // 2, WIDTH, 3, padding=1) for _ in range(2))
        self.reduce, self.select = nn.Conv2d(WIDTH, 8, 1), nn.Conv2d(8, 2 * WIDTH, 1)
        self.block = Block()

    def body(self, x: Tensor) -> Tensor:
        parts = x.split(self.channels // self.num_paths, 1)
        paths = torch.stack([path(part) for path, part in zip(self.paths, parts, strict=True)], 1)
        weights = self.select(self.reduce(paths.sum(1).mean((2, 3), keepdim=True)).relu())
        batch, channels, *_ = weights.shape
        weights = weights.view(batch, self.num_paths, channels // self.num_paths, 1, 1).softmax(1)
        return self.block(x + (paths * weights).sum(1))


@odd
class Reused(Net):
    """One block runs three times."""

    def build(self) -> None:
        self.block, self.other = Block(), Block()

    def body(self, x: Tensor) -> Tensor:
        return self.block(self.block(self.other(self.block(x))))


@odd
class OneBlockClassToken(TokenNet):
    """A single block and a class token: only one token of the last layer is read."""

    def build(self) -> None:
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.norm, self.attention, self.mlp = nn.LayerNorm(WIDTH), BatchNormAttention(), Mlp()

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        return self.head(self.norm(self.mlp(self.attention(x)))[:, 0])

    def body(self, x: Tensor) -> Tensor:
        return x


@odd
class WritesInPlace(Net):
    """Activations write into their inputs, and one buffer is overwritten in each pass."""

    def build(self) -> None:
        self.conv1, self.conv2 = nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.norm, self.act = nn.BatchNorm2d(WIDTH), nn.ReLU(inplace=True)
        self.register_buffer("seen", torch.zeros(WIDTH))

    def body(self, x: Tensor) -> Tensor:
        y = self.act(self.norm(self.conv1(x)))
        self.seen = y.detach().mean((0, 2, 3))
        y = self.conv2(y)
        y += x
        return self.act(y)


class DoubledConv(nn.Conv2d):
    """Multiplies with another tensor than its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(x, 2 * self.weight, self.bias, padding=self.padding)


@odd
class PadsByItself(Net):
    """Convolutions of their own classes: one pads its input itself, the other one changes its weight."""

    def build(self) -> None:
        self.padded = Conv2dSame(WIDTH, WIDTH, 3, stride=2)
        self.doubled = DoubledConv(WIDTH, WIDTH, 3, padding=1)

    def body(self, x: Tensor) -> Tensor:
        return self.doubled(self.padded(x).relu()).relu()


@odd
class DictOutput(Net):
    """Blocks pass dictionaries and tuples to each other."""

    def build(self) -> None:
        self.first, self.second = Block(), Block()

    def body(self, x: Tensor) -> Tensor:
        state: dict[str, Any] = {"x": self.first(x), "kept": (x, None)}
        return self.second(state["x"]) + state["kept"][0]


@odd
class HiddenOverflow(Net):
    """An activation overflows, and a sigmoid hides it: the logits are finite, and gradients before it are not."""

    def build(self) -> None:
        self.before, self.up, self.down = Block(), nn.Conv2d(WIDTH, WIDTH, 1), nn.Conv2d(WIDTH, WIDTH, 1)
        self.after = nn.Sequential(Block(), Block())
        with torch.no_grad():
            self.down.weight.abs_()

    def body(self, x: Tensor) -> Tensor:
        x = self.before(x)
        x = x + torch.sigmoid(self.down(torch.exp(1e3 * self.up(x))))
        return self.after(x)


@odd
class AuxiliaryNorm(Net):
    """A norm runs in train mode only, so no calibration image reaches it."""

    def build(self) -> None:
        self.blocks, self.norm = nn.Sequential(Block(), Block()), nn.BatchNorm2d(WIDTH)

    def body(self, x: Tensor) -> Tensor:
        x = self.blocks(x)
        return x + 0.0 * self.norm(x) if self.training else x


@odd
class TupleOutput(Net):
    """The logits come first in a tuple, before those of a second head, in every mode."""

    def build(self) -> None:
        self.blocks, self.second = nn.Sequential(Block(), Block()), nn.Linear(WIDTH, CLASSES)

    def forward(self, images: Tensor) -> Any:
        x = self.blocks(self.stem(images)).mean((2, 3))
        return self.head(x), self.second(x)


class Experts(nn.Module):
    """Each token is added to by the two experts that a gate selects, as in Mixtral."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 4, bias=False)
        self.experts = nn.ModuleList(Mlp() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        weights, selected = self.gate(rows).softmax(-1).topk(2)
        out = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            row, place = torch.where(selected == number)
            out.index_add_(0, row, expert(rows[row]) * weights[row, place, None])
        return x + out.view_as(x)


class ExpertsByMask(nn.Module):
    """Each token is added to by one of four experts; those that no token selects do not run."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 4)
        self.experts = nn.ModuleList(Mlp() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        selected = self.gate(x).argmax(-1)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            mask = selected == number
            if mask.any():
                out[mask] = expert(x[mask])
        return x + out


@odd
class SelectedExperts(TokenNet):
    def build(self) -> None:
        self.blocks = nn.Sequential(Mlp(), Experts(), Mlp())

    def body(self, x: Tensor) -> Tensor:
        return self.blocks(x)


@odd
class IdleExperts(TokenNet):
    def build(self) -> None:
        self.blocks = nn.Sequential(Mlp(), Mlp(), ExpertsByMask(), Mlp())

    def body(self, x: Tensor) -> Tensor:
        return self.blocks(x)


@odd
class ExpertOfImage(Net):
    """Python code selects the block that each image runs through."""

    def build(self) -> None:
        self.before, self.gate = nn.Sequential(Block(), Block()), nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList(Block() for _ in range(3))

    def body(self, x: Tensor) -> Tensor:
        x = self.before(x)
        selected = self.gate(x.mean((2, 3))).argmax(-1).tolist()
        return torch.cat([self.experts[number](x[at : at + 1]) for at, number in enumerate(selected)])


def open_odd(name: str, seed: int = 0) -> BaseModel:
    """Open an odd network as a base with random weights."""
    return load_base(f"timm/isoprune_odd_{name}", pretrained=False, num_labels=CLASSES, seed=seed)


def calibration_batches(channels: int, *, images: int = 16, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Draw two micro-batches of images that are not all alike."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(2):
        coarse = torch.randn(images // 2, channels, 8, 8, generator=generator)
        pixels = functional.interpolate(coarse, (32, 32), mode="bilinear")
        made.append((pixels, torch.randint(CLASSES, (images // 2,), generator=generator)))
    return made
