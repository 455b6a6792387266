"""Ratios measured side by side in one run: ``python -m refiner_ds.benchmark model``.

__main__.py    which benchmark
model.py       a released model under every backend, beside a vanilla ViT of its size and DeiT-S
attention.py   one layer of refined attention under every backend
kernels.py     each Triton kernel: bytes and time on a GPU, registers without one
loader.py      the data loader beside PIL and torchvision
gpu.py         all of it and more in one report, each part (gpu_parts.py) in a process of its own (running.py)
selfcheck.py   do the kernels agree with the tiled backend here
measure.py     time and memory of a step      traffic.py   bytes that a step moves
"""
