"""Which backend an op runs on, what happens where a kernel cannot run, and how that is told."""

import subprocess
import threading

import pytest
import torch

import op_calls
from fastunet import kernels
from fastunet.kernels import _launch, backend_of, recording, reference, use_backend
from fresh_process import FreshProcess


@pytest.fixture(params=op_calls.OPS)
def op(request):
    return request.param


@pytest.fixture(autouse=True)
def nothing_broken(monkeypatch):
    monkeypatch.setattr(_launch, "_broken", {})


class Launcher:
    """Stands in for a launch: counts, and raises or does what the kernel's own launch does."""

    def __init__(self, launch):
        self.launch, self.calls, self.error = launch, 0, None

    def __call__(self, *args, **options):
        self.calls += 1
        if self.error is not None:
            raise self.error
        return self.launch(*args, **options)

    def plan(self, *args, **options):
        """None, so that every call comes here."""


@pytest.fixture
def launcher(monkeypatch, op):
    """The op's forward launch, watched."""
    operator = op_calls.operator(op)
    monkeypatch.setattr(operator, "forward", Launcher(operator.forward))
    return operator.forward


@pytest.fixture
def backward(monkeypatch, op):
    """The op's backward launch, watched."""
    operator = op_calls.operator(op)
    monkeypatch.setattr(operator, "backward", Launcher(operator.backward))
    return operator.backward


@pytest.fixture
def on_this_cpu(device, monkeypatch):
    """As without the interpreter."""
    if device != "cpu":
        pytest.skip("on a GPU kernels run without the interpreter")
    monkeypatch.setattr(_launch, "interpreted", lambda: False)


@pytest.fixture
def made(op):
    return op_calls.arguments(op)


def changed(made, change):
    return {k: change(v) if isinstance(v, torch.Tensor) else v for k, v in made.items()}


def expected(op, made):
    return op_calls.outputs(op, made, backend="torch")


def assert_equal(results, others):
    for result, other in zip(results, others, strict=True):
        assert torch.equal(result, other)


# The choice.


def test_where_kernels_run_auto_takes_them(op, made, launcher):
    with recording() as ran:
        assert_equal(op_calls.outputs(op, made), op_calls.outputs(op, made, backend="triton"))
        op_calls.outputs(op, made, backend="torch")
    assert launcher.calls == 2
    assert ran == [(op, "triton"), (op, "triton"), (op, "torch")]


def test_a_cpu_without_interpreter_takes_the_reference(op, made, launcher, on_this_cpu):
    assert_equal(op_calls.outputs(op, made), expected(op, made))
    with pytest.raises(
        NotImplementedError, match=f"{op} on backend 'triton': cpu tensors run only"
    ):
        op_calls.outputs(op, made, backend="triton")
    trained = op_calls.outputs(op, op_calls.leaves(op, made))
    assert all(result.requires_grad for result in trained)
    assert launcher.calls == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_cpu_without_interpreter_gives_inductor_the_reference_to_fuse(op, made, on_this_cpu):
    graphs = []
    torch.compiler.reset()

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    torch.compile(lambda: op_calls.outputs(op, made), backend=keep, fullgraph=True)()
    (graph,) = graphs
    assert not any("fastunet" in str(node.target) for node in graph.graph.nodes)


class Plain(torch.Tensor):
    """A subclass that adds nothing."""


UNFIT = {
    "meta": (lambda t: t.to("meta"), "its kernels take tensors on a GPU, got meta"),
    "subclass": (
        lambda t: t.as_subclass(Plain),
        "its kernels take plain tensors, no subclass",
    ),
}


@pytest.mark.parametrize("change, reason", UNFIT.values(), ids=UNFIT)
def test_what_no_kernel_takes_runs_on_the_reference(op, made, change, reason, launcher):
    made = changed(made, change)
    results, right = op_calls.outputs(op, made), expected(op, made)
    for result, other in zip(results, right, strict=True):
        assert (result.shape, result.dtype, result.device) == (
            other.shape,
            other.dtype,
            other.device,
        )
        assert result.device.type == "meta" or torch.equal(result, other)
    with pytest.raises(NotImplementedError, match=reason):
        op_calls.outputs(op, made, backend="triton")
    assert launcher.calls == 0


