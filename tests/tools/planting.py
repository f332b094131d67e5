"""Run the real ops with one of their kernel files changed.

    with planted("group_norm", source):
        group_norm(x, 32, backend="triton")

The changed file is loaded as a module of its own, which registers nothing; then what it defines
stands for what the unchanged file defines, wherever in fastunet.kernels that is used.
"""

import ast
import contextlib
import importlib
import importlib.util
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from unittest import mock

import fastunet.kernels
from fastunet.kernels import _operator
from fastunet.kernels._plan import Launcher

PACKAGE = "fastunet.kernels"
KERNELS = Path(fastunet.kernels.__file__).parent
ROLES = ("check", "forward", "fake", "keep", "backward", "fake_backward", "again")


@contextlib.contextmanager
def planted(file: str, source: str) -> Iterator[None]:
    """While active, kernels/<file>.py has the text ``source``. Not thread-safe."""
    with tempfile.TemporaryDirectory() as folder:  # Triton reads a kernel's text from the disk
        path = Path(folder) / f"{file}.py"
        path.write_text(source)
        with _in_place_of(importlib.import_module(f"{PACKAGE}.{file}"), _load(path), source):
            yield


@contextlib.contextmanager
def _in_place_of(original: ModuleType, changed: ModuleType, source: str) -> Iterator[None]:
    names = [name for name in _defined(source) if name != "_operator"]
    pairs = {name: (getattr(original, name), getattr(changed, name)) for name in names}
    modules = [m for n, m in sys.modules.items() if n.startswith(f"{PACKAGE}.")]
    with contextlib.ExitStack() as stack:
        for module in modules:
            for name, (old, new) in pairs.items():
                if vars(module).get(name) is old:
                    stack.enter_context(mock.patch.object(module, name, new))
            operator = vars(module).get("_operator")
            if isinstance(operator, _operator.Operator):
                for role in ROLES:
                    of, name = operator, role
                    if isinstance(getattr(of, name), Launcher):
                        of, name = getattr(of, name), "_function"
                    for old, new in pairs.values():
                        if getattr(of, name) is old:
                            stack.enter_context(mock.patch.object(of, name, new))
        yield


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"planted_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch.object(_operator, "Operator", mock.Mock()):
        spec.loader.exec_module(module)
    return module


def _defined(source: str) -> Iterator[str]:
    """The names that a file defines at its top level."""
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Assign):
            for target in node.targets:
                names = target.elts if isinstance(target, ast.Tuple) else [target]
                yield from (name.id for name in names if isinstance(name, ast.Name))
