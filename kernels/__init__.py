"""Fused ops of the diffusion U-Net, as functions of tensors.

``fastunet.kernels.X`` and ``fastunet.kernels.reference.X`` have the same meaning; the first runs a
Triton kernel where one can, the second is plain PyTorch: the truth of the parity tests, the eager
baseline and the CPU path.
"""

if __name__ != "fastunet.kernels":
    raise ImportError(
        "this folder is the package fastunet.kernels and cannot be imported as "
        f"{__name__!r} (that name belongs to Hugging Face's kernels package): "
        "run from another folder, or start Python without the repository root on sys.path"
    )

from fastunet.kernels._launch import backend_of, recording, use_backend, without_triton
from fastunet.kernels.reference import timestep_embedding

try:
    from fastunet.kernels.attention import attention
    from fastunet.kernels.geglu import geglu
    from fastunet.kernels.group_norm import group_norm
    from fastunet.kernels.layer_norm import add_layer_norm
    from fastunet.kernels.time_embedding import add_time_embedding
except ImportError as failure:  # Triton is missing, or its library does not load
    if (failure.name or "").split(".")[0] != "triton":
        raise
    add_layer_norm = without_triton("add_layer_norm")
    add_time_embedding = without_triton("add_time_embedding")
    attention = without_triton("attention")
    geglu = without_triton("geglu")
    group_norm = without_triton("group_norm")

__all__ = [
    "add_layer_norm",
    "add_time_embedding",
    "attention",
    "backend_of",
    "geglu",
    "group_norm",
    "recording",
    "timestep_embedding",
    "use_backend",
]
