"""The smallest sizes compute, and what cannot be computed is refused in one sentence, on every backend."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from refiner_ds import attention
from refiner_ds.attention import DeferredMap, LinearWeights, LocalKernels
from tests.attention.cases import (
    SCALE,
    bottleneck,
    forward_and_backward,
    leaf,
    leaves,
    linear,
    maps,
    norms_of,
    restore,
    scores,
    statistics,
)

BACKENDS = ["eager", "tiled"]


def interprets_kernels() -> bool:
    try:
        from refiner_ds.attention.kernels import launch
    except ImportError:
        return False
    return launch.INTERPRETED


def assert_same(ours: list[Tensor], truth: list[Tensor]) -> None:
    """Equal to float64's rounding; some gradients are zero but for it."""
    for one, other in zip(ours, truth, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    ("batch", "heads", "tokens", "ratio", "kernel_size"),
    [size for size in product((1, 2), (1, 2), (1, 2, 3), (1, 2), (1, 3, 5)) if size[0] * size[2] > 1],
)
def test_the_smallest_sizes_train_and_evaluate_as_eager(batch, heads, tokens, ratio, kernel_size):
    attn, value = maps(batch, heads, tokens), leaf(batch, heads, tokens, 1)
    weights, pair = bottleneck(heads, ratio, kernel_size), scores(batch, heads, tokens, 1)
    before, direction = statistics(weights), torch.randn_like(value)
    truth = forward_and_backward(attn, value, weights, "eager", direction)
    for saved in ("map", "activations"):
        restore(weights, before)
        assert_same(forward_and_backward(attn, value, weights, "tiled", direction, save_for_backward=saved), truth)
    for parts in ({}, {"reduce": False}, {"expand": False}):
        paper = linear(heads, ratio, kernel_size, **parts)
        maps_out = len(paper.local.kernels[0]) if paper.reduce_HE is None else heads
        direction = torch.randn(batch, maps_out, tokens, 1).double()
        ours, exact = (forward_and_backward(pair, value, paper, name, direction) for name in ("tiled", "eager"))
        assert_same(ours, exact)
    with torch.no_grad():
        weights = bottleneck(heads, ratio, kernel_size, training=False)
        found = [attention.refine(attn, value, weights, SCALE, backend=name) for name in ("tiled", "eager")]
    assert_same(found[:1], found[1:])


