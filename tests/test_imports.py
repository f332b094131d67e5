"""What an import costs, which way imports run, and what package code never calls."""

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STANDARD = set(sys.stdlib_module_names)

# Part of the package -> the parts that it may import. What stands further down may import what
# stands further up, never the other way. A new module gets its row here.
TENSORS = {"kernels"}
HOSTS = TENSORS | {"_plain", "_merged", "_time_projection", "_phases", "_constants", "nn", "hosts"}
PASSES = {
    "accelerate",
    "check",
    "checkpoints",
    "configs",
    "diffusion",
    "_graph_state",
    "graph",
    "_tables",
    "testing",
    "tune",
}
OTHERS = {
    "distributed",
    "edit",
    "info",
    "layouts",
    "models",
    "pictures",
    "segmentation",
    "text_to_image",
}
LIBRARY = HOSTS | PASSES | OTHERS
COMPILED = LIBRARY | {"offline", "dry_run"}
SAMPLING = {"generate", "pipelines"}
OWN = {
    "_interpreter_operators",
    "_interpreter_speed",
    "check_ops",
    "demo",
    "interpreter",
    "training",
    "warmup",
}
COMMANDS = COMPILED | SAMPLING | OWN | {"fastunet"}
ARROWS: dict[str, set[str]] = {
    "kernels": TENSORS,
    "models": {"models"},
    "_plain": set(),
    "_merged": {"_plain"},
    "_time_projection": {"_plain", "_merged"},
    "_phases": set(),
    "_constants": {"_plain", "_merged", "_phases"},
    "nn": TENSORS | {"_plain", "_merged", "_time_projection", "_constants", "nn"},
    "hosts": HOSTS | {"models"},
    "layouts": set(),
    "segmentation": {"models"},
    "distributed": set(),
    "text_to_image": {"models", "diffusion", "checkpoints"},
    **dict.fromkeys(PASSES, LIBRARY),
    "_interpreter_operators": set(),
    "_interpreter_speed": {"_interpreter_operators"},
    "interpreter": TENSORS | {"_interpreter_operators", "_interpreter_speed"},
    "offline": TENSORS,
    "dry_run": COMPILED,
    "warmup": COMPILED,
    "check_ops": COMMANDS,
    "demo": COMMANDS,
    "training": COMMANDS,
    "info": TENSORS,
    "edit": {"diffusion"},
    "pictures": set(),
    **dict.fromkeys(SAMPLING, LIBRARY | SAMPLING | {"fastunet"}),
    "cli_train": COMMANDS,
    "cli_sample": COMMANDS,
    "cli_bench": COMMANDS | {"benchmarks"},
    "cli": COMMANDS | {"cli", "cli_bench", "cli_sample", "cli_train"},
    "__main__": {"cli"},
}
# Part -> the other packages that it may import, where that is limited.
OUTSIDE: dict[str, set[str]] = {
    "kernels": {"torch", "triton", "einops"},
    "models": {"torch"},
    "nn": {"torch"},
}

BANNED_CALLS = {"eval", "exec", "compile", "__import__"}
BANNED_MODULES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
# Deprecated (block pointers), different from GPU to GPU (libdevice, inline assembly), or different
# from run to run (atomics).
BANNED_IN_KERNELS = ("make_block_ptr", "advance", "libdevice", "inline_asm", "atomic_")


def files(*folders: str) -> list[Path]:
    return sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))


def name(file: Path) -> str:
    return str(file.relative_to(ROOT))


PACKAGE = files("fastunet", "kernels")
every_file = pytest.mark.parametrize("file", PACKAGE, ids=name)
every_kernel_file = pytest.mark.parametrize("file", files("kernels"), ids=name)


@functools.cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(), name(file))


def module(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    parts = ("fastunet", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts)


def part(dotted: str) -> str:
    """Which row of ARROWS a name below fastunet belongs to; "fastunet" is its face, __init__.py."""
    first = (dotted.split(".") + ["__init__"])[1]
    is_module = (ROOT / "fastunet" / first).is_dir() or (ROOT / f"fastunet/{first}.py").is_file()
    return first if first != "__init__" and (is_module or first == "kernels") else "fastunet"


@functools.cache
def nodes(file: Path) -> list[ast.AST]:
    return list(ast.walk(tree(file)))


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """Every import of a file, also those within functions: line, dotted name with what is taken."""
    for node in nodes(file):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = module(file).split(".")[: -node.level] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)


def calls(file: Path) -> Iterator[tuple[ast.Call, str]]:
    for node in nodes(file):
        if isinstance(node, ast.Call):
            yield node, ast.unparse(node.func)


