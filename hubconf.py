"""Entry points of torch.hub, e.g. `torch.hub.load(folder, "deeplabv3plus", source="local", num_classes=21)`.

Each gives its network with random weights; `torch.hub.help` prints the options, e.g. `backbone="resnet18"`.
"""

from models import FCN as fcn
from models import DeepLabV3Plus as deeplabv3plus
from models import PSPNet as pspnet
from models import SegNet as segnet
from models import UNet as unet

__all__ = ["deeplabv3plus", "fcn", "pspnet", "segnet", "unet"]

dependencies = ["torch"]
