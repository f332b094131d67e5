"""Maps three source folders onto one package: kernels/ is fastunet.kernels, benchmarks/
fastunet.benchmarks, once installed.

The links in fastunet/, which show type checkers and editors the same, take no part in this.
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
        "fastunet.benchmarks",
    ],  # fmt: skip
    package_dir={
        "fastunet": "fastunet",
        "fastunet.kernels": "kernels",
        "fastunet.benchmarks": "benchmarks",
    },
    package_data={"fastunet": ["py.typed"]},
    # Otherwise what MANIFEST.in adds to the sdist would change what the wheel holds.
    include_package_data=False,
)
