"""Which backend an op runs on, what happens where a kernel cannot run, and how that is told."""

import ast
import os
import subprocess
import sys

import pytest
import torch

from fastunet import kernels
from fastunet.kernels import _launch, backend_of, reference, use_backend

X = torch.randn(2, 8, 3, 3)
QUERY = torch.randn(1, 4, 16)
CALLS = {
    "group_norm": ((X, 2), {"activation": "silu"}),
    "attention": ((QUERY, QUERY, QUERY, 2), {}),
    "add_time_embedding": ((X, X[:, :, 0, 0]), {}),
}


@pytest.fixture(params=CALLS)
def op(request):
    return request.param


@pytest.fixture(autouse=True)
def nothing_broken(monkeypatch):
    monkeypatch.setattr(_launch, "_broken", {})


@pytest.fixture
def launcher(monkeypatch, op):
    """Stands in for the launch of the op's kernel: counts, and answers or raises."""

    class Launcher:
        calls = 0
        error: Exception | None = None

        def __call__(self, *args, **kwargs):
            self.calls += 1
            if self.error is not None:
                raise self.error
            return "from the kernel"

    stand_in = Launcher()
    module = sys.modules[f"fastunet.kernels.{op.removeprefix('add_')}"]
    monkeypatch.setattr(module, f"_launch_{op}", stand_in)
    return stand_in


@pytest.fixture
def on_this_cpu(monkeypatch):
    """As without the interpreter."""
    monkeypatch.setattr(_launch, "interpreted", lambda: False)


@pytest.fixture
def able(monkeypatch):
    """As where kernels run."""
    monkeypatch.setattr(_launch, "interpreted", lambda: True)


def call(op, change=lambda tensor: tensor, **options):
    args, kwargs = CALLS[op]
    args = [change(arg) if isinstance(arg, torch.Tensor) else arg for arg in args]
    return getattr(kernels, op)(*args, **kwargs, **options)


def expected(op, change=lambda tensor: tensor):
    args, kwargs = CALLS[op]
    args = [change(arg) if isinstance(arg, torch.Tensor) else arg for arg in args]
    return getattr(reference, op)(*args, **kwargs)


# The choice.


def test_where_kernels_run_auto_takes_them(op, launcher, able):
    assert call(op) == call(op, backend="triton") == "from the kernel"
    assert torch.equal(call(op, backend="torch"), expected(op))
    assert launcher.calls == 2


def test_a_cpu_without_interpreter_takes_the_reference(op, launcher, on_this_cpu):
    assert torch.equal(call(op), expected(op))
    with pytest.raises(
        NotImplementedError, match=f"{op} on backend 'triton': cpu tensors run only"
    ):
        call(op, backend="triton")
    assert launcher.calls == 0


UNFIT = {
    "fp64": (torch.Tensor.double, "its kernels take fp32, fp16 and bf16, got torch.float64"),
    "gradient": (
        lambda t: t.clone().requires_grad_(),
        "its kernel has no backward yet and a gradient is required",
    ),
    "meta": (lambda t: t.to("meta"), "its kernels take tensors on a GPU, got meta"),
}


@pytest.mark.parametrize("change, reason", UNFIT.values(), ids=UNFIT)
def test_what_no_kernel_takes_runs_on_the_reference(op, change, reason, launcher, able):
    result, right = call(op, change), expected(op, change)
    assert (result.shape, result.dtype, result.device) == (right.shape, right.dtype, right.device)
    assert result.requires_grad == right.requires_grad
    if result.device.type != "meta":
        assert torch.equal(result, right)
    with pytest.raises(NotImplementedError, match=reason):
        call(op, change, backend="triton")
    assert launcher.calls == 0


def test_torch_compile_takes_the_reference_unless_asked_otherwise(op, able):
    def compiled(backend):
        torch.compiler.reset()
        return torch.compile(lambda: call(op, backend=backend), backend="eager", fullgraph=True)()

    assert torch.equal(compiled("auto"), expected(op))
    with pytest.raises(Exception, match="it is not registered for torch.compile yet"):
        compiled("triton")
    with use_backend("triton"):
        with pytest.raises(Exception, match="it is not registered for torch.compile yet"):
            compiled("auto")


