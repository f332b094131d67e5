"""U-Nets in plain torch: the models the kernels are measured and tested on."""

from .unet_2015 import UNet2015, UNet2015Config
from .unet_sd import SD15, SDXL, TOY, UNet, UNetConfig

__all__ = ["SD15", "SDXL", "TOY", "UNet", "UNet2015", "UNet2015Config", "UNetConfig"]
