"""timestep_embedding and add_time_embedding: results and gradients, layouts, bad input."""

import math
from functools import partial

import pytest
import torch

from fastunet import kernels
from fastunet.kernels import reference
from fastunet.testing import DTYPES, SHAPES, assert_gradients, make_inputs

triton_add = partial(kernels.add_time_embedding, backend="triton")


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parity(dtype, channels_last, device):
    sizes = [(320, 5), (30, 3)]
    if device == "cuda":
        sizes += [size for model in SHAPES.values() for size in model["add_time_embedding"]]
    for channels, side in sizes:
        args, _ = make_inputs(
            "add_time_embedding", channels, side,
            dtype=dtype, device=device, channels_last=channels_last,
        )  # fmt: skip
        assert_gradients(triton_add, reference.add_time_embedding, *args)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        assert triton_add(*args).is_contiguous(memory_format=layout)


@pytest.mark.parametrize("shape", [(2, 6), (2, 5, 7), (1, 3, 2, 4, 5), (3, 1, 1, 1), (2, 200, 33)])
def test_ragged_shapes(shape, device):
    x, emb = torch.randn(shape, device=device), torch.randn(shape[:2], device=device)
    assert_gradients(triton_add, reference.add_time_embedding, x, emb)


def test_strides(device):
    x = torch.randn(2, 12, 6, 8, device=device)
    emb = torch.randn(12, 2, device=device).t()
    for view in (x[:, ::2], x[:, :, ::2], x[..., ::2], x[:1].expand_as(x), x.transpose(2, 3)):
        assert_gradients(triton_add, reference.add_time_embedding, view, emb[:, : view.shape[1]])


def test_fp32_embedding_beside_16_bit_activations(device):
    x = torch.randn(2, 6, 3, 3, device=device).half()
    assert_gradients(triton_add, reference.add_time_embedding, x, torch.randn(2, 6, device=device))


def test_16_bit_embedding_beside_fp32_activations(device):
    """What autocast hands over: its linear layers give 16 bits."""
    x, emb = torch.randn(2, 6, 3, 3, device=device), torch.randn(2, 6, device=device).bfloat16()
    assert_gradients(triton_add, reference.add_time_embedding, x, emb)


UPSTREAM = {
    "one value": lambda y: torch.ones((), dtype=y.dtype, device=y.device).expand_as(y),
    "nhwc": lambda y: torch.randn_like(y).to(memory_format=torch.channels_last),
    "transposed": lambda y: torch.randn_like(y.mT.contiguous()).mT,
    "over space": lambda y: torch.randn_like(y[..., :1]).expand_as(y),
}


@pytest.mark.parametrize("upstream", UPSTREAM)
def test_gradients_of_any_strides(upstream, device):
    x, emb = torch.randn(2, 12, 6, 8, device=device), torch.randn(2, 12, device=device)
    assert_gradients(triton_add, reference.add_time_embedding, x, emb, upstream=UPSTREAM[upstream])


def test_the_gradient_of_the_image_is_the_incoming_one(device):
    """The same tensor: nothing is copied."""
    x, emb = torch.randn(2, 6, 3, 3, device=device), torch.randn(2, 6, device=device)
    y = triton_add(x.requires_grad_(), emb)
    upstream = torch.randn_like(y)
    assert torch.autograd.grad(y, x, upstream)[0].data_ptr() == upstream.data_ptr()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_sum_over_space_in_slices(dtype, channels_last, device, monkeypatch):
    """As on a GPU that the channels alone leave idle. Off zero, where fp16 sums would overflow."""
    monkeypatch.setattr("fastunet.kernels._launch.processors", lambda tensor: 16)
    x = torch.randn(1, 12, 60, 60, device=device).to(dtype)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    emb = torch.randn(1, 12, device=device).to(dtype)
    assert_gradients(
        triton_add, reference.add_time_embedding, x, emb,
        upstream=lambda y: (torch.randn_like(y) + 3).to(y),
    )  # fmt: skip


def test_every_run_gives_the_same_bits(device):
    x, emb = torch.randn(2, 30, 9, 9, device=device), torch.randn(2, 30, device=device)
    upstream = torch.randn_like(x)
    runs = []
    for _ in range(3):
        leaf = emb.clone().requires_grad_()
        y = triton_add(x, leaf)
        runs.append((y, *torch.autograd.grad(y, leaf, upstream)))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def test_gradcheck(device):
    if device != "cpu":
        pytest.skip("fp64 is for the interpreter")
    made = [torch.randn(s).double().requires_grad_() for s in ((2, 5, 3, 2), (2, 5))]
    assert torch.autograd.gradcheck(triton_add, made)