def test_fp64_runs_where_it_is_asked_for_by_name(op, made, launcher):
    """In the interpreter, for gradcheck; "auto" and GPUs take the reference."""
    made = changed(made, torch.Tensor.double)
    assert_equal(op_calls.outputs(op, made), expected(op, made))
    assert launcher.calls == 0
    if not _launch.interpreted():
        with pytest.raises(
            NotImplementedError, match="take fp32, fp16 and bf16, got torch.float64"
        ):
            op_calls.outputs(op, made, backend="triton")
        return
    torch.testing.assert_close(op_calls.outputs(op, made, backend="triton"), expected(op, made))
    assert launcher.calls == 1


@pytest.mark.parametrize("head_dim", [4, 12, 264])
def test_a_head_dim_that_no_kernel_takes(head_dim, device):
    query = torch.randn(1, 3, head_dim, device=device)
    assert torch.equal(
        kernels.attention(query, query, query, 1), reference.attention(query, query, query, 1)
    )
    with pytest.raises(NotImplementedError, match=rf"head dim \({head_dim}\) must be a multiple"):
        kernels.attention(query, query, query, 1, backend="triton")


def test_self_attention_and_a_long_context_go_to_the_vendors_kernel(device):
    query, key = (torch.randn(1, length, 16, device=device) for length in (4, 129))
    with recording() as ran:
        kernels.attention(query, key[:, :128], key[:, :128], 2)
        for context in (key, query):
            kernels.attention(query, context, context, 2)
            kernels.attention(query, context, context, 2, backend="triton")
    assert [backend for _, backend in ran] == ["triton", *["torch", "triton"] * 2]


# use_backend and FASTUNET_BACKEND.


def test_use_backend_answers_for_auto_only(op, made):
    with use_backend("torch"), recording() as ran:
        op_calls.outputs(op, made)
        op_calls.outputs(op, made, backend="triton")
    assert ran == [(op, "torch"), (op, "triton")]


def test_use_backend_nests_and_ends_with_its_block():
    outside = _launch.asked("auto")
    with use_backend("torch"):
        with use_backend("triton"):
            assert backend_of("group_norm")[0] == "triton"
            with use_backend("auto"):
                assert _launch.asked("auto") == "auto"
        assert backend_of("group_norm")[0] == "torch"
    assert _launch.asked("auto") == outside


def test_use_backend_ends_with_an_exception_too():
    outside = _launch.asked("auto")
    with pytest.raises(KeyError), use_backend("torch"):
        raise KeyError
    assert _launch.asked("auto") == outside


def test_use_backend_holds_in_the_threads_of_autograd_too():
    """There a checkpointed forward is computed again."""
    seen = []
    with use_backend("torch"):
        thread = threading.Thread(target=lambda: seen.append(_launch.asked("auto")))
        thread.start()
        thread.join()
    assert seen == ["torch"]


@pytest.mark.parametrize("name", ["cuda", "", "Triton", None])
def test_backends_are_named(op, made, name):
    text = f"backend must be one of auto, triton, torch, got {name!r}"
    with pytest.raises(ValueError, match=text), use_backend(name):
        pass
    with pytest.raises(ValueError, match=text):
        op_calls.outputs(op, made, backend=name)


@pytest.fixture(scope="module")
def fresh():
    with FreshProcess() as process:
        yield process


@pytest.mark.parametrize("name", ["torch", "triton"])
def test_the_environment_chooses(name, fresh):
    code = "import fastunet; print(fastunet.info().to_dict()['backends']['attention'])"
    assert fresh.run(code, FASTUNET_BACKEND=name) == {
        "backend": name,
        "why": f"FASTUNET_BACKEND or use_backend asks for {name}",
    }


