"""What the Triton kernels are built of.

    launch.py            where kernels run, the one place that launches them, and compiling them without a GPU
    configurations.py    other sizes of tiles, by name and by card
    padded.py            the memory layout of maps: rows aligned to 16 bytes
    masks.py             which tokens of padded sequences are real
    fragments.py         neighbouring keys in one thread
    dot.py               small products, and their precision
    moments.py           mean and covariance of maps over heads

On a GPU Triton compiles the kernels; where TRITON_INTERPRET=1 was set before Triton was imported, its interpreter runs
the same code on CPU tensors, slowly, for tests.
"""
