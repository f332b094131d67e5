"""What the tests of fastunet.nn ask of every layer."""

from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from fastunet.kernels import recording, use_backend
from fastunet.testing import assert_gradients


def assert_trains(fused: nn.Module, plain: nn.Module, *inputs: Tensor) -> None:
    """On kernels, ``fused`` gives the results and gradients of ``plain``, whose parameters are its
    own, by the parity rule: those of the inputs and of every parameter."""
    names = [name for name, _ in plain.named_parameters()]

    def called(layer: nn.Module) -> Any:
        def call(*args: Tensor) -> Tensor:
            parameters = dict(zip(names, args[len(inputs) :], strict=True))
            return functional_call(layer, parameters, args[: len(inputs)])

        return call

    parameters = [parameter.detach() for _, parameter in plain.named_parameters()]
    with use_backend("triton"), recording() as ran:
        rows = assert_gradients(called(fused), called(plain), *inputs, *parameters)
    assert ("torch" not in {backend for _, backend in ran}) and ran
    assert len(rows) == 1 + len(inputs) + len(parameters)
