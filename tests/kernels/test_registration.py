"""Every op as PyTorch's subsystems see it: torch.library, torch.compile, torch.export, autograd."""

import copy
import pickle
import shutil

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import op_calls
from fastunet import kernels
from fastunet.kernels import recording, reference, use_backend
from fastunet.nn import AddTimeEmbedding, FlashCrossAttention, GroupNormSiLU, ResnetBlock
from fastunet.testing import assert_gradients

VARIANTS = list(op_calls.variants())
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit.script. is deprecated:DeprecationWarning",
    "ignore:.*is not supported in Python 3.14:DeprecationWarning",
)


@pytest.fixture(params=op_calls.OPS)
def op(request):
    return request.param


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture(autouse=True)
def kernels_run():
    """By their own choice: FASTUNET_BACKEND does not change what is tested here."""
    with use_backend("auto"):
        yield


def results_and_gradients(op, made, run=None, upstream=torch.ones_like):
    """What the op (or ``run``, which calls it) gives, and all gradients."""
    made = op_calls.leaves(op, made)
    results = (run or (lambda made: op_calls.outputs(op, made)))(made)
    torch.autograd.backward(results, [upstream(result) for result in results])
    grads = [made[name].grad for name in op_calls.differentiable(op, made)]
    return *(result.detach() for result in results), *grads


def assert_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and one.stride() == other.stride()
        assert torch.equal(one, other)


# torch.library.


@pytest.mark.parametrize("op, name, make", VARIANTS, ids=[f"{o} {n}" for o, n, _ in VARIANTS])
def test_opcheck(op, name, make):
    """Schema (nothing is aliased or mutated), autograd, fakes (strides too), AOT dispatch."""
    operator = op_calls.operator(op)
    made = op_calls.leaves(op, make())
    torch.library.opcheck(operator.registered, (*op_calls.in_order(op, made), False))
    values = [v.detach() if isinstance(v, torch.Tensor) else v for v in op_calls.in_order(op, made)]
    results = operator.forward(*values, save=True)
    grads = [torch.randn_like(result) for result in results[: operator.results]]
    needs = [False] * (1 + max(index for _, index in operator.gradients))
    for at, index in operator.gradients:
        if index >= 0 and values[at] is not None:
            needs[index] = True
    kept = operator.keep(values, results)
    # That AOT dispatch traces it, the forward op's check has shown.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments = (*grads, *kept, needs, False)
    torch.library.opcheck(operator.registered_backward, arguments, test_utils=checks)


def test_eager_calls_stay_off_the_registered_ops(op, monkeypatch):
    def refuse(*args):
        raise AssertionError("the registered op was called")

    made = op_calls.arguments(op)
    expected = op_calls.outputs(op, made)

    def gradients(**options):
        leaves = op_calls.leaves(op, made)
        inputs = [leaves[name] for name in op_calls.differentiable(op, leaves)]
        results = op_calls.outputs(op, leaves)
        assert_same([result.detach() for result in results], expected)
        upstream = [torch.ones_like(result) for result in results]
        return torch.autograd.grad(results, inputs, upstream, **options)

    through = gradients(create_graph=True)  # by the registered op, which refuses to go on
    operator = op_calls.operator(op)
    monkeypatch.setattr(operator, "registered", refuse)
    monkeypatch.setattr(operator, "registered_backward", refuse)
    assert_same(op_calls.outputs(op, made), expected)
    with torch.inference_mode():
        assert_same(op_calls.outputs(op, made), expected)
    with torch.no_grad():
        assert_same(op_calls.outputs(op, op_calls.leaves(op, made)), expected)
    assert_same(gradients(), [gradient.detach() for gradient in through])
    with pytest.raises(AssertionError, match="the registered op was called"):
        gradients(create_graph=True)
    with pytest.raises(AssertionError, match="the registered op was called"):
        make_fx(lambda: op_calls.outputs(op, made))()


