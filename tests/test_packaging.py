"""What users install: wheel, sdist and editable install hold one package, under its own name."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path
from typing import NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]
NOT_COPIED = (".*", "__pycache__", "build", "dist", "*.egg-info", "runs", "results")


SOURCES = (
    ("fastunet", "fastunet"),
    ("kernels", "fastunet/kernels"),
    ("benchmarks", "fastunet/benchmarks"),
)


class Built(NamedTuple):
    wheel: Path
    sdist: Path
    wheel_from_sdist: Path
    wheel_again: Path


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Output of a command that must pass, run without this process's import path."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "SOURCE_DATE_EPOCH")}
    done = subprocess.run(command, cwd=cwd, env=env | environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout.strip()


def build(kind: str, source: Path, out: Path) -> Path:
    """What `python -m build --no-isolation` calls; only setuptools is needed."""
    hook = f"import sys, setuptools.build_meta as b; b.build_{kind}(sys.argv[1])"
    run(sys.executable, "-c", hook, out, cwd=source, SOURCE_DATE_EPOCH="1700000000")
    (built,) = out.iterdir()
    return built


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    tmp = tmp_path_factory.mktemp("build")
    # Copies: a build leaves build/ and *.egg-info behind, and parallel workers build at once.
    first, second, unpacked = tmp / "first", tmp / "second", tmp / "unpacked"
    for copy in (first, second):
        shutil.copytree(ROOT, copy, symlinks=True, ignore=shutil.ignore_patterns(*NOT_COPIED))
    os.utime(second / "kernels" / "__init__.py")  # a checkout of another day
    for out in ("wheel", "sdist", "from_sdist", "again"):
        (tmp / out).mkdir()
    sdist = build("sdist", first, tmp / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(unpacked, filter="data")
    (inner,) = unpacked.iterdir()
    return Built(
        wheel=build("wheel", first, tmp / "wheel"),
        sdist=sdist,
        wheel_from_sdist=build("wheel", inner, tmp / "from_sdist"),
        wheel_again=build("wheel", second, tmp / "again"),
    )


@pytest.fixture(scope="module")
def metadata(built: Built) -> Message:
    with zipfile.ZipFile(built.wheel) as wheel:
        (name,) = [n for n in wheel.namelist() if n.endswith(".dist-info/METADATA")]
        return Parser().parsestr(wheel.read(name).decode())


@pytest.fixture(scope="module")
def site(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel installed, beside a stand-in for Hugging Face's `kernels`."""
    folder = tmp_path_factory.mktemp("site")
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    run(
        *pip, "--no-deps", "--no-index", "--no-compile", "--target", folder, built.wheel, cwd=folder
    )
    (folder / "kernels").mkdir()
    (folder / "kernels" / "__init__.py").write_text("def get_kernel(name): return name\n")
    return folder


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_wheel_holds_the_three_source_folders_and_nothing_else(built: Built):
    expected = {
        str(Path(package) / file.relative_to(ROOT / source))
        for source, package in SOURCES
        for file in (ROOT / source).rglob("*")
        if file.is_file() and not {"__pycache__", "results"} & set(file.parts)
    }
    assert {"fastunet/py.typed", "fastunet/kernels/reference.py"} <= expected
    packed = {n for n in names(built.wheel) if ".dist-info/" not in n}
    assert packed == expected, "setup.py lists every package, and package_data every other file"
    assert any(n.endswith("/licenses/LICENSE") for n in names(built.wheel))


def test_wheel_is_pure(built: Built):
    assert built.wheel.name.endswith("-py3-none-any.whl")


def test_sdist_builds_the_same_wheel(built: Built):
    assert names(built.wheel_from_sdist) == names(built.wheel)
    with tarfile.open(built.sdist) as archive:
        held = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {
        "LICENSE",
        "README.md",
        "Makefile",
        "constraints.txt",
        "tests/test_packaging.py",
    } <= held
    assert not [name for name in held if name.endswith(".pyc")]


def test_wheel_is_reproducible(built: Built):
    assert built.wheel_again.read_bytes() == built.wheel.read_bytes()


def test_metadata_promises(metadata: Message):
    assert metadata["Name"] == "fastunet"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert set(metadata.get_all("Provides-Extra", [])) == {
        "bench",
        "demo",
        "dev",
        "diffusers",
        "sample",
        "train",
    }

    requirements = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    core = {r.name: r for r in requirements if "extra" not in str(r.marker)}
    tensors = {"torch", "triton", "numpy", "einops", "safetensors"}
    assert set(core) == tensors | {"typer", "rich", "typing-extensions"}
    assert core["torch"].specifier == SpecifierSet(">=2.6")
    assert core["triton"].specifier == SpecifierSet(">=3.2")
    assert core["triton"].marker is not None
    assert core["triton"].marker.evaluate({"sys_platform": "linux"})
    assert not core["triton"].marker.evaluate({"sys_platform": "darwin"})
    for requirement in requirements:
        operators = {clause.operator for clause in requirement.specifier}
        assert operators <= {">=", "!="}, f"{requirement}: pins belong in constraints.txt"


def test_constraints_pin_what_the_metadata_names(metadata: Message):
    requirements = {Requirement(r).name for r in metadata.get_all("Requires-Dist", [])}
    pins = {r.name: r for r in constraints("constraints.txt")}
    assert set(pins) == requirements - {"fastunet"}
    older = {r.name: r for r in constraints("constraints-triton36.txt")}
    for name in older.keys() - {"triton", "numpy"}:
        assert older[name].specifier == pins[name].specifier, f"{name}: the two files differ"


def constraints(file: str) -> list[Requirement]:
    lines = [line.strip() for line in (ROOT / file).read_text().splitlines()]
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(str(pin.specifier).startswith("==") for pin in pins)
    return pins


def test_installed_beside_hugging_face_kernels(site: Path, metadata: Message, tmp_path: Path):
    script = "; ".join(
        [
            "import kernels, fastunet, fastunet.kernels, fastunet.kernels.reference",
            "print(kernels.get_kernel('theirs'), fastunet.__version__)",
            "print(kernels.__file__, fastunet.__file__, fastunet.kernels.__file__, sep='\\n')",
        ]
    )
    printed = run(sys.executable, "-c", script, cwd=tmp_path, PYTHONPATH=str(site))
    first, *files = printed.splitlines()
    assert first == f"theirs {metadata['Version']}"
    expected = ["kernels", "fastunet", "fastunet/kernels"]
    assert files == [str(site / package / "__init__.py") for package in expected]


def test_repository_root_on_the_path_is_refused_by_name():
    script = "\n".join(
        [
            "try:",
            "    import kernels",
            "except ImportError as error:",
            "    print(error)",
        ]
    )
    assert "fastunet.kernels" in run(sys.executable, "-c", script, cwd=ROOT)


def test_entry_point_is_the_command_line_app(built: Built):
    with zipfile.ZipFile(built.wheel) as wheel:
        (name,) = [n for n in wheel.namelist() if n.endswith("entry_points.txt")]
        assert "fastunet = fastunet.cli:app" in wheel.read(name).decode()
