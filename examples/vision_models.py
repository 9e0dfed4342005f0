"""Two classifiers for images, without torchvision: a multilayer perceptron and ResNet-9 (used in arXiv 2505.23223).

from daunce_api.providers.local.classifier import Classifier, ClassifierSettings
classifier = Classifier(lambda: ResNet9(channels=1, classes=10))
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn


class MLP(nn.Sequential):
    """Linear layers with ReLU between them; inputs of any shape are flattened."""

    def __init__(self, *widths: int) -> None:
        """``widths``: inputs, hidden layers, classes."""
        layers: list[nn.Module] = [nn.Flatten()]
        for n_in, n_out in pairwise(widths):
            layers += [nn.Linear(n_in, n_out), nn.ReLU()]
        super().__init__(*layers[:-1])


def _block(n_in: int, n_out: int, *, stride: int = 1, kernel: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(n_in, n_out, kernel, stride=stride, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(n_out),
        nn.ReLU(),
    )


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(_block(width, width), _block(width, width))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.body(x)
        return result


class ResNet9(nn.Module):
    """Eight convolutions and a linear layer, with two residual pairs. ``width`` 64 is the usual size."""

    def __init__(self, *, channels: int = 3, classes: int = 10, width: int = 64) -> None:
        super().__init__()
        self.features = nn.Sequential(
            _block(channels, width),
            _block(width, 2 * width),
            nn.MaxPool2d(2),
            _Residual(2 * width),
            _block(2 * width, 4 * width),
            nn.MaxPool2d(2),
            _block(4 * width, 8 * width),
            nn.MaxPool2d(2),
            _Residual(8 * width),
            nn.AdaptiveMaxPool2d(1),
            nn.Flatten(),
        )
        self.classify = nn.Linear(8 * width, classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, channels, height, width); sides of at least 8."""
        logits: Tensor = self.classify(self.features(x)) * 0.125
        return logits
