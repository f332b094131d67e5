"""A U-Net of your own from fused layers; it predicts the noise in images, given a text."""

import torch
from torch import nn

from fastunet.kernels import timestep_embedding
from fastunet.nn import FlashCrossAttention, GroupNormSiLU, ResnetBlock


class MyUNet(nn.Module):
    def __init__(self, channels=32, text_dim=64, emb=128):
        super().__init__()
        wide = 2 * channels
        self.channels = channels
        self.time = nn.Sequential(nn.Linear(channels, emb), nn.SiLU(), nn.Linear(emb, emb))
        self.conv_in = nn.Conv2d(3, channels, 3, padding=1)
        self.down = ResnetBlock(channels, channels, emb, groups=8)
        self.smaller = nn.Conv2d(channels, wide, 3, stride=2, padding=1)
        self.middle = ResnetBlock(wide, wide, emb, groups=8)
        self.attention = FlashCrossAttention(wide, text_dim, heads=4, head_dim=16)
        self.larger = nn.ConvTranspose2d(wide, channels, 2, stride=2)
        self.up = ResnetBlock(wide, channels, emb, groups=8)
        self.norm = GroupNormSiLU(8, channels)
        self.conv_out = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, x, timesteps, text):  # [N, 3, H, W], [N], [N, L, text_dim]
        emb = self.time(timestep_embedding(timesteps, self.channels))
        skip = self.down(self.conv_in(x), emb)
        h = self.middle(self.smaller(skip), emb)
        h = h + self.attention(h.flatten(2).mT, text).mT.reshape(h.shape)
        h = self.up(torch.cat([self.larger(h), skip], dim=1), emb)
        return self.conv_out(self.norm(h))
