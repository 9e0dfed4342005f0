"""Two classifiers of 8x8 digits, for the runs beside this file: ``mlp.yaml`` and ``resnet9.yaml``."""

from __future__ import annotations

import sys
from pathlib import Path

from daunce_api.providers.local.task import ClassifierTask

sys.path.append(str(Path(__file__).resolve().parents[1]))
from vision_models import MLP, ResNet9

mlp = ClassifierTask(lambda: MLP(64, 32, 10))
resnet9 = ClassifierTask(lambda: ResNet9(channels=1, width=8))
