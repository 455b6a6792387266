"""Has Triton's compiler read every kernel, and prints which it read and which variables their loops lose, as JSON.

A variable that a loop assigns goes from step to step only if the compiler sees it change; one that takes the offset of
another, both of which began as the same value, is forgotten without a word. Python, and so the interpreter, does not.
"""

from __future__ import annotations

import json
from itertools import product

import torch
from triton.compiler import code_generator
from triton.compiler.code_generator import CodeGenerator, _is_triton_value

from refiner_ds import attention
from refiner_ds.attention.kernels import launch
from refiner_ds.benchmark.attention import Layer, Setting
from refiner_ds.benchmark.kernels import run_step

find_carries, set_value, read = CodeGenerator._find_carries, CodeGenerator.set_value, code_generator.ast_to_ttir
run = launch._run
kernels: set[str] = set()
lost: set[str] = set()


class Enough(Exception):
    """The source was read; nothing more is wanted."""


def noting_carries(self, node, liveins, ignore=frozenset()):
    """Triton's own, and what it leaves out of the variables that the loop assigned."""
    around, self.assigned = getattr(self, "assigned", None), set()
    carried = find_carries(self, node, liveins, ignore)
    for name in self.assigned & liveins.keys() - set(carried[0]) - set(ignore):
        if _is_triton_value(liveins[name]):
            lost.add(f"{self.function_name}: {name}")
    self.assigned = around
    return carried


def noting_assignments(self, name, value):
    """Triton's own."""
    if getattr(self, "assigned", None) is not None:
        self.assigned.add(name)
    set_value(self, name, value)


def reading_only(*args, **options):
    """Triton's own, and then no more."""
    read(*args, **options)
    raise Enough


def running_nothing(kernel, grid, args, options):
    """As ``launch._run``, up to where the source is read."""
    kernels.add(kernel.__name__)
    try:
        run(kernel, grid, args, options)
    except Enough:
        pass


CodeGenerator._find_carries, CodeGenerator.set_value = noting_carries, noting_assignments
code_generator.ast_to_ttir, launch._run = reading_only, running_nothing
with launch.compile_only(90):
    for dtype in (torch.bfloat16, torch.float32):
        layer = Layer(Setting(2, 12, 32, 3, "cpu"), 50)
        for case in ("map", "bottleneck", "linear"):
            for training, padded in product((True, False), (True, False)):
                run_step(layer, case, dtype, training, padded)
        attn = torch.rand(1, 12, 50, 50, dtype=dtype).requires_grad_()
        layer.train()
        out = attention.refine(attn, layer.inputs[0][:1].to(dtype), layer.refiner("bottleneck"), 1.0, "triton", "map")
        out.sum().backward()
print(json.dumps({"kernels": sorted(kernels), "lost": sorted(lost)}))
