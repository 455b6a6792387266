"""Do the kernels agree with the tiled backend on this device? Checked once a process before they become the default.

A compiler, a driver or a card that nobody has tried must neither train wrongly for a month nor stop a run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from refiner_ds.attention.backends import Backend
from refiner_ds.attention.backends.tiled import TiledBackend
from refiner_ds.attention.norms import Norm
from refiner_ds.attention.weights import BottleneckWeights, Case, DeferredMap, LinearWeights, LocalKernels

__all__ = ["mismatch"]

# Largest relative error of an output or a gradient, in the Euclidean norm, against tiled in fp32. Storing maps in bf16
# explains a few hundredths, and relu6 gates that flip a tenth of some gradients.
ALLOWED = {torch.float32: 1e-2, torch.bfloat16: 0.2}

HEADS, RATIO, WIDTH = 12, 3, 32


def mismatch(kernels: Backend, device: torch.device, tokens: int = 50) -> str | None:
    """What is wrong with the kernels on this device, as the end of "the kernels …", or ``None``.

    Args:
        kernels: the backend to check.
        tokens: of the two images to check it on.
    """
    truth = _results(TiledBackend(), device, torch.float32, tokens)
    for dtype, allowed in ALLOWED.items():
        try:
            ours = _results(kernels, device, dtype, tokens)
        except Exception as error:  # compilers and drivers fail in more ways than can be listed
            return f"fail ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'})"
        errors = [((one - other).norm() / other.norm()).item() for one, other in zip(ours, truth, strict=True)]
        if not max(errors) <= allowed:
            return f"differ by {max(errors):.1%} from the tiled backend"
    return None


@torch.inference_mode(False)
@torch.enable_grad()
def _results(backend: Backend, device: torch.device, dtype: torch.dtype, tokens: int) -> list[Tensor]:
    """Outputs and gradients of a bottleneck and a linear refiner in training; the output of a bottleneck evaluating."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device).requires_grad_()

    expanded = HEADS * RATIO
    vectors = [draw(2, HEADS, tokens, WIDTH) for _ in range(3)]
    expand_EH, kernel_E1kk, reduce_HE = draw(expanded, HEADS), draw(expanded, 1, 3, 3), draw(HEADS, expanded)
    leaves, local = [*vectors, expand_EH, kernel_E1kk, reduce_HE], LocalKernels((kernel_E1kk,), "none", (1, 1))
    q_BHNd, k_BHNd, v_BHNd = (x.to(dtype) for x in vectors)
    deferred = DeferredMap(q_BHNd, k_BHNd, WIDTH**-0.5)

    def bottleneck(training: bool) -> BottleneckWeights:
        first, second, third, last = (_norm(count, device, training) for count in (expanded, expanded, HEADS, HEADS))
        return BottleneckWeights(expand_EH, first, local, second, reduce_HE, third, last)

    attended_BHNd, map_BHNN = backend.attend(deferred, v_BHNd, backend.make_map(deferred))
    found = []
    linear = LinearWeights(expand_EH, local, reduce_HE)
    for case in (Case(map_BHNN, v_BHNd, bottleneck(training=True)), Case(deferred, v_BHNd, linear)):
        out = backend.refine(case, 1.0, "activations").float() + attended_BHNd
        found += [out.detach(), *torch.autograd.grad(out.square().sum(), leaves, retain_graph=True)]
    with torch.no_grad():
        found.append(backend.refine(Case(map_BHNN, v_BHNd, bottleneck(training=False)), 1.0, "map").float())
    return found


def _norm(count: int, device: torch.device, training: bool) -> Norm:
    ones, zeros = torch.ones(count, device=device), torch.zeros(count, device=device)
    return Norm(ones, zeros, zeros.clone(), ones.clone(), None, training)
