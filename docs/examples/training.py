"""Train a U-Net on scikit-learn's digits, accelerated, and draw ten: python training.py 300"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn

import fastunet
from fastunet.diffusion import DDIM, NoiseSchedule, noise_prediction_loss, sample
from fastunet.models import TOY, UNet
from fastunet.pictures import strip, to_images

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
pixels, labels = load_digits(return_X_y=True)  # 1,797 images of 8 x 8 values, 0 to 16
images = torch.tensor(pixels, dtype=torch.float32, device=device).view(-1, 1, 8, 8) / 8 - 1
labels = torch.tensor(labels, device=device)

unet = UNet(TOY).to(device)
words = nn.Embedding(11, TOY.context_dim, device=device)  # one for each digit, one for none
print(fastunet.accelerate(unet))
schedule = NoiseSchedule.cosine()
optimizer = torch.optim.AdamW([*unet.parameters(), *words.parameters()], lr=2e-3)
for step in range(int(sys.argv[1])):
    picked = torch.randint(len(images), (128,), device=device)
    unnamed = torch.rand(128, device=device) < 0.1
    context = words(torch.where(unnamed, 10, labels[picked]))[:, None]  # [N, 1, context_dim]
    loss = noise_prediction_loss(unet, schedule, images[picked], context)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 50 == 0:
        print(f"step {step}: loss {loss.item():.3f}")

with torch.no_grad():
    context = words(torch.arange(10, device=device))[:, None]
    none = words(torch.full((10,), 10, device=device))[:, None]
guided = {"guidance_scale": 1.5, "negative_context": none}
digits = sample(unet, DDIM(schedule, clip_sample=1.0), (10, 1, 8, 8), context, steps=25, **guided)
strip(to_images(digits)).save("digits.png")
