"""Entry points of torch.hub, e.g. `torch.hub.load(folder, "deeplabv3plus", source="local", num_classes=21)`.

There is one for each name in `models.MODELS`. Each builds its network with random weights. In this folder
`python -c "import models; help(models.PSPNet)"` prints the options, e.g. `backbone="resnet18"`;
`torch.hub.help` does not read local folders.
"""

from models import MODELS

dependencies = ["torch"]
globals().update(MODELS)