@pytest.mark.parametrize("backend", [*BACKENDS, "triton"])
@pytest.mark.parametrize("make", [bottleneck, linear])
def test_an_empty_batch_gives_nothing_and_leaves_running_statistics_alone(make, backend):
    if backend == "triton" and not interprets_kernels():
        pytest.skip("there is no Triton, or kernels are compiled in this process")
    weights, value = make(3, 2), leaf(0, 3, 5, 4)
    before = statistics(weights) if make is bottleneck else []
    for attn in (maps(0, 3, 5), scores(0, 3, 5)):
        out = attention.refine(attn, value, weights, SCALE, backend=backend)
        assert out.shape == (0, 3, 5, 4)
        grads = torch.autograd.grad(out.sum(), leaves(attn, value, weights))
        assert all((grad == 0).all() for grad in grads)
    out, made = attention.attend(scores(0, 3, 5), value, backend=backend)
    assert out.shape == (0, 3, 5, 4) and made.shape == (0, 3, 5, 5)
    if make is bottleneck:
        assert all(torch.equal(*pair) for pair in zip(statistics(weights), before, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_norms_on_a_single_entry_is_refused(backend):
    sentence = "^norm1 cannot train on 1 image of 1 token: a variance needs more than one entry of a map$"
    weights = bottleneck(2, 2)
    with pytest.raises(ValueError, match=sentence):
        attention.refine(maps(1, 2, 1), leaf(1, 2, 1, 4), weights, backend=backend)
    assert [norm.batches.item() for norm in norms_of(weights)] == [0] * 4


def with_kernels(*shapes: tuple[int, ...], constraint: str = "none", grid: tuple[int, int] = (1, 1)) -> LinearWeights:
    kernels = tuple(torch.randn(shape).double() for shape in shapes)
    return linear(3, 2)._replace(local=LocalKernels(kernels, constraint, grid))


def with_norm3_of(maps_: int):
    weights = bottleneck(3, 2)
    return weights._replace(norm3_H=bottleneck(maps_, 2).norm3_H)


VALUE = torch.randn(2, 3, 5, 4).double()
ATTN = torch.rand(2, 3, 5, 5).double()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("attn", "value", "weights", "sentence"),
    [
        (ATTN[..., :4], VALUE, None, r"attn has shape \[2, 3, 5, 4\]; beside these values it must be \[2, 3, 5, 5\]"),
        (ATTN[:, :2], VALUE, None, r"attn has shape \[2, 2, 5, 5\]; beside these values it must be \[2, 3, 5, 5\]"),
        (ATTN, VALUE[0], None, r"value has shape \[3, 5, 4\]; it must be \[B, H, N, d\], at least 1 but for B"),
        (ATTN, VALUE[..., :0], None, r"value has shape \[2, 3, 5, 0\]; it must be \[B, H, N, d\], at least 1"),
        (ATTN, VALUE.long(), None, "value is int64; it must be a floating dtype"),
        (ATTN.to("meta"), VALUE, None, "attn is on meta, but value on cpu; both must be on one device"),
        (DeferredMap(VALUE, VALUE[..., :3], 1.0), VALUE, None, r"k has shape .*; like q it must be \[2, 3, 5, 4\]"),
        (DeferredMap(VALUE[:1], VALUE, 1.0), VALUE, None, r"q has shape .*; .* it must be \[2, 3, 5, d\]"),
        (DeferredMap(VALUE, VALUE, 1.0, -0.5), VALUE, None, "dropout is -0.5; it must be between 0 and 1"),
        (DeferredMap(VALUE, VALUE, 1.0, 1.5), VALUE, None, "dropout is 1.5; it must be between 0 and 1"),
        (ATTN, VALUE, linear(2, 2), r"expand has shape \[4, 2\]; for 3 heads it must be \[4, 3\]"),
        (ATTN, VALUE, linear(3, 2)._replace(reduce_HE=torch.ones(3, 5)), r"reduce has shape \[3, 5\]; .* \[3, 6\]"),
        (ATTN, VALUE, bottleneck(2, 2), r"expand has shape \[4, 2\]; for 3 heads it must be \[4, 3\]"),
        (ATTN, VALUE, with_norm3_of(2), r"norm3.weight has shape \[2\]; for 3 maps it must be \[3\]"),
        (ATTN, VALUE, with_kernels((6, 1, 2, 2)), "kernel_size is 2; it must be odd, such as 1, 3 or 5"),
        (ATTN, VALUE, with_kernels((6, 1, 3, 1)), r"kernel 'plane' has shape \[6, 1, 3, 1\]; .* \[6, 1, 3, 3\]"),
        (ATTN, VALUE, with_kernels((5, 1, 3, 3)), r"kernel 'plane' has shape \[5, 1, 3, 3\]; .* \[6, 1, 3, 3\]"),
        (ATTN, VALUE, with_kernels((6, 1, 3, 3), constraint="spatial"), "constraint 'spatial' has 2 kernels, not 1"),
        (ATTN, VALUE, with_kernels((6, 1, 3, 3), constraint="ring"), "constraint is 'ring'; it must be one of none"),
        (
            ATTN, VALUE, with_kernels((6, 1, 3, 3), (6, 1, 3, 3), constraint="spatial", grid=(2, 3)),
            "grid is 2x3; its cells must be some of the 5 tokens",
        ),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit_are_refused_in_one_sentence(attn, value, weights, sentence, backend):
    with pytest.raises(ValueError, match=f"^{sentence}"):
        attention.refine(attn, value, weights or linear(3, 2), backend=backend)


def test_a_residual_map_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"^residual has shape \[2, 3, 5, 4\]; beside these values it must be"):
        attention.attend(DeferredMap(VALUE, VALUE, 1.0), VALUE, ATTN[..., :4])


def outputs(backend: str, training: bool = True):
    """Calls of every operation, as functions of one leaf that each depends on."""
    attn, pair, value = maps(2, 3, 5), scores(2, 3, 5), leaf(2, 3, 5, 4)
    return [
        (value, lambda v: attention.refine(attn, v, bottleneck_weights, SCALE, backend=backend)),
        (attn, lambda a: attention.refine(a, value, bottleneck_weights, SCALE, backend=backend)),
        (pair.q_BHNd, lambda q: attention.refine(pair._replace(q_BHNd=q), value, linear_weights, backend=backend)),
        (pair.k_BHNd, lambda k: attention.attend(pair._replace(k_BHNd=k), value, attn, backend=backend)[0]),
    ]


bottleneck_weights, linear_weights = bottleneck(3, 2), linear(3, 2)


@pytest.mark.parametrize("which", range(4))
def test_second_derivatives_are_eagers_and_refused_elsewhere(which):
    """Of a plain sum too, where the incoming gradient requires none."""
    for backend in [*BACKENDS, "triton"] if interprets_kernels() else BACKENDS:
        x, compute = outputs(backend)[which]
        (gradient,) = torch.autograd.grad(compute(x).sum() + compute(x).square().sum(), x, create_graph=True)
        if backend == "eager":
            assert torch.autograd.grad(gradient.square().sum(), x)[0].isfinite().all()
            continue
        with pytest.raises(RuntimeError, match="^second derivatives need REFINER_ATTENTION=eager"):
            torch.autograd.grad(gradient.square().sum(), x)
        (gradient,) = torch.autograd.grad(compute(x).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="^second derivatives need REFINER_ATTENTION=eager"):
            gradient.sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_transforms_of_torch_func_are_computed_by_eager(backend, caplog):
    pair, value = scores(2, 3, 5), leaf(2, 3, 5, 4)

    def loss(q: Tensor) -> Tensor:
        return attention.refine(pair._replace(q_BHNd=q), value, linear_weights, backend=backend).square().sum()

    (truth,) = torch.autograd.grad(loss(pair.q_BHNd), pair.q_BHNd)
    torch.testing.assert_close(torch.func.grad(loss)(pair.q_BHNd), truth)

    def one(q: Tensor, v: Tensor) -> Tensor:
        return attention.attend(DeferredMap(q[None], q[None], SCALE), v[None], backend=backend)[0][0]

    whole = attention.attend(DeferredMap(pair.q_BHNd, pair.q_BHNd, SCALE), value, backend=backend)[0]
    torch.testing.assert_close(torch.func.vmap(one)(pair.q_BHNd, value), whole)
    direction = torch.randn_like(truth)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(loss(forward_ad.make_dual(pair.q_BHNd.detach(), direction))).tangent
    torch.testing.assert_close(tangent, (truth * direction).sum())


def test_plain_attention_has_forward_derivatives_and_second_ones_by_pytorchs_plain_operators():
    q, k, value = (torch.randn(2, 3, 5, 4).requires_grad_() for _ in range(3))  # fp32: the fused kernels take it

    def out(q: Tensor) -> Tensor:
        return attention.plain_attention(DeferredMap(q, k.to(q.dtype), SCALE), value.to(q.dtype)).square().sum()

    (truth,) = torch.autograd.grad(out(q), q)
    direction = torch.randn_like(truth)
    slope = torch.func.jvp(out, (q.detach(),), (direction,))[1]
    torch.testing.assert_close(slope, (truth * direction).sum(), rtol=1e-4, atol=1e-5)
    with sdpa_kernel(SDPBackend.MATH):
        (gradient,) = torch.autograd.grad(out(q), q, create_graph=True)
        torch.testing.assert_close(gradient, truth, rtol=1e-4, atol=1e-5)
        (seconds,) = torch.autograd.grad((gradient * direction).sum(), q)
    exact, step = q.detach().double(), 1e-3 * direction.double()
    curvature = (out(exact + step) - 2 * out(exact) + out(exact - step)) / 1e-6
    torch.testing.assert_close((seconds * direction).sum().double(), curvature, rtol=1e-3, atol=1e-3)


def test_plain_attention_is_pytorchs_fused_one_whatever_backend_is_asked_for():
    deferred, value = (
        DeferredMap(*(torch.randn(2, 3, 5, 4).requires_grad_() for _ in range(2)), SCALE),
        leaf(2, 3, 5, 4),
    )
    fused = F.scaled_dot_product_attention(deferred.q_BHNd, deferred.k_BHNd, value.float())
    for backend in BACKENDS:
        with attention.attention_backend(backend):
            out = attention.plain_attention(deferred, value.float())
        assert out.grad_fn is not None and out.grad_fn.name() == fused.grad_fn.name()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("constraint", ["none", "spatial", "row+col"])
def test_an_empty_batch_passes_every_constraint(backend, constraint):
    shapes = {"none": [(3, 3)], "spatial": [(3, 3)] * 2, "row+col": [(1, 3), (3, 1)] * 2}[constraint]
    weights = with_kernels(*[(6, 1, *shape) for shape in shapes], constraint=constraint, grid=(2, 2))
    assert attention.refine(maps(0, 3, 5), leaf(0, 3, 5, 4), weights, backend=backend).shape == (0, 3, 5, 4)


@pytest.mark.filterwarnings("ignore")
def test_tracing_records_eager_and_the_legacy_onnx_exporter_is_refused(tmp_path):
    class Layer(torch.nn.Module):
        def forward(self, attn: Tensor, value: Tensor) -> Tensor:
            return attention.refine(attn, value, weights, SCALE)

    inputs = maps(2, 3, 5).detach(), leaf(2, 3, 5, 4).detach()
    with torch.no_grad():
        weights = attention.fold_refiner(bottleneck(3, 2, training=False), SCALE)
        folded_kernel = weights.local.kernels[0].detach()
        weights = weights._replace(local=weights.local._replace(kernels=(folded_kernel,)))
        traced = torch.jit.trace(Layer(), inputs)
        torch.testing.assert_close(traced(*inputs), Layer()(*inputs))
        with pytest.raises(RuntimeError, match=r"^the legacy ONNX exporter is not supported; call .*dynamo=True\)$"):
            torch.onnx.export(Layer(), inputs, tmp_path / "layer.onnx", dynamo=False)
