"""python -m fastunet: the same as the command fastunet."""

import sys

# `python -m` puts the current folder first. In a clone, kernels/ there would hide Hugging Face's
# package of that name, which diffusers looks for.
if not getattr(sys.flags, "safe_path", False):
    del sys.path[0]

from fastunet.cli import app  # noqa: E402

app(prog_name="fastunet")
