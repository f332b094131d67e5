"""Drop-in layers: each shares the parameters, and so the state_dict keys, of what it replaces."""

from fastunet.nn.attention import FlashCrossAttention
from fastunet.nn.group_norm import GroupNorm, GroupNormSiLU
from fastunet.nn.resnet import ResnetBlock
from fastunet.nn.time_embedding import AddTimeEmbedding

__all__ = ["AddTimeEmbedding", "FlashCrossAttention", "GroupNorm", "GroupNormSiLU", "ResnetBlock"]