def test_a_gradient_that_nobody_wants_does_not_matter(op, launcher, able):
    with torch.no_grad():
        assert call(op, lambda t: t.clone().requires_grad_()) == "from the kernel"


def test_a_gradient_of_a_parameter_matters_too(able):
    weight = torch.ones(8, requires_grad=True)
    assert kernels.group_norm(X, 2, weight).requires_grad
    with pytest.raises(NotImplementedError, match="no backward yet"):
        kernels.group_norm(X, 2, weight, backend="triton")
    with pytest.raises(NotImplementedError, match="no backward yet"):
        kernels.group_norm(X, 2, shift=X[:, :, 0, 0].clone().requires_grad_(), backend="triton")


@pytest.mark.parametrize("head_dim", [4, 12, 264])
def test_a_head_dim_that_no_kernel_takes(head_dim):
    query = torch.randn(1, 3, head_dim)
    assert torch.equal(
        kernels.attention(query, query, query, 1), reference.attention(query, query, query, 1)
    )
    with pytest.raises(NotImplementedError, match=rf"head dim \({head_dim}\) must be a multiple"):
        kernels.attention(query, query, query, 1, backend="triton")


@pytest.mark.parametrize("op", ["attention"])
def test_a_long_context_goes_to_the_vendors_kernel(op, launcher, able):
    key = torch.randn(1, 129, 16)
    assert kernels.attention(QUERY, key[:, :128], key[:, :128], 2) == "from the kernel"
    assert torch.equal(
        kernels.attention(QUERY, key, key, 2), reference.attention(QUERY, key, key, 2)
    )
    assert kernels.attention(QUERY, key, key, 2, backend="triton") == "from the kernel"


# use_backend and FASTUNET_BACKEND.


def test_use_backend_answers_for_auto_only(op, launcher, able):
    with use_backend("torch"):
        assert torch.equal(call(op), expected(op))
        assert call(op, backend="triton") == "from the kernel"


def test_use_backend_nests_and_ends_with_its_block():
    outside = _launch._ambient.get()
    with use_backend("torch"):
        with use_backend("triton"):
            assert backend_of("group_norm")[0] == "triton"
            with use_backend("auto"):
                assert _launch._ambient.get() == "auto"
        assert backend_of("group_norm")[0] == "torch"
    assert _launch._ambient.get() == outside


def test_use_backend_ends_with_an_exception_too():
    outside = _launch._ambient.get()
    with pytest.raises(KeyError), use_backend("torch"):
        raise KeyError
    assert _launch._ambient.get() == outside


@pytest.mark.parametrize("name", ["cuda", "", "Triton", None])
def test_backends_are_named(op, name):
    text = f"backend must be one of auto, triton, torch, got {name!r}"
    with pytest.raises(ValueError, match=text), use_backend(name):
        pass
    with pytest.raises(ValueError, match=text):
        call(op, backend=name)