def test_training_and_inference_give_the_same_bits(op):
    made = op_calls.arguments(op)
    results = op_calls.outputs(op, op_calls.leaves(op, made))
    assert_same([result.detach() for result in results], op_calls.outputs(op, made))


# torch.compile and torch.export.


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_call_runs_the_kernel_in_one_graph(op, backend):
    made = op_calls.arguments(op)
    expected = results_and_gradients(op, made)
    compiled = torch.compile(
        lambda made: op_calls.outputs(op, made), backend=backend, fullgraph=True
    )
    with recording() as ran:
        assert_same(results_and_gradients(op, made, compiled), expected)
        with torch.no_grad():
            assert_same(compiled(made), expected[: op_calls.operator(op).results])
    assert ran == [(op, "triton")] * 2


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_inductor_keeps_the_strides_that_the_fakes_promise(device):
    """Between pointwise operations, which Inductor would lay out as it likes."""

    def block(x, weight, emb):
        y = kernels.add_time_embedding(x.transpose(2, 3) * 2, emb)
        return kernels.group_norm(y + 1, 2, weight, activation="silu").sum(1) * 2

    x = torch.randn(2, 8, 3, 4, device=device).to(memory_format=torch.channels_last)
    others = (torch.randn(*s, device=device, requires_grad=True) for s in ((8,), (2, 8)))
    inputs = [x.requires_grad_(), *others]
    found = []
    for function in (block, torch.compile(block, fullgraph=True)):
        with recording() as ran:
            result = function(*inputs)
            gradients = torch.autograd.grad(result.square().sum(), inputs)
        assert [backend for _, backend in ran] == ["triton"] * 2
        found.append((result, *gradients))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("training", [False, True])
def test_five_sizes_take_at_most_two_graphs(op, training):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda made: op_calls.outputs(op, made), backend=counter, fullgraph=True
    )
    for samples, size in ((2, 3), (3, 4), (4, 6), (3, 7), (2, 8)):
        made = op_calls.arguments(op, samples, size)
        if training:
            expected = results_and_gradients(op, made)
            assert_same(results_and_gradients(op, made, compiled), expected)
        else:
            assert_same(compiled(made), op_calls.outputs(op, made))
    assert 1 <= counter.frame_count <= 2


def test_a_compiled_call_obeys_the_backend_of_the_moment(op):
    made = op_calls.arguments(op)
    compiled = torch.compile(lambda: op_calls.outputs(op, made), backend="eager", fullgraph=True)
    with recording() as ran:
        compiled()
        with use_backend("torch"):
            assert_same(compiled(), op_calls.outputs(op, made))
        compiled()
    assert ran == [(op, "triton"), (op, "torch"), (op, "triton")]

    def inside():
        with use_backend("torch"):
            return op_calls.outputs(op, made)

    with recording() as ran:
        torch.compile(inside, backend="eager", fullgraph=True)()
    assert ran == []  # a reference that is traced is no call


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_program_holds_the_op(op, strict):
    made = op_calls.arguments(op)
    names = [name for name, value in made.items() if isinstance(value, torch.Tensor)]

    class Model(nn.Module):
        def forward(self, *tensors):
            return op_calls.outputs(op, made | dict(zip(names, tensors, strict=True)))

    inputs = tuple(made[name] for name in names)
    program = torch.export.export(Model(), inputs, strict=strict)
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert op_calls.operator(op).registered in targets
    others = [torch.randn_like(tensor) for tensor in inputs]
    assert_same(program.module()(*others), Model()(*others))


def test_make_fx_records_the_op(op):
    """A mode that watches every operation must see ours, not an output that nobody writes."""
    made = op_calls.arguments(op)
    names = [name for name, value in made.items() if isinstance(value, torch.Tensor)]

    def call(*tensors):
        return op_calls.outputs(op, made | dict(zip(names, tensors, strict=True)))

    graph = make_fx(call)(*(made[name] for name in names))
    others = [torch.randn_like(made[name]) for name in names]
    assert_same(graph(*others), call(*others))


