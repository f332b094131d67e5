"""fastunet.models.unet_sd: our own U-Net of Stable Diffusion."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastunet import kernels
from fastunet._plain import is_plain
from fastunet.hosts import Left, Swap, _sites
from fastunet.hosts._subclass import named_as_host
from fastunet.models import unet_sd
from fastunet.nn.attention import attend
from fastunet.nn.layer_norm import add_normalize
from fastunet.nn.resnet import residual
from fastunet.nn.upsample import pays, upsample_conv


@named_as_host
class FusedResnetBlock(unet_sd.ResnetBlock):
    def forward(self, x: Tensor, emb: Tensor, skip: Tensor | None = None) -> Tensor:
        """``skip``, which a :class:`FusedUpLevel` gives, are channels after those of x."""
        return residual(self, x, emb, skip)


@named_as_host
class FusedAttention(unet_sd.Attention):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return attend(self, x, context)


@named_as_host
class FusedGEGLU(unet_sd.GEGLU):
    def forward(self, x: Tensor) -> Tensor:
        return kernels.geglu(self.proj(x))


@named_as_host
class FusedTransformerBlock(unet_sd.TransformerBlock):
    def forward(self, x: Tensor | _sites.Sum, context: Tensor) -> Any:
        apart = isinstance(x, tuple)
        x, h = _sites.first_norm(self.norm1, x)
        x, h = add_normalize(self.norm2, self.attn1(h), x)
        x, h = add_normalize(self.norm3, self.attn2(h, context), x)
        return (self.ff(h), x) if apart else self.ff(h) + x


@named_as_host
class FusedTransformer(unet_sd.Transformer):
    """Keeps the memory layout of its input."""

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        tokens = _sites.project_in(self, x, self.linear_projection)
        tokens = _sites.through(
            self.transformer_blocks, tokens, lambda block: is_plain(block, FusedTransformerBlock),
            lambda block, h: block(h, context),
        )  # fmt: skip
        return _sites.project_out(self, tokens, x, self.linear_projection)


@named_as_host
class FusedUpLevel(unet_sd.UpLevel):
    """Hands its residual blocks both parts of what they read, where they need no concatenation."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor, skips: list[Tensor]) -> Tensor:
        for index, resnet in enumerate(self.resnets):
            skip = skips.pop()
            if is_plain(resnet, FusedResnetBlock):
                x = resnet(x, emb, skip)
            else:
                x = resnet(torch.cat([x, skip], dim=1), emb)
            if self.attentions:
                x = self.attentions[index](x, context)
        for upsample in self.upsamplers:
            x = upsample(x, skips[-1])
        return x


@named_as_host
class FusedUpsample(unet_sd.Upsample):
    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        if not pays(self.conv, x, skip.shape[-2:]):
            return super().forward(x, skip)
        return upsample_conv(self.conv, x)


def visit(name: str, module: nn.Module) -> Iterator[Swap | Left]:
    if isinstance(module, unet_sd.ResnetBlock):
        yield from _sites.resnet(name, module, unet_sd.ResnetBlock, FusedResnetBlock)
    elif isinstance(module, unet_sd.Attention):
        is_cross = module.cross_attention
        yield from _sites.attention(name, module, is_cross, unet_sd.Attention, FusedAttention)
    elif isinstance(module, unet_sd.GEGLU):
        yield from _sites.geglu(name, module, unet_sd.GEGLU, FusedGEGLU)
    elif isinstance(module, unet_sd.TransformerBlock):
        yield from _sites.block(name, module, unet_sd.TransformerBlock, FusedTransformerBlock)
    elif isinstance(module, unet_sd.Transformer):
        yield from _sites.transformer(name, module, unet_sd.Transformer, FusedTransformer)
    elif isinstance(module, unet_sd.UpLevel):
        yield from _sites.caller(name, module, unet_sd.UpLevel, FusedUpLevel)
    elif isinstance(module, unet_sd.Upsample):
        yield from _sites.upsample(name, module, module.conv, unet_sd.Upsample, FusedUpsample)
    elif isinstance(module, unet_sd.UNet):
        yield from _sites.head(name, module, unet_sd.UNet)