def run_python(code, **environment):
    """The last line that a fresh interpreter prints, as a value; or the end of its error."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("FASTUNET_", "TRITON_"))}
    done = subprocess.run(
        [sys.executable, "-P" if sys.version_info >= (3, 11) else "-s", "-c", code],
        env=clean | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        cwd=os.path.dirname(__file__),
    )
    last = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()[-1]
    return ast.literal_eval(last) if done.returncode == 0 else last


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_the_environment_chooses(name):
    code = "import fastunet; print(fastunet.info().to_dict()['backends']['attention'])"
    assert run_python(code, FASTUNET_BACKEND=name) == {
        "backend": name,
        "why": f"FASTUNET_BACKEND or use_backend asks for {name}",
    }


def test_a_wrong_environment_is_told_at_import():
    assert run_python("import fastunet.kernels", FASTUNET_BACKEND="cuda") == (
        "ValueError: FASTUNET_BACKEND must be one of auto, triton, torch, got 'cuda'"
    )


# A kernel that does not compile.


def compile_failures():
    triton = pytest.importorskip("triton")
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    assert triton
    return {
        "CompilationError": CompilationError("source", None, "no such op"),
        "OutOfResources": OutOfResources(2**20, 2**17, "shared memory"),
        "PTXASError": PTXASError("unknown target"),
        "no C compiler": RuntimeError("Failed to find C compiler. Please specify via CC"),
        "the C compiler's error": subprocess.CalledProcessError(1, ["gcc"]),
    }


FAILURES = ["CompilationError", "OutOfResources", "PTXASError", "no C compiler"]
FAILURES += ["the C compiler's error"]


@pytest.mark.parametrize("failure", FAILURES)
def test_a_kernel_that_does_not_compile_is_told_once(op, failure, launcher, able):
    launcher.error = compile_failures()[failure]
    with pytest.warns(RuntimeWarning, match=f"kernel of {op} does not compile here") as told:
        result = call(op)
    assert len(told) == 1 and told[0].filename == __file__
    assert type(launcher.error).__name__ in str(told[0].message)
    assert torch.equal(result, expected(op))
    assert torch.equal(call(op), expected(op))  # another warning would be an error
    assert launcher.calls == 1
    backend, why = backend_of(op)
    assert backend == "torch" and why.startswith("its kernel does not compile here")
    other = next(name for name in CALLS if name != op)
    assert backend_of(other)[0] == "triton"


@pytest.mark.parametrize("failure", FAILURES)
def test_what_was_asked_for_by_name_does_not_fall_back(op, failure, launcher, able):
    launcher.error = compile_failures()[failure]
    for _ in range(2):
        with pytest.raises(type(launcher.error)):
            call(op, backend="triton")
    with use_backend("triton"), pytest.raises(type(launcher.error)):
        call(op)
    assert launcher.calls == 3 and _launch._broken == {}


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("Triton Error [CUDA]: device-side assert triggered"),
        torch.cuda.OutOfMemoryError("out of memory"),
        ValueError("Pointer argument cannot be accessed from Triton"),
        KeyError("a fault of ours"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_any_other_error_is_not_hidden(op, error, backend, launcher, able):
    launcher.error = error
    with pytest.raises(type(error)) as raised:
        call(op, backend=backend)
    assert raised.value is error and _launch._broken == {}


# Triton is not installed.

WITHOUT = "import sys; sys.modules['triton'] = None\n"


def test_without_triton_every_op_runs_on_the_reference():
    code = WITHOUT + (
        "import torch, fastunet\n"
        "from fastunet import kernels\n"
        "from fastunet.kernels import reference\n"
        "x = torch.randn(1, 4, 8)\n"
        "same = [\n"
        "    torch.equal(kernels.group_norm(x, 2, shift=x[:, :, 0]),\n"
        "                reference.group_norm(x, 2, shift=x[:, :, 0])),\n"
        "    torch.equal(kernels.attention(x, x, x, 2, backend='torch'),\n"
        "                reference.attention(x, x, x, 2)),\n"
        "    torch.equal(kernels.add_time_embedding(x, x[:, :, 0]),\n"
        "                reference.add_time_embedding(x, x[:, :, 0])),\n"
        "]\n"
        "errors = []\n"
        "def attempt(call):\n"
        "    try: call()\n"
        "    except Exception as e: errors.append((type(e).__name__, str(e)))\n"
        "attempt(lambda: kernels.group_norm(x, 2, backend='triton'))\n"
        "attempt(lambda: kernels.group_norm(x, 2, backend='cuda'))\n"
        "attempt(lambda: kernels.group_norm(x, 3))\n"
        "with kernels.use_backend('triton'): attempt(lambda: kernels.attention(x, x, x, 2))\n"
        "named = [kernels.attention.__name__, 'softmax' in kernels.attention.__doc__]\n"
        "told = fastunet.info().to_dict()['backends']['group_norm']\n"
        "print((same, errors, named, told))\n"
    )
    same, errors, named, told = run_python(code)
    assert same == [True, True, True]
    assert errors == [
        ("NotImplementedError", "group_norm on backend 'triton': Triton is not installed"),
        ("ValueError", "backend must be one of auto, triton, torch, got 'cuda'"),
        ("ValueError", "channels (4) must be divisible by groups (3)"),
        ("NotImplementedError", "attention on backend 'triton': Triton is not installed"),
    ]
    assert named == ["attention", True]
    assert told == {"backend": "torch", "why": "Triton is not installed"}


def test_another_module_that_is_missing_is_not_taken_for_triton():
    code = "import sys; sys.modules['einops'] = None\nimport fastunet.kernels"
    assert run_python(code).startswith("ModuleNotFoundError: import of einops halted")


# Tensors that a launch could not honour.


def gn(x):
    return kernels.group_norm(x, 2)


@pytest.fixture
def kernels_are_on(monkeypatch):
    monkeypatch.setattr(_launch, "interpreted", lambda: True)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.usefixtures("kernels_are_on")
def test_forward_mode_gets_its_tangent():
    x, tangent = torch.randn(2, 2, 4, 3, 3)
    expected = torch.func.jvp(lambda x: kernels.group_norm(x, 2, backend="torch"), (x,), (tangent,))
    torch.testing.assert_close(torch.func.jvp(gn, (x,), (tangent,)), expected)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        unpacked = torch.autograd.forward_ad.unpack_dual(gn(dual))
    torch.testing.assert_close(unpacked.tangent, expected[1])


@pytest.mark.usefixtures("kernels_are_on")
def test_vmap_maps_the_reference():
    x = torch.randn(3, 2, 4, 3, 3)
    torch.testing.assert_close(torch.vmap(gn)(x), torch.stack([gn(sample) for sample in x]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.usefixtures("kernels_are_on")
def test_a_torchscript_trace_holds_the_op():
    traced = torch.jit.trace(gn, torch.randn(2, 4, 3, 3))
    x = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(traced(x), gn(x))


@pytest.mark.usefixtures("kernels_are_on")
def test_a_subclass_of_tensor_runs_its_own_functions():
    seen = []

    class Watching(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(func.__name__)
            return super().__torch_function__(func, types, args, kwargs)

    gn(torch.randn(2, 4, 3, 3).as_subclass(Watching))
    assert "group_norm" in seen


def test_bf16_waits_for_the_faithful_interpreter(monkeypatch):
    x = torch.randn(2, 4, 3, 3).bfloat16()
    monkeypatch.setattr(_launch, "interpreted", lambda: True)
    monkeypatch.setattr(_launch, "_faithful", lambda: False)
    assert torch.equal(gn(x), kernels.group_norm(x, 2, backend="torch"))
    with pytest.raises(NotImplementedError, match="make_faithful"):
        kernels.group_norm(x, 2, backend="triton")


def test_a_size_that_does_not_fit_leaves_the_others_on(monkeypatch):
    """One warning an op; every other size goes on trying."""
    from triton.runtime.errors import OutOfResources

    def launcher(x, *args, **kwargs):
        if x.shape[1] == 8:
            raise OutOfResources(200_000, 100_000, "shared memory")
        return x * 0 + 7

    monkeypatch.setattr(_launch, "interpreted", lambda: True)

    def call(channels):
        args = (torch.randn(2, channels, 3, 3), 2)
        return _launch.run("group_norm", launcher, "auto", args)

    with pytest.warns(RuntimeWarning, match="kernel of group_norm does not compile here"):
        call(8)
    assert (call(4) == 7).all() and not (call(8) == 7).any()


def test_recording_tells_what_ran():
    x = torch.randn(2, 4, 3, 3)
    with kernels.recording() as ran:
        kernels.group_norm(x, 2, backend="torch")
        kernels.add_time_embedding(x, torch.randn(2, 4), backend="torch")
    assert ran == [("group_norm", "torch"), ("add_time_embedding", "torch")]
    kernels.group_norm(x, 2, backend="torch")
    assert len(ran) == 2
