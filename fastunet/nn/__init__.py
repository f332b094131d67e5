"""Drop-in layers: each shares the parameters, and so the state_dict keys, of what it replaces."""

from fastunet.nn.attention import FlashCrossAttention
from fastunet.nn.geglu import GEGLU
from fastunet.nn.group_norm import GroupNorm, GroupNormSiLU
from fastunet.nn.layer_norm import AddLayerNorm
from fastunet.nn.resnet import ResnetBlock
from fastunet.nn.time_embedding import AddTimeEmbedding
from fastunet.nn.upsample import upsample_conv

__all__ = [
    "AddLayerNorm",
    "AddTimeEmbedding",
    "FlashCrossAttention",
    "GEGLU",
    "GroupNorm",
    "GroupNormSiLU",
    "ResnetBlock",
    "upsample_conv",
]