def test_a_fake_tensor_gets_the_shape_of_the_reference(op):
    made = op_calls.arguments(op)
    with FakeTensorMode() as mode:
        fakes = {
            name: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
            for name, value in made.items()
        }
        results = op_calls.outputs(op, fakes)
    for result, expected in zip(results, op_calls.outputs(op, made), strict=True):
        assert result.shape == expected.shape and result.dtype == expected.dtype


def test_a_compiled_subclass_runs_on_the_reference(op):
    class Plain(torch.Tensor):
        pass

    made = op_calls.arguments(op)
    first = next(iter(made))
    made[first] = made[first].as_subclass(Plain)
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(lambda made: op_calls.outputs(op, made), backend=keep, fullgraph=True)
    results = compiled(made)
    targets = [node.target for graph in graphs for node in graph.graph.nodes]
    assert op_calls.operator(op).registered not in targets
    made[first] = made[first].as_subclass(torch.Tensor)
    for result, expected in zip(results, op_calls.outputs(op, made, backend="torch"), strict=True):
        assert torch.equal(result.as_subclass(torch.Tensor), expected)


# Gradients.


def stride_0(y):
    return torch.ones((), dtype=y.dtype, device=y.device).expand_as(y)


def transposed(y):
    return torch.randn_like(y.mT.contiguous()).mT


def over_space(y):
    return torch.randn_like(y[..., :1]).expand_as(y)


@pytest.mark.parametrize("upstream", [stride_0, transposed, over_space])
def test_gradients_arrive_in_any_strides(op, upstream):
    made = op_calls.arguments(op, size=5)
    assert_gradients(
        getattr(kernels, op), getattr(reference, op), **made, name=op, upstream=upstream
    )


def test_every_gradient_alone_is_what_it_is_among_all(op):
    made = op_calls.arguments(op)
    names = op_calls.differentiable(op, made)
    results = op_calls.operator(op).results
    together = results_and_gradients(op, made)[results:]
    for name, expected in zip(names, together, strict=True):
        one = op_calls.leaves(op, made, name)
        outputs = op_calls.outputs(op, one)
        gradient = torch.autograd.grad(outputs, one[name], [torch.ones_like(o) for o in outputs])
        assert torch.equal(gradient[0], expected), name


def test_a_second_result_that_nobody_uses_costs_nothing():
    made = op_calls.arguments("add_layer_norm")
    for used in (0, 1):
        found = []
        for function in (kernels.add_layer_norm, reference.add_layer_norm):
            fresh = op_calls.leaves("add_layer_norm", made)
            inputs = [fresh["x"], fresh["residual"], fresh["weight"]]
            result = function(**fresh)[used]
            found.append(torch.autograd.grad(result.sum(), inputs, allow_unused=True))
        for one, other in zip(*found, strict=True):
            if one is None or other is None:
                assert not torch.any(one if other is None else other)
            else:
                torch.testing.assert_close(one, other)


def test_a_graph_that_is_kept_gives_its_gradients_twice(op):
    made = op_calls.leaves(op, op_calls.arguments(op))
    results = op_calls.outputs(op, made)
    inputs = [made[name] for name in op_calls.differentiable(op, made)]
    ones = [torch.ones_like(result) for result in results]
    first, second = (
        torch.autograd.grad(results, inputs, ones, retain_graph=True) for _ in range(2)
    )
    assert_same(first, second)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_bit(op, reentrant):
    made = op_calls.arguments(op)

    def run(made):
        names = list(made)
        return checkpoint(
            lambda *values: op_calls.outputs(op, dict(zip(names, values, strict=True))),
            *made.values(), use_reentrant=reentrant,
        )  # fmt: skip

    with recording() as ran:
        found = results_and_gradients(op, made, run)
    assert set(ran) == {(op, "triton")}
    assert_same(found, results_and_gradients(op, made))


