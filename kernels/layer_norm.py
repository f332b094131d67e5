"""Placeholder until the kernel is written."""

from fastunet.kernels._launch import without_triton

add_layer_norm = without_triton("add_layer_norm")
