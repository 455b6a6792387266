"""The operators hold what PyTorch asks of operators, and a compiled step calls them instead of being shown through."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from refiner_ds import attention
from refiner_ds.attention import DeferredMap
from tests.attention.cases import SCALE, bottleneck, leaf, linear, maps
from tests.marks import long_where

# "triton" here is the interpreter's; on a GPU tests/attention/triton sees the compiled kernels.
BACKENDS = ["tiled", "triton"]


def arguments(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Maps, queries, keys and values that require gradients; values as a slice of a projection."""
    qkv = torch.randn(2, 5, 3, 3, 4).to(dtype).permute(2, 0, 3, 1, 4)
    q, k, v = (x.detach().requires_grad_() for x in qkv)
    return {"q": q, "k": k, "value": v, "map": maps(2, 3, 5).detach().to(dtype).requires_grad_()}


def interpreted(backend: str) -> None:
    if backend == "triton":
        launch = pytest.importorskip("refiner_ds.attention.kernels.launch", exc_type=ImportError)
        if not launch.INTERPRETED:
            pytest.skip("kernels are compiled in this process")


def single(x: Tensor) -> Tensor:
    return x.detach().float().requires_grad_()


def calls(backend: str) -> dict[str, tuple]:
    """Arguments of each operator."""
    a = arguments()
    weights, paper = bottleneck(3, 2), linear(3, 2)
    norms = weights.norm1_E, weights.norm2_E, weights.norm3_H, weights.adapt_H
    affines = [single(x) for norm in norms for x in (norm.weight, norm.bias)]
    three = [single(x) for x in (weights.expand_EH, weights.local.kernels[0], weights.reduce_HE)]
    common = backend, SCALE, [1e-5] * 4, a["map"], a["value"], *three, affines
    mask = torch.arange(5) < torch.tensor([[5], [3]])
    plain = [x.detach() for x in (a["map"], a["value"])]
    small = [torch.randn(size) for size in (6, 6, 3, 3)]
    found: dict[str, tuple] = {
        "make_map": (backend, a["q"], a["k"], a["map"], SCALE, 0.0, 0, None),
        "make_map masked": (backend, a["q"], a["k"], None, SCALE, 0.0, 0, mask),
        "refine_bottleneck": (*common, None, False),
        "refine_folded": (
            backend, *plain, three[0].detach(), small[0], three[1].detach(), small[1], three[2].detach(), *small[2:],
            None,
        ),
        "refine_bottleneck masked": (*common, mask, True),
    }  # fmt: skip
    found["refine_folded masked"] = (*found["refine_folded"][:-1], mask)
    if backend == "tiled":
        found["refine_bottleneck saving activations"] = (*common, None, True)
        found["make_map dropping"] = (backend, a["q"], a["k"], None, SCALE, 0.5, 7, None)
        kernel, expand, reduce = (single(x) for x in (paper.local.kernels[0], paper.expand_EH, paper.reduce_HE))
        found["refine_linear in steps"] = (backend, 1.0, a["value"], kernel, expand, reduce, [a["q"], a["k"]], None)
        found["refine_linear without reduction"] = (backend, 1.0, a["value"], kernel, expand, None, [a["map"]], None)
    dense = single(torch.randn(3, 3, 3, 3))
    found["refine_linear"] = (backend, SCALE, a["value"], dense, None, None, [a["q"], a["k"]], None)
    found["refine_linear masked"] = (backend, SCALE, a["value"], dense, None, None, [a["q"], a["k"]], mask)
    if backend == "triton":
        found["refine_linear of a map"] = (backend, 1.0, a["value"], dense, None, None, [a["map"]], None)
        found["attend"] = (a["q"], a["k"], a["value"], a["map"], SCALE, 0.0, 0, None)
        found["attend masked"] = (a["q"], a["k"], a["value"], a["map"], SCALE, 0.0, 0, mask)
    return found


NAMES = [(backend, name) for backend in BACKENDS for name in calls(backend)]


