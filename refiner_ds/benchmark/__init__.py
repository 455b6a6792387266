"""Ratios measured side by side in one run: ``python -m refiner_ds.benchmark model``.

__main__.py   which benchmark        measure.py  time and memory of a step
model.py      released S beside its plain twin and DeiT-S      traffic.py  bytes that a step moves
attention.py  each way of computing refined attention, beside the others
loader.py     what a training sample costs               scale.py    opening sets of up to a billion samples
"""
