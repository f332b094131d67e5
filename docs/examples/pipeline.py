"""A pipeline of diffusers, accelerated: python pipeline.py FOLDER "a prompt" """

import sys

from diffusers import DiffusionPipeline

import fastunet

pipe = DiffusionPipeline.from_pretrained(sys.argv[1], use_safetensors=True)  # .to("cuda")
report = fastunet.accelerate(pipe)  # on a GPU with cuda_graph=True
print(report)
image = pipe(sys.argv[2], num_inference_steps=20).images[0]
image.save("image.png")
fastunet.restore(pipe)
