"""Networks as people write them, small."""

from __future__ import annotations

import torch
from torch import Tensor, nn

CLASSES = 10


def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs), nn.ReLU())


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.first, self.second = conv(inputs, outputs, stride), nn.Conv2d(outputs, outputs, 3, 1, 1)
        same = stride == 1 and inputs == outputs
        self.short = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, image: Tensor) -> Tensor:
        return torch.relu(self.second(self.first(image)) + self.short(image))


class CifarLike(nn.Module):
    """Three resolutions; blocks lie in one list, deeper than the convolution before them."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 3, 1, 1)
        sizes = [(4, 4, 1), (4, 4, 1), (4, 8, 2), (8, 8, 1), (8, 16, 2), (16, 16, 1)]
        self.blocks = nn.ModuleList(Residual(*each) for each in sizes)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        feature = self.conv(image)
        for block in self.blocks:
            feature = block(feature)
        return self.head(feature.mean(dim=(2, 3)))


class VGGLike(nn.Module):
    """Convolutions and pooling in one sequence; the classifier reads every position."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for width in (4, 8, 16):
            for _ in range(2):
                layers += [nn.Conv2d(inputs, width, 3, 1, 1), nn.ReLU()]
                inputs = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Linear(16 * 16, 32), nn.ReLU(), nn.Linear(32, CLASSES))

    def forward(self, image: Tensor) -> Tensor:
        return self.classifier(self.features(image).flatten(1))


class PoolingBlocks(nn.Module):
    """Blocks that end with their pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.block1, self.block2, self.block3 = (
            nn.Sequential(*conv(inputs, outputs), nn.MaxPool2d(2)) for inputs, outputs in ((3, 4), (4, 8), (8, 16))
        )
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        return self.fc(self.block3(self.block2(self.block1(image))).mean(dim=(2, 3)))


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(width), nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        normed = self.norm(tokens)
        tokens = tokens + self.mix(normed, normed, normed, need_weights=False)[0]
        return tokens + self.mlp(tokens)


class ViTLike(nn.Module):
    """Class token and positions are made in forward."""

    def __init__(self, size: int = 32, *, pooled: bool = False) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 8, 8)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.position = nn.Parameter(0.02 * torch.randn(1, 1 + (size // 8) ** 2, 8))
        self.blocks = nn.Sequential(*(Attention(8) for _ in range(4)))
        self.norm, self.head, self.pooled = nn.LayerNorm(8), nn.Linear(8, CLASSES), pooled

    def forward(self, image: Tensor) -> Tensor:
        tokens = self.patches(image).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(tokens), -1, -1), tokens], dim=1) + self.position
        tokens = self.norm(self.blocks(tokens))
        return self.head(tokens[:, 1:].mean(dim=1) if self.pooled else tokens[:, 0])


class _WithSum(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body, self.side = conv(inputs, outputs, stride), nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, given: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        feature, total = given
        return self.body(feature), self.side(feature) + nn.functional.adaptive_avg_pool2d(total, 1).mean()


class Tuples(nn.Module):
    """What flows between the stages is a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 4)
        self.one, self.two, self.three = _WithSum(4, 4, 1), _WithSum(4, 8, 2), _WithSum(8, 16, 2)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        feature = self.stem(image)
        feature, total = self.three(self.two(self.one((feature, feature))))
        return self.fc((feature + total).mean(dim=(2, 3)))


class Checks(CifarLike):
    """Asserts and branches on values, and a tensor that was made in the constructor."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.tensor([0.5, 1.0, 2.0]).view(1, 3, 1, 1)
        self.widths = torch.arange(3)

    def forward(self, image: Tensor) -> Tensor:
        assert torch.isfinite(image).all(), "bad pixels"
        if image.mean() > 1e6:
            image = image / image.max()
        logits = super().forward(image * self.scale.to(image))
        return logits.clamp(-10, 10) if float(logits.abs().max()) > 1e4 else logits


class Chooses(nn.Module):
    """Shapes that depend on values: the brightest of two crops is read."""

    def __init__(self) -> None:
        super().__init__()
        self.net = CifarLike()

    def forward(self, image: Tensor) -> Tensor:
        half = image.shape[3] // 2
        left = bool(image[..., :half].sum() > image[..., half:].sum())
        return self.net(image[..., :half] if left else image[..., half:])


class OnlyAt(nn.Module):
    """Reads images of one size alone, as its classifier reads every position."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.stem, self.one, self.two = conv(3, 4, 2), conv(4, 4, 1), conv(4, 8, 4)
        self.fc = nn.Linear(8 * (size // 8) ** 2, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        return self.fc(self.two(self.one(self.stem(image))).flatten(1))


class SkipsAhead(CifarLike):
    """A path around a whole stage: the network can be cut before and after it only."""

    def __init__(self) -> None:
        super().__init__()
        self.around = nn.Conv2d(4, 8, 1, 2)

    def forward(self, image: Tensor) -> Tensor:
        first = self.blocks[1](self.blocks[0](self.conv(image)))
        second = self.blocks[3](self.blocks[2](first)) + self.around(first)
        return self.head(self.blocks[5](self.blocks[4](second)).mean(dim=(2, 3)))


class TwoBranches(nn.Module):
    """Two paths from the image to the logits, with no module on both."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = conv(3, 4, 2), conv(3, 4, 2)
        self.fc_left, self.fc_right = nn.Linear(4, CLASSES), nn.Linear(4, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        left, right = self.left(image).mean(dim=(2, 3)), self.right(image).mean(dim=(2, 3))
        return self.fc_left(left) + self.fc_right(right)
