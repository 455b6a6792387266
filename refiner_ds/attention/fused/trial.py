"""Do kernels give on this device what the lean way gives? Asked once a process before they are chosen unasked.

A compiler, a driver or a card that nobody has tried is no reason for a month of wrong training, or for none at all.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from refiner_ds.attention import lean
from refiner_ds.attention.norms import Norm
from refiner_ds.attention.weights import BottleneckWeights, DeferredMap, LinearWeights, LocalKernels

__all__ = ["fault"]

# Largest error of an output or a gradient, in the norm, against lean in fp32. Storing maps in bf16 explains a few
# hundredths, and activation gates that flip a tenth of some gradients.
ALLOWED = {torch.float32: 1e-2, torch.bfloat16: 0.2}

HEADS, RATIO, WIDTH = 12, 3, 32


def fault(kernels: ModuleType, device: torch.device, tokens: int = 50) -> str | None:
    """What is wrong with kernels on this device, as the end of "the kernels …", or ``None``.

    Args:
        kernels: the way "triton", or what should be tried in its place.
        tokens: of the two images that it is tried on.
    """
    truth = _results(lean, device, torch.float32, tokens)
    for dtype, allowed in ALLOWED.items():
        try:
            ours = _results(kernels, device, dtype, tokens)
        except Exception as error:  # compilers and drivers fail in more ways than can be listed
            return f"fail ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'})"
        errors = [((one - other).norm() / other.norm()).item() for one, other in zip(ours, truth, strict=True)]
        if not max(errors) <= allowed:
            return f"are {max(errors):.1%} off what lean gives"
    return None


@torch.inference_mode(False)
@torch.enable_grad()
def _results(backend: ModuleType, device: torch.device, dtype: torch.dtype, tokens: int) -> list[Tensor]:
    """Outputs and gradients of a map multiplied with and refined, and of a linear refiner; a bottleneck evaluating."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device).requires_grad_()

    wide = HEADS * RATIO
    vectors = [draw(2, HEADS, tokens, WIDTH) for _ in range(3)]
    expand_EH, kernel_E1kk, project_HE = draw(wide, HEADS), draw(wide, 1, 3, 3), draw(HEADS, wide)
    leaves, local = [*vectors, expand_EH, kernel_E1kk, project_HE], LocalKernels((kernel_E1kk,), "none", (1, 1))
    q_BHNd, k_BHNd, v_BHNd = (x.to(dtype) for x in vectors)
    scores = DeferredMap(q_BHNd, k_BHNd, WIDTH**-0.5)

    def bottleneck(training: bool) -> BottleneckWeights:
        first, second, third, last = (_norm(count, device, training) for count in (wide, wide, HEADS, HEADS))
        return BottleneckWeights(expand_EH, first, local, second, project_HE, third, last)

    attended_BHNd, map_BHNN = backend.attend(scores, v_BHNd, backend.make_map(scores))
    found = []
    for attn, refiner in (
        (map_BHNN, bottleneck(training=True)), (scores, LinearWeights(expand_EH, local, project_HE))
    ):  # fmt: skip
        out = backend.refine(attn, v_BHNd, refiner, 1.0, "activations").float() + attended_BHNd
        found += [out.detach(), *torch.autograd.grad(out.square().sum(), leaves, retain_graph=True)]
    with torch.no_grad():
        found.append(backend.refine(map_BHNN, v_BHNd, bottleneck(training=False), 1.0, "activations").float())
    return found


def _norm(count: int, device: torch.device, training: bool) -> Norm:
    ones, zeros = torch.ones(count, device=device), torch.zeros(count, device=device)
    return Norm(ones, zeros, zeros.clone(), ones.clone(), None, training)
