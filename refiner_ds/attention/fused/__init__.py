"""Refined attention in Triton kernels: on a GPU no expanded map outlives a layer, and most are never written.

    ways.py          what fused knows, and who computes it     trial.py   whether it gives here what lean gives
    launching.py     where kernels can run, how they are launched, and what compiling them says without a GPU
    tools.py         what kernels share: products and clips    spans.py   neighbouring keys in one thread

    maps.py          queries and keys to maps, and back
    moments.py       mean and covariance of maps over heads
    bottleneck.py    the released refiner in training: bottleneck_forward.py, _backward.py and _backward_first.py
    inference.py     the released refiner with its norms folded: bottleneck_narrow.py
    linear.py        the paper's refiner as one convolution: linear_forward.py, linear_backward.py, linear_tiles.py

On a GPU Triton compiles the kernels; where TRITON_INTERPRET=1 was set before Triton was imported, its interpreter runs
the same code on CPU tensors, slowly, for tests.
"""
