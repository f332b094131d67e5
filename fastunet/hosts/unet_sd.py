"""fastunet.models.unet_sd: our own U-Net of Stable Diffusion."""

from collections.abc import Iterator

from torch import Tensor, nn

from fastunet import kernels
from fastunet.hosts import Left, Swap, _sites, join
from fastunet.models import unet_sd
from fastunet.nn.attention import attend
from fastunet.nn.resnet import residual


class FusedResnetBlock(unet_sd.ResnetBlock):
    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return residual(self, x, emb)


class FusedAttention(unet_sd.Attention):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return attend(self, x, context)


class FusedGEGLU(unet_sd.GEGLU):
    def forward(self, x: Tensor) -> Tensor:
        return kernels.geglu(self.proj(x))


def visit(name: str, module: nn.Module) -> Iterator[Swap | Left]:
    if isinstance(module, unet_sd.ResnetBlock):
        yield from _sites.resnet(name, module, unet_sd.ResnetBlock, FusedResnetBlock)
    elif isinstance(module, unet_sd.Attention):
        is_cross = module.cross_attention
        yield from _sites.attention(name, module, is_cross, unet_sd.Attention, FusedAttention)
    elif isinstance(module, unet_sd.GEGLU):
        yield from _sites.geglu(name, module, unet_sd.GEGLU, FusedGEGLU)
    elif isinstance(module, unet_sd.Transformer):
        yield from _sites.norm(join(name, "norm"), module.norm)
    elif isinstance(module, unet_sd.UNet):
        yield from _sites.head(name, module, unet_sd.UNet)