def test_a_second_derivative_is_refused(op):
    made = op_calls.leaves(op, op_calls.arguments(op))
    inputs = [made[name] for name in op_calls.differentiable(op, made)]
    loss = sum(result.square().sum() for result in op_calls.outputs(op, made))
    gradients = torch.autograd.grad(loss, inputs, create_graph=True)
    with pytest.raises(NotImplementedError, match=f"{op}: its kernels have no second derivative"):
        torch.autograd.grad(sum(g.square().sum() for g in gradients), inputs)


# Transforms.


@pytest.fixture
def math_attention():
    """The one kernel of PyTorch's attention that has a forward mode."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def tangents(op, made):
    """(function of the differentiable arguments, their values, random tangents)."""
    names = op_calls.differentiable(op, made)
    values = tuple(made[name] for name in names)

    def function(*values, backend="auto"):
        return op_calls.outputs(op, made | dict(zip(names, values, strict=True)), backend=backend)

    return function, values, tuple(torch.randn_like(value) for value in values)


@pytest.mark.parametrize("backend", [None, "aot_eager"])
@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.usefixtures("math_attention")
def test_forward_mode_gives_the_references_tangents(op, backend, outside):
    function, values, moved = tangents(op, op_calls.arguments(op))
    expected = torch.func.jvp(lambda *v: function(*v, backend="torch"), values, moved)

    if outside:
        run = torch.compile(function, backend=backend) if backend else function
        found = torch.func.jvp(run, values, moved)
    else:

        def run(values, moved):
            return torch.func.jvp(function, values, moved)

        run = torch.compile(run, backend=backend, fullgraph=True) if backend else run
        found = run(values, moved)
    torch.testing.assert_close(found, expected)
    assert all(torch.any(tangent) for tangent in found[1])


@pytest.mark.parametrize("backend", [None, "aot_eager"])
@pytest.mark.usefixtures("math_attention")
def test_a_dual_tensor_keeps_its_tangent(op, backend):
    function, values, moved = tangents(op, op_calls.arguments(op))
    expected = torch.func.jvp(lambda *v: function(*v, backend="torch"), values, moved)[1]
    run = torch.compile(function, backend=backend) if backend else function
    with forward_ad.dual_level():
        duals = map(forward_ad.make_dual, values, moved)
        found = tuple(forward_ad.unpack_dual(result).tangent for result in run(*duals))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_forward_mode_of_a_kernel_asked_for_by_name_is_refused(op, backend):
    function, values, moved = tangents(op, op_calls.arguments(op))

    def run(values, moved):
        return torch.func.jvp(lambda *v: function(*v, backend="triton"), values, moved)

    run = torch.compile(run, backend=backend) if backend else run
    with pytest.raises(Exception, match=f"{op} on backend 'triton': its kernels take"):
        run(values, moved)


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_func_vjp_gives_the_gradients(op, backend):
    made = op_calls.arguments(op)
    function, values, _ = tangents(op, made)

    def run(*values):
        results, pull_back = torch.func.vjp(function, *values)
        return pull_back(tuple(torch.ones_like(result) for result in results))

    run = torch.compile(run, backend=backend, fullgraph=True) if backend else run
    expected = results_and_gradients(op, made)[op_calls.operator(op).results :]
    torch.testing.assert_close(run(*values), tuple(expected))


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_vmap_maps_the_op(op, backend):
    function, values, _ = tangents(op, op_calls.arguments(op))
    stacked = [torch.stack([value, torch.randn_like(value)]) for value in values]
    run = torch.vmap(function)
    run = torch.compile(run, backend=backend, fullgraph=True) if backend else run
    expected = [function(*sample) for sample in zip(*stacked, strict=True)]
    expected = tuple(torch.stack(results) for results in zip(*expected, strict=True))
    torch.testing.assert_close(run(*stacked), expected)
    if backend is None:
        with pytest.raises(NotImplementedError, match="none inside vmap, jvp or a trace"):
            torch.vmap(lambda *values: function(*values, backend="triton"))(*stacked)


# Modules.

MODULES = {
    "GroupNormSiLU": (lambda: GroupNormSiLU(2, 8), [(2, 8, 3, 3)]),
    "FlashCrossAttention": (lambda: FlashCrossAttention(16, 12, 2, 8), [(2, 4, 16), (2, 5, 12)]),
    "AddTimeEmbedding": (lambda: AddTimeEmbedding(6, 8), [(2, 8, 3, 3), (2, 6)]),
    "ResnetBlock": (lambda: ResnetBlock(8, 8, 6, groups=2), [(2, 8, 3, 3), (2, 6)]),
}


@pytest.fixture(params=MODULES)
def module_and_inputs(request, device):
    make, shapes = MODULES[request.param]
    return make().to(device), [torch.randn(*shape, device=device) for shape in shapes]


def test_a_module_is_called_copied_and_pickled_as_any(module_and_inputs):
    module, inputs = module_and_inputs
    expected = module(*inputs)
    parameters = {name: value.detach() for name, value in module.named_parameters()}
    with torch.no_grad():
        assert_same([torch.func.functional_call(module, parameters, tuple(inputs))],
                    [expected.detach()])  # fmt: skip
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        result = again(*inputs)
        assert_same([result], [expected])
        result.sum().backward()
        assert all(p.grad is not None for p in again.parameters())
    assert all(p.grad is None for p in module.parameters())


def test_an_exported_module_holds_its_ops(module_and_inputs):
    module, inputs = module_and_inputs
    program = torch.export.export(module, tuple(inputs), strict=False)
    ours = [n for n in program.graph.nodes if str(n.target).startswith("fastunet.")]
    with recording() as ran:
        expected = module(*inputs)
    assert len(ours) == len(ran) > 0
    assert_same([program.module()(*inputs).detach()], [expected.detach()])


def test_func_grad_of_a_module(module_and_inputs):
    module, inputs = module_and_inputs
    parameters = dict(module.named_parameters())
    found = torch.func.grad(
        lambda p: torch.func.functional_call(module, p, tuple(inputs)).square().sum()
    )({name: value.detach() for name, value in parameters.items()})
    module(*inputs).square().sum().backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(found[name], parameter.grad)


def test_autocast_gives_the_same_dtype_compiled(module_and_inputs):
    module, inputs = module_and_inputs
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    with torch.autocast(inputs[0].device.type, torch.bfloat16):
        expected, found = module(*inputs), compiled(*inputs)
    assert found.dtype == expected.dtype
    assert_same([found.detach()], [expected.detach()])


def test_an_accelerated_unet_compiles_into_one_graph(device):
    pytest.importorskip("diffusers")
    import fastunet
    import small_unets

    # One of each op is enough here: tests/test_accelerate.py compiles a model with all its blocks.
    one_level = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    model = small_unets.small("diffusers", block_out_channels=(32,), **one_level).to(device)
    fastunet.accelerate(model)
    args, kwargs = small_unets.make_inputs("diffusers", batch=1)
    args = [value.to(device) for value in args]

    def run(*args, **kwargs):
        return small_unets.run(model, *args, **kwargs)

    found = []
    for function in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        with use_backend("triton"), recording() as ran:
            result = function(*args, **kwargs)
            result.square().sum().backward()
        assert {*ran} == {(op, "triton") for op in op_calls.OPS if op != "add_time_embedding"}
        gradients = [p.grad for p in model.parameters()]
        assert all(gradient is not None and torch.any(gradient) for gradient in gradients)
        found.append([result.detach(), *gradients])
    torch.testing.assert_close(*found)
