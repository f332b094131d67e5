"""Diffusion U-Nets in plain torch: the models the kernels are measured and tested on."""

from .unet_sd import SD15, SDXL, TOY, UNet, UNetConfig

__all__ = ["SD15", "SDXL", "TOY", "UNet", "UNetConfig"]