def test_a_wrong_environment_is_told_at_import(fresh):
    assert fresh.run("import fastunet.kernels", FASTUNET_BACKEND="cuda") == (
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
def test_a_kernel_that_does_not_compile_is_told_once(op, made, failure, launcher):
    launcher.error = compile_failures()[failure]
    with pytest.warns(RuntimeWarning, match=f"kernel of {op} does not compile here") as told:
        result = call_from_here(op, made)
    assert len(told) == 1 and told[0].filename == __file__
    assert type(launcher.error).__name__ in str(told[0].message)
    assert_equal(result, expected(op, made))
    assert_equal(op_calls.outputs(op, made), expected(op, made))  # a warning would be an error
    assert launcher.calls == 1
    backend, why = backend_of(op)
    assert backend == "torch" and why.startswith("its kernel does not compile here")
    other = next(name for name in op_calls.OPS if name != op)
    assert backend_of(other)[0] == "triton"


def call_from_here(op, made):
    results = getattr(kernels, op)(**made)
    return (results,) if isinstance(results, torch.Tensor) else results


@pytest.mark.parametrize("failure", FAILURES)
def test_what_was_asked_for_by_name_does_not_fall_back(op, made, failure, launcher, backward):
    launcher.error = compile_failures()[failure]
    for inputs in (made, op_calls.leaves(op, made)):
        with pytest.raises(type(launcher.error)):
            op_calls.outputs(op, inputs, backend="triton")
    with use_backend("triton"), pytest.raises(type(launcher.error)):
        op_calls.outputs(op, made)
    assert launcher.calls == 3
    launcher.error, backward.error = None, launcher.error
    results = op_calls.outputs(op, op_calls.leaves(op, made), backend="triton")
    with pytest.raises(type(backward.error)):
        sum(result.sum() for result in results).backward()
    assert backward.calls == 1 and _launch._broken == {}


ERRORS = [
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("Triton Error [CUDA]: device-side assert triggered"),
    torch.cuda.OutOfMemoryError("out of memory"),
    ValueError("Pointer argument cannot be accessed from Triton"),
    KeyError("a fault of ours"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_any_other_error_is_not_hidden(op, made, error, backend, launcher, backward):
    launcher.error = error
    for inputs in (made, op_calls.leaves(op, made)):
        with pytest.raises(type(error)) as raised:
            op_calls.outputs(op, inputs, backend=backend)
        assert raised.value is error
    launcher.error, backward.error = None, error
    results = op_calls.outputs(op, op_calls.leaves(op, made), backend=backend)
    with pytest.raises(type(error)) as raised:
        sum(result.sum() for result in results).backward()
    assert _launch._broken == {}


def test_a_size_that_does_not_fit_leaves_the_others_on(op, launcher, monkeypatch):
    """One warning an op; every other size goes on trying."""
    from triton.runtime.errors import OutOfResources

    small, large, larger = (op_calls.arguments(op, size=size) for size in (3, 4, 6))
    launch = launcher.launch

    def launch_small(x, *args, **options):
        if x.shape[1:] != next(iter(small.values())).shape[1:]:
            raise OutOfResources(200_000, 100_000, "shared memory")
        return launch(x, *args, **options)

    monkeypatch.setattr(launcher, "launch", launch_small)
    with recording() as ran:
        with pytest.warns(RuntimeWarning, match=f"kernel of {op} does not compile here"):
            op_calls.outputs(op, large)
        for made in (larger, small, large, larger):
            op_calls.outputs(op, made)
    assert [backend for _, backend in ran] == ["torch", "torch", "triton", "torch", "torch"]
    assert launcher.calls == 3


COMPILERS = [None, "eager", "aot_eager"]


def train(op, made, upstream, compiler):
    """(results, gradients) of a call, compiled or not, on "auto"."""
    made = op_calls.leaves(op, made)
    inputs = [made[name] for name in op_calls.differentiable(op, made)]

    def run(made):
        return op_calls.outputs(op, made)

    if compiler is not None:
        torch.compiler.reset()
        run = torch.compile(run, backend=compiler, fullgraph=True)
    results = run(made)
    return results, torch.autograd.grad(results, inputs, upstream)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("fails", ["forward", "backward"])
def test_training_goes_on_with_the_reference(op, made, fails, compiler, launcher, backward, device):
    """Forward: what the kernel would have saved does not exist, so the backward falls back too."""
    upstream = [torch.randn_like(result) for result in expected(op, made)]
    with use_backend("torch"):
        results, gradients = train(op, made, upstream, None)
    failing = launcher if fails == "forward" else backward
    failing.error = RuntimeError("Failed to find C compiler")
    name = op if fails == "forward" else f"{op}_backward"
    with pytest.warns(RuntimeWarning, match=f"kernel of {name} does not compile here") as told:
        first = train(op, made, upstream, compiler)
    (ours,) = (each for each in told if "does not compile here" in str(each.message))
    if fails == "forward" or device == "cpu":  # a GPU's gradients have a thread of autograd's own
        assert ours.filename in (__file__, op_calls.__file__)
    second = train(op, made, upstream, compiler)  # another warning would be an error
    for found in (first, second):
        torch.testing.assert_close(found, (results, gradients))
        if fails == "forward":
            assert_equal(found[0], results)
    assert failing.calls == 1
    assert backward.calls == (0 if fails == "forward" else 1)


def test_a_fallback_within_an_op_is_laid_out_as_the_kernel_lays_it_out(op, made, launcher, device):
    """A compiled graph counts on the strides and dtypes of the kernel, under autocast too."""
    made = op_calls.leaves(op, made)
    values = op_calls.in_order(op, made)
    right = op_calls.operator(op).registered(*values, True)
    launcher.error = RuntimeError("Failed to find C compiler")
    with pytest.warns(RuntimeWarning), torch.autocast(device, torch.bfloat16):
        found = op_calls.operator(op).registered(*values, True)
    right, found = ([r] if isinstance(r, torch.Tensor) else r for r in (right, found))
    for one, other in zip(right, found, strict=True):
        assert (one.dtype, one.stride()) == (other.dtype, other.stride())
    results = slice(op_calls.operator(op).results)
    torch.testing.assert_close(found[results], right[results])


# Triton is not installed.

WITHOUT = "import sys; sys.modules['triton'] = None\n"


def test_without_triton_every_op_runs_on_the_reference(fresh):
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
    same, errors, named, told = fresh.run(code)
    assert same == [True, True, True]
    assert errors == [
        ("NotImplementedError", "group_norm on backend 'triton': Triton is not installed"),
        ("ValueError", "backend must be one of auto, triton, torch, got 'cuda'"),
        ("ValueError", "channels (4) must be divisible by groups (3)"),
        ("NotImplementedError", "attention on backend 'triton': Triton is not installed"),
    ]
    assert named == ["attention", True]
    assert told == {"backend": "torch", "why": "Triton is not installed"}


def test_another_module_that_is_missing_is_not_taken_for_triton(fresh):
    code = "import sys; sys.modules['fastunet.kernels._plan'] = None\nimport fastunet.kernels"
    assert fresh.run(code).startswith(
        "ModuleNotFoundError: import of fastunet.kernels._plan halted"
    )


# Tensors that a launch could not honour.


def gn(x):
    return kernels.group_norm(x, 2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_torchscript_trace_holds_the_op(device):
    traced = torch.jit.trace(gn, torch.randn(2, 4, 3, 3, device=device))
    x = torch.randn(2, 4, 3, 3, device=device)
    torch.testing.assert_close(traced(x), gn(x))


def test_a_subclass_of_tensor_runs_its_own_functions():
    seen = []

    class Watching(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append(func.__name__)
            return super().__torch_function__(func, types, args, kwargs)

    gn(torch.randn(2, 4, 3, 3).as_subclass(Watching))
    assert "group_norm" in seen


def test_bf16_waits_for_the_faithful_interpreter(monkeypatch, device):
    if device != "cpu":
        pytest.skip("of the interpreter alone")
    x = torch.randn(2, 4, 3, 3).bfloat16()
    monkeypatch.setattr(_launch, "_faithful", lambda: False)
    assert torch.equal(gn(x), kernels.group_norm(x, 2, backend="torch"))
    with pytest.raises(NotImplementedError, match="make_faithful"):
        kernels.group_norm(x, 2, backend="triton")


def test_recording_tells_what_ran():
    x = torch.randn(2, 4, 3, 3)
    with kernels.recording() as ran:
        kernels.group_norm(x, 2, backend="torch")
        kernels.add_time_embedding(x, torch.randn(2, 4), backend="torch")
    assert ran == [("group_norm", "torch"), ("add_time_embedding", "torch")]
    kernels.group_norm(x, 2, backend="torch")
    assert len(ran) == 2
