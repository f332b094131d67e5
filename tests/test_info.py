"""info: what a bug report needs."""

import json
from importlib import metadata

import pytest
import torch

import fastunet
from fastunet import kernels
from fastunet.info import OPS, PACKAGES
from fastunet.kernels import _launch, use_backend


def test_versions_are_those_installed():
    versions = fastunet.info().versions
    assert set(versions) == {"python", *PACKAGES}
    assert versions["torch"] == torch.__version__
    assert versions["fastunet"] == fastunet.__version__ == metadata.version("fastunet")


def test_a_package_that_is_missing_has_no_version(monkeypatch):
    def version(package):
        if package == "diffusers":
            raise metadata.PackageNotFoundError(package)
        return "1.0"

    monkeypatch.setattr(metadata, "version", version)
    found = fastunet.info()
    assert found.versions["diffusers"] is None and found.versions["torch"] == "1.0"
    assert "diffusers           not installed" in str(found).splitlines()


def test_every_op_has_its_backend_and_reason():
    assert tuple(fastunet.info().backends) == OPS
    assert set(OPS) <= set(kernels.__all__)
    for backend in ("torch", "triton"):
        with use_backend(backend):
            found = set(fastunet.info().backends.values())
            assert found == {(backend, f"FASTUNET_BACKEND or use_backend asks for {backend}")}


@pytest.mark.parametrize(
    "interpreted, gpu, backend, why",
    [
        (True, False, "triton", "TRITON_INTERPRET is set"),
        (True, True, "triton", "TRITON_INTERPRET is set"),
        (False, True, "triton", "tensors on the GPU; tensors on the CPU take the PyTorch"),
        (False, False, "torch", "no GPU: tensors on the CPU take the PyTorch reference"),
    ],
)
def test_the_reason_is_the_machines(interpreted, gpu, backend, why, monkeypatch):
    monkeypatch.setattr(_launch, "interpreted", lambda: interpreted)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    found, reason = kernels.backend_of("group_norm")
    assert found == backend and why in reason


def test_the_device_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert fastunet.info().device == "Some GPU (compute capability 9.0)"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert fastunet.info().device.startswith("cpu (")


def test_info_is_plain_data_and_reads_as_a_table():
    found = fastunet.info()
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()
    lines = str(found).splitlines()
    assert len(lines) == len(found.versions) + 1 + len(OPS)
    assert {line.split()[0] for line in lines} == {*found.versions, "device", *OPS}
