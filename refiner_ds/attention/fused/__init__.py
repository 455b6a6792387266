"""Refined attention in Triton kernels: on a GPU no expanded map outlives a layer, and most are never written.

    launching.py   where kernels can run, how they are launched, and what compiling them says without a GPU
    tools.py       what kernels share: products, clips, loads of map tiles
    maps.py        queries and keys to maps, and back
    moments.py     mean and covariance of maps over heads
    linear.py      the paper's refiner: linear_forward.py and linear_backward.py, on the tiles of linear_tiles.py

On a GPU Triton compiles the kernels; where TRITON_INTERPRET=1 was set before Triton was imported, its interpreter runs
the same code on CPU tensors, slowly, for tests.
"""