def test_positions_further_than_2_to_the_31_apart(device):
    """Lazily committed storage: only the pages that are touched exist."""
    storage = torch.empty(2**31 + 64, dtype=torch.float16, device=device)
    far = storage.as_strided((1, 8, 2, 1), (1, 1, 2**31, 1)).copy_(torch.randn(1, 8, 2, 1))
    emb = torch.randn(1, 8, device=device).half()
    found = []
    for x in (far, far.clone()):
        leaf = emb.clone().requires_grad_()
        y = triton_add(x, leaf)
        found.append((y, *torch.autograd.grad(y, leaf, x)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_empty_batch_gives_an_empty_result(backend, device):
    x, emb = (torch.empty(0, 6, *s, device=device, requires_grad=True) for s in ((3, 3), ()))
    y = kernels.add_time_embedding(x, emb, backend=backend)
    assert y.shape == x.shape
    assert torch.autograd.grad(y.sum(), emb)[0].shape == (0, 6)


@pytest.mark.parametrize(
    "change, error, text",
    [
        (dict(x=1), TypeError, "x must be a Tensor, got int"),
        (dict(x=torch.ones(3)), ValueError, r"x must have shape \[N, C, \*S\], got \[3\]"),
        (dict(emb=torch.ones(2, 7)), ValueError, r"emb must have shape \[2, 6\], got \[2, 7\]"),
        (dict(emb=torch.ones(1, 6)), ValueError, r"emb must have shape \[2, 6\], got \[1, 6\]"),
        (
            dict(emb=torch.ones(2, 6).double()),
            TypeError,
            r"emb dtype \(torch.float64\) must be x's",
        ),
        (dict(emb=torch.ones(2, 6, device="meta")), ValueError, r"emb device \(meta\) must equal"),
    ],
)
def test_bad_input(change, error, text):
    arguments = dict(x=torch.ones(2, 6, 3, 3), emb=torch.ones(2, 6)) | change
    for add in (kernels.add_time_embedding, reference.add_time_embedding):
        with pytest.raises(error, match=text):
            add(**arguments)


@pytest.mark.parametrize("flip_sin_to_cos", [False, True])
@pytest.mark.parametrize("shift", [0.0, 1.0])
@pytest.mark.parametrize("dim", [4, 7, 320])
def test_timestep_embedding_is_the_formula(dim, shift, flip_sin_to_cos):
    timesteps = torch.tensor([0, 1, 500, 999])
    emb = kernels.timestep_embedding(timesteps, dim, shift=shift, flip_sin_to_cos=flip_sin_to_cos)
    half = dim // 2
    for row, timestep in enumerate(timesteps.tolist()):
        for i in range(half):
            angle = timestep * 10000 ** (-i / (half - shift))
            first, second = math.sin(angle), math.cos(angle)
            if flip_sin_to_cos:
                first, second = second, first
            assert emb[row, i] == pytest.approx(first, abs=2e-4)
            assert emb[row, half + i] == pytest.approx(second, abs=2e-4)
    assert emb.dtype == torch.float32 and emb.shape == (4, dim)
    assert dim % 2 == 0 or not emb[:, -1].any()


@pytest.mark.parametrize("dim", [320, 7])
def test_timestep_embedding_is_ldms(dim):
    """CompVis ldm's, which is guided-diffusion's: cosines first, frequencies over half, the odd
    feature zero. The defaults are these.
    """
    timesteps, half = torch.tensor([0, 1, 500, 999]), dim // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
    angles = timesteps[:, None].float() * frequencies[None]
    expected = torch.cat([angles.cos(), angles.sin(), torch.zeros(4, dim % 2)], dim=-1)
    torch.testing.assert_close(kernels.timestep_embedding(timesteps, dim), expected, rtol=0, atol=0)


def test_timestep_embedding_is_diffusers_to_the_bit():
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    timesteps = torch.tensor([0.0, 3.0, 998.5])
    for flip in (False, True):
        for shift in (0.0, 1.0):
            expected = embeddings.get_timestep_embedding(
                timesteps, 320, flip_sin_to_cos=flip, downscale_freq_shift=shift
            )
            ours = kernels.timestep_embedding(timesteps, 320, flip_sin_to_cos=flip, shift=shift)
            assert torch.equal(ours, expected)


@pytest.mark.parametrize(
    "change, error, text",
    [
        (dict(timesteps=5), TypeError, "timesteps must be a Tensor, got int"),
        (dict(timesteps=torch.ones(2, 1)), ValueError, r"timesteps must have shape \[N\]"),
        (dict(timesteps=torch.ones(2).bool()), TypeError, "must be integers or real numbers"),
        (dict(timesteps=torch.tensor([float("nan")])), ValueError, "must be finite, got .nan."),
        (dict(timesteps=torch.tensor([float("inf")])), ValueError, "must be finite, got .inf."),
        (dict(dim=1), ValueError, r"dim \(1\) must be at least 2"),
        (dict(dim=8.0), TypeError, "dim must be an int, got float"),
        (dict(max_period=0), ValueError, r"max_period \(0\) must be finite and positive"),
        (dict(dim=8, shift=4), ValueError, r"shift \(4\) must be finite and differ from dim // 2"),
    ],
)
def test_timestep_embedding_bad_input(change, error, text):
    with pytest.raises(error, match=text):
        kernels.timestep_embedding(**(dict(timesteps=torch.ones(2), dim=8) | change))


def test_timestep_embedding_of_no_timesteps():
    assert kernels.timestep_embedding(torch.empty(0), 8).shape == (0, 8)