@pytest.mark.parametrize(
    ("backend", "name"), long_where(lambda backend, name: backend == "triton" and " " in name, NAMES)
)
def test_opcheck_finds_nothing(backend, name):
    interpreted(backend)
    operator = getattr(torch.ops.refiner_ds, name.split()[0]).default
    found = torch.library.opcheck(operator, calls(backend)[name], rtol=1e-4, atol=1e-4)
    assert set(found.values()) == {"SUCCESS"} and len(found) == 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_fake_tensors_have_the_dtype_and_shape_of_real_ones(backend):
    interpreted(backend)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        q, k, v = (torch.empty(2, 3, 5, 4, dtype=torch.bfloat16) for _ in range(3))
        out, made = attention.attend(DeferredMap(q, k, SCALE), v, backend=backend)
    assert out.shape == (2, 3, 5, 4) and made.shape == (2, 3, 5, 5)
    assert out.dtype == made.dtype == torch.bfloat16


def step(x: Tensor, weights, paper, backend: str, checkpointed: bool) -> Tensor:
    """A map made, refined by a bottleneck, and a linear refiner."""

    def block(x: Tensor) -> Tensor:
        q, k, v = x.sin(), x.cos(), x * 2
        out, made = attention.attend(DeferredMap(q, k, SCALE), v, backend=backend)
        out = out + attention.refine(made, v, weights, SCALE, backend=backend)
        return out + attention.refine(DeferredMap(q, k, SCALE), v, paper, backend=backend)

    if checkpointed:
        return torch.utils.checkpoint.checkpoint(attention.recompute_aware(block), x, use_reentrant=False)
    return block(x)


# Under a checkpoint backward runs forward again: its code is generated, or interpreted, with that of both.
COMPILED = [
    ("tiled", "aot_eager", False),
    ("tiled", "inductor", True),
    ("triton", "aot_eager", False),
    ("triton", "aot_eager", True),
]


@pytest.mark.parametrize(
    ("backend", "compiler", "checkpointed"), long_where(lambda *case: case == ("triton", "aot_eager", True), COMPILED)
)
def test_a_compiled_training_step_equals_the_eager_one_without_a_break(backend, compiler, checkpointed):
    interpreted(backend)
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        weights, paper = (in_single(make(3, 2)) for make in (bottleneck, linear))
        x = leaf(2, 3, 5, 4, dtype=torch.float32)
        run = torch.compile(step, backend=compiler, fullgraph=True) if compiled else step
        torch._dynamo.reset()
        out = run(x, weights, paper, backend, checkpointed)
        out.square().sum().backward()
        grads = [x.grad, paper.expand_EH.grad, weights.expand_EH.grad, weights.norm2_E.weight.grad]
        norms = weights.norm1_E, weights.adapt_H
        statistics = [y for norm in norms for y in (norm.running_mean, norm.running_var, norm.batches.float())]
        results.append([out.detach(), *grads, *statistics])
    for kind, found in zip(("eager", "compiled"), results, strict=True):
        assert all(x.isfinite().all() for x in found), (
            f"{kind}: {[int((~x.isfinite()).sum()) for x in found]} not finite"
        )
    for ours, truth in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-3, atol=1e-4)
    assert results[1][-1] == 1


def in_single(part):
    """A named tuple's floating tensors in fp32, leaves as leaves."""
    if isinstance(part, Tensor):
        return (
            part.detach()
            .to(torch.float32 if part.is_floating_point() else part.dtype)
            .requires_grad_(part.requires_grad)
        )
    if not isinstance(part, tuple):
        return part
    made = [in_single(inner) for inner in part]
    return type(part)(*made) if hasattr(part, "_fields") else tuple(made)


def test_an_exported_program_calls_the_operators():
    class Layer(torch.nn.Module):
        def forward(self, attn: Tensor, value: Tensor) -> Tensor:
            return attention.refine(attn, value, paper, SCALE, backend="tiled")

    paper = in_single(linear(3, 2))
    paper = paper._replace(expand_EH=paper.expand_EH.detach(), reduce_HE=paper.reduce_HE.detach())
    paper = paper._replace(local=paper.local._replace(kernels=(paper.local.kernels[0].detach(),)))
    inputs = torch.rand(2, 3, 5, 5), torch.randn(2, 3, 5, 4)
    exported = torch.export.export(Layer(), inputs)
    targets = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert "refiner_ds.refine_linear.default" in targets
    torch.testing.assert_close(exported.module()(*inputs), Layer()(*inputs))
