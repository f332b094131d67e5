"""Maps the two source folders onto one package: kernels/ is installed as fastunet.kernels.

The link fastunet/kernels, which shows type checkers and editors the same, takes no part in this.
"""

from setuptools import setup

setup(
    packages=[
        "fastunet",
        "fastunet.nn",
        "fastunet.models",
        "fastunet.hosts",
        "fastunet.training",
        "fastunet.kernels",
    ],  # fmt: skip
    package_dir={"fastunet": "fastunet", "fastunet.kernels": "kernels"},
    package_data={"fastunet": ["py.typed"]},
    # Otherwise what MANIFEST.in adds to the sdist would change what the wheel holds.
    include_package_data=False,
)