def has(call: ast.Call, keyword: str, position: int | None = None) -> bool:
    by_position = position is not None and len(call.args) > position
    return by_position or keyword in {k.arg for k in call.keywords}


def is_kernel(node: ast.AST) -> bool:
    decorators = node.decorator_list if isinstance(node, ast.FunctionDef) else []
    return any("triton.jit" in ast.unparse(d) for d in decorators)


def test_import_is_light_and_needs_no_triton(tmp_path: Path):
    """`import fastunet` costs what torch costs: no compiler, no host, no plots, no CUDA context.
    Where Triton does not exist the ops are the reference."""
    script = """
import sys, torch
before = set(sys.modules)
import fastunet
new = {name.split(".")[0] for name in set(sys.modules) - before}
assert "fastunet" in new
heavy = {"triton", "diffusers", "transformers", "matplotlib", "sklearn", "scipy", "typer"}
assert not new & heavy, new & heavy
assert not torch.cuda.is_initialized()

for name in [name for name in sys.modules if name.split(".")[0] == "fastunet"]:
    del sys.modules[name]
sys.modules["triton"] = None
import fastunet, fastunet.kernels, fastunet.kernels.reference, fastunet.nn
x = torch.randn(2, 4, 3, 3)
ours = fastunet.kernels.group_norm(x, 2, activation="silu")
assert torch.equal(ours, fastunet.kernels.reference.group_norm(x, 2, activation="silu"))
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@every_file
def test_imports_run_one_way(file: Path):
    own = part(module(file))
    if own == "fastunet":
        return  # the face shows every part
    assert own in ARROWS, f"give {own} a row in ARROWS: what may it import?"
    for line, dotted in imports(file):
        top, *below = dotted.split(".")
        if top != "fastunet" or (below and below[0].startswith("__")):
            continue
        target = part(dotted)
        assert target in ARROWS[own], f"{name(file)}:{line} {own} must not import {target}"


@every_file
def test_parts_keep_to_their_libraries(file: Path):
    allowed = OUTSIDE.get(part(module(file)))
    ours = {"fastunet", "typing_extensions"} | STANDARD  # torch itself requires the second
    not_ours = {"tests", "benchmarks", "kernels"} | {f.stem for f in files("tests/tools")}
    for line, dotted in imports(file):
        top = dotted.split(".")[0]
        assert top not in not_ours, f"{name(file)}:{line} package code must not import {top}"
        if allowed is not None:
            assert top in allowed | ours, f"{name(file)}:{line} must not import {top}"


@every_kernel_file
def test_kernel_files_do_not_know_the_reference(file: Path):
    """The truth shares no code with what it judges."""
    if any(map(is_kernel, nodes(file))):
        taken = [dotted for _, dotted in imports(file) if "reference" in dotted.split(".")]
        assert not taken


@every_file
def test_nothing_is_unpickled_or_evaluated(file: Path):
    for line, dotted in imports(file):
        assert dotted.split(".")[0] not in BANNED_MODULES, f"{name(file)}:{line} imports {dotted}"
    for call, function in calls(file):
        where = f"{name(file)}:{call.lineno} {function}"
        assert function not in BANNED_CALLS, where
        if function == "torch.load":
            safe = [k for k in call.keywords if k.arg == "weights_only"]
            assert safe and ast.unparse(safe[0].value) == "True", f"{where} without weights_only"


@every_kernel_file
def test_kernels_keep_to_the_plain_operations(file: Path):
    for node in nodes(file):
        if isinstance(node, ast.Attribute):
            assert not node.attr.startswith(BANNED_IN_KERNELS), f"{name(file)}:{node.lineno}"


@every_kernel_file
def test_masked_loads_say_what_the_rest_is(file: Path):
    """Without `other`, what a masked lane holds is undefined."""
    for call, function in calls(file):
        if function == "tl.load" and has(call, "mask", 1):
            assert has(call, "other", 2), f"{name(file)}:{call.lineno} tl.load(mask=) needs other="


@every_kernel_file
def test_masks_are_joined_elementwise(file: Path):
    """`and` between tensors asks for one truth value of a whole block."""
    for kernel in filter(is_kernel, nodes(file)):
        for call in (n for n in ast.walk(kernel) if isinstance(n, ast.Call)):
            for keyword in (k for k in call.keywords if k.arg == "mask"):
                joined = [n for n in ast.walk(keyword.value) if isinstance(n, ast.BoolOp)]
                assert not joined, f"{name(file)}:{call.lineno} join masks with & and |"
