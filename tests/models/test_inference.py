"""For inference: folded norms change nothing, ONNX exports run elsewhere, compiled steps compute the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from refiner_ds.models import NO_BOX
from tests.models import golden
from tests.models.small import BOX, VARIANTS, pictures, small_model


def seasoned(**options) -> nn.Module:
    """A model whose norms and scales are far from their initial values, as after training."""
    model = small_model(**options)
    for name, value in model.state_dict().items():
        if "running_var" in name or "scale_channel" in name or ("bn" in name and name.endswith("weight")):
            value.uniform_(0.5, 1.5)
        elif "running_mean" in name or ("bn" in name and name.endswith("bias")):
            value.uniform_(-0.2, 0.2)
    return model.eval()


@pytest.mark.parametrize("variant", VARIANTS)
def test_fused_equals_unfused(variant):
    model = seasoned(**VARIANTS[variant])
    truth = model(pictures())
    fused = model.fuse()
    assert golden.relative_error(fused(pictures()), truth) < 1e-5
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    assert not any("scale_channel" in name for name, _ in fused.named_parameters())
    again = fused(pictures())
    assert torch.equal(fused.fuse()(pictures()), again)


@pytest.mark.parametrize("constraint", ["spatial", "row+col"])
def test_a_bottleneck_under_a_constraint_folds_too(constraint):
    model = seasoned(layout="released", refiner="bottleneck", constraint=constraint)
    truth = model(pictures())
    assert golden.relative_error(model.fuse()(pictures()), truth) < 1e-5


def test_a_fused_model_refuses_to_train():
    model = small_model(**VARIANTS["released"]).fuse()
    with pytest.raises(ValueError, match="^a fused model has no norms left to train; create the model again"):
        model.train()
    assert not model.eval().training


def test_golden_logits_survive_fusing():
    logits = golden.golden_model().fuse()(golden.tensor("input"))
    assert golden.relative_error(logits, golden.tensor("eval_logits")) < 1e-4


def test_fused_half_precision_models_still_agree():
    model = golden.golden_model().eval()
    truth = model(golden.tensor("input"))
    logits = model.fuse().bfloat16()(golden.tensor("input"))
    assert ((logits.float() - truth).norm() / truth.norm()).item() < 0.02


@pytest.mark.long  # exports of small models are in tests/commands/test_export.py
def test_fused_s_exports_to_onnx_and_runs_in_onnxruntime(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    model = timm.create_model("refiner_vit_s", init_values=0.5).fuse()
    x = torch.randn(1, 3, 224, 224)
    path = tmp_path / "refiner_vit_s.onnx"
    torch.onnx.export(model, (x,), path, dynamo=True, input_names=["image"], output_names=["logits"])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"image": x.numpy()})
    with torch.no_grad():
        truth = model(x).numpy()
    assert np.abs(truth).max() > 0.1
    np.testing.assert_allclose(logits, truth, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_compiled_training_and_evaluation_steps_compute_the_same():
    """Training is traced, decomposed and partitioned as for inductor, which would write and compile fifty kernels more:
    evaluation's, and those of a training step of the operators (tests/attention/test_operators.py), see its code."""
    options = {**VARIANTS["released"], "depth": 2}
    eager, model = small_model(**options), small_model(**options)
    compiled: Any = torch.compile(model, backend="aot_eager_decomp_partition")
    for one in (eager, compiled):
        class_logits, patch_logits, box = one.train()(pictures(), BOX)
        assert box == BOX
        (class_logits.square().mean() + patch_logits.square().mean()).backward()
    largest = max(parameter.grad.abs().max().item() for parameter in eager.parameters())
    for (name, ours), (_, theirs) in zip(model.named_parameters(), eager.named_parameters(), strict=True):
        scale = max(theirs.grad.abs().max().item(), 1e-3 * largest)  # some gradients are all but rounding
        assert (ours.grad - theirs.grad).abs().max().item() < 1e-3 * scale, name
    for (name, buffer), (_, expected) in zip(model.named_buffers(), eager.named_buffers(), strict=True):
        torch.testing.assert_close(buffer, expected, rtol=1e-4, atol=1e-5, msg=name)
    with torch.no_grad():
        generated: Any = torch.compile(model.eval())
        assert golden.relative_error(generated(pictures()), eager.eval()(pictures())) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("released", {}),
        ("released", {"cos_reg": 0.1}),
        pytest.param("released", {"return_dense": False}, marks=pytest.mark.long),
        ("paper", {"cos_reg": 0.1}),
    ],
    ids=["released", "cos-reg", "class head", "paper"],
)
def test_training_and_evaluation_compile_into_one_graph_each(variant, options):
    torch._dynamo.reset()
    model = small_model(**{**VARIANTS[variant], "depth": 2}, **options)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        model.train()
        outputs = compiled(pictures(), None if model.return_dense is False else BOX)
        if options.get("cos_reg"):
            assert 0 < model.cos_reg_loss() <= 0.1 + 1e-6
        assert (outputs if isinstance(outputs, torch.Tensor) else outputs[0]).shape == (4, 5)
        model.eval()
        assert compiled(pictures()).shape == (4, 5)


