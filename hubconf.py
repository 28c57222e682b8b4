"""Entry points of torch.hub, e.g. `torch.hub.load(folder, "deeplabv3plus", source="local", num_classes=21)`.

Each gives its network with random weights. In this folder `python -c "import models; help(models.PSPNet)"`
prints its options, e.g. `backbone="resnet18"`; `torch.hub.help` reads no local folder.
"""

from models import FCN as fcn
from models import DeepLabV3Plus as deeplabv3plus
from models import PSPNet as pspnet
from models import SegNet as segnet
from models import UNet as unet

__all__ = ["deeplabv3plus", "fcn", "pspnet", "segnet", "unet"]

dependencies = ["torch"]