def test_a_new_box_does_not_compile_the_step_again_if_it_is_a_tensor():
    torch._dynamo.reset()
    counts = torch._dynamo.utils.counters["stats"]
    before = counts["unique_graphs"]
    model, plain = (small_model(**{**VARIANTS["released"], "depth": 2}).train() for _ in range(2))
    step = torch.compile(model, backend="eager", fullgraph=True)
    for box in (BOX, (0, 1, 2, 3), (1, 0, 4, 3), (2, 2, 2, 2), (0, 0, 0, 0), (0, 0, 4, 4)):
        class_logits, patch_logits, used = step(pictures(), torch.tensor(box))
        truth = plain(pictures(), box)
        assert tuple(used.tolist()) == box
        torch.testing.assert_close((class_logits, patch_logits), truth[:2], rtol=1e-4, atol=1e-5)
    assert counts["unique_graphs"] == before + 1


def test_of_four_numbers_a_new_box_compiles_the_step_again_until_each_has_changed():
    compiled_graphs = []

    def counting_backend(graph, inputs):
        compiled_graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    step = torch.compile(small_model(**{**VARIANTS["released"], "depth": 2}).train(), backend=counting_backend)
    for box in (BOX, (0, 2, 2, 4)):
        step(pictures(), box)
    assert len(compiled_graphs) == 2  # all four have changed: once with the first box's numbers, once with any
    for box in ((0, 1, 2, 3), (1, 0, 4, 2), (2, 2, 4, 4), (0, 0, 2, 4), (3, 3, 4, 4), (0, 0, 4, 4)):
        assert step(pictures(), box)[2] == box
    assert len(compiled_graphs) == 2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("variant", ["released", "paper-spatial", "plain"])
def test_a_traced_model_is_the_model_in_evaluation_and_in_training(tmp_path, variant):
    model = small_model(**{**VARIANTS[variant], "depth": 2}, mix_token=True).eval()
    traced = torch.jit.trace(model, pictures())
    torch.jit.save(traced, tmp_path / "model.pt")
    again = torch.jit.load(tmp_path / "model.pt")
    torch.testing.assert_close(again(pictures(2)), model(pictures(2)), rtol=1e-4, atol=1e-5)
    model.mix_token = False
    class_logits, _, box = torch.jit.trace(model.train(), pictures(), check_trace=False)(pictures())
    torch.testing.assert_close(class_logits, model(pictures())[0], rtol=1e-4, atol=1e-5)
    assert tuple(box.tolist()) == NO_BOX
    with SummaryWriter(str(tmp_path / "events")) as board:
        board.add_graph(model, pictures())


@pytest.mark.parametrize("variant", ["released", "paper", "plain"])
def test_shapes_are_those_of_the_meta_device_too(variant):
    model = small_model(**VARIANTS[variant]).to("meta")
    class_logits, patch_logits, _ = model.train()(pictures().to("meta"), NO_BOX)
    assert class_logits.shape == (4, 5) and patch_logits.shape == (4, 16, 5)
    assert model.eval()(pictures().to("meta")).shape == (4, 5)
