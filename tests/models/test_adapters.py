"""What people put in a layer's place or hang on it is honoured in training as in evaluation."""

from __future__ import annotations

import copy

import pytest
import timm.utils
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from tests.models.small import BOX, RELEASED, VARIANTS, pictures, small_model, training_step

ADAPTABLE = ["mlp.fc1", "mlp.fc2", "attn.qkv", "attn.proj", "attn.DLA.conv_exp", "attn.DLA.conv_pro", "norm2"]


class LowRank(nn.Module):
    """An adapter as LoRA makes them: the frozen layer, its attributes reachable, and a trained path beside it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        shape = layer.weight.shape
        self.down = nn.Parameter(torch.randn(2, *shape[1:]) * 0.1) if len(shape) > 1 else nn.Parameter(torch.ones(1))
        self.up = nn.Parameter(torch.randn(shape[0], 2) * 0.1) if len(shape) > 1 else None

    @property
    def weight(self) -> Tensor:
        return self.layer.weight

    @property
    def bias(self) -> Tensor:
        return self.layer.bias

    def forward(self, x: Tensor) -> Tensor:
        if self.up is None:
            return self.layer(x) * self.down
        if x.dim() == 4:
            return self.layer(x) + nn.functional.conv2d(nn.functional.conv2d(x, self.down), self.up[:, :, None, None])
        return self.layer(x) + x @ self.down.T @ self.up.T


def adapted(name: str) -> tuple[nn.Module, LowRank]:
    model = small_model(**RELEASED)
    path = f"blocks.1.{name}" if "qkv" not in name else f"blocks.0.{name}"
    parent, _, child = path.rpartition(".")
    adapter = LowRank(model.get_submodule(path))
    setattr(model.get_submodule(parent), child, adapter)
    return model, adapter


@pytest.mark.parametrize("name", ADAPTABLE)
def test_an_adapter_gets_its_gradient_and_evaluates_as_it_trains(name):
    model, adapter = adapted(name)
    class_logits, patch_logits, _ = model.train()(pictures(), BOX)
    (class_logits.square().mean() + patch_logits.square().mean()).backward()
    assert adapter.down.grad is not None and adapter.down.grad.abs().sum() > 0
    model.eval()
    with_gradients = model(pictures())
    with_gradients.sum().backward()
    with torch.no_grad():
        torch.testing.assert_close(with_gradients, model(pictures()), rtol=1e-5, atol=1e-6)
        adapter.down.zero_()
        if adapter.up is None:
            adapter.down.fill_(1)
        plain = small_model(**RELEASED)
        plain.load_state_dict(model.state_dict(), strict=False)  # running statistics
        torch.testing.assert_close(model(pictures()), plain.eval()(pictures()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ["released", "paper", "paper-spatial", "paper-bottleneck", "plain"])
@pytest.mark.parametrize("mode", ["training", "evaluation", "evaluation without gradients"])
def test_hooks_on_every_layer_fire_and_change_nothing(variant, mode):
    def outputs(model: nn.Module) -> Tensor:
        with torch.set_grad_enabled("without" not in mode):
            return model.train()(pictures(), BOX)[1] if mode == "training" else model.eval()(pictures())

    model = small_model(**VARIANTS[variant])
    fired: list[str] = []
    leaves = [name for name, module in model.named_modules() if not list(module.children())]
    for name in leaves:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: fired.append(name))
    hooked = outputs(model)
    assert set(leaves) <= set(fired)
    torch.testing.assert_close(hooked, outputs(small_model(**VARIANTS[variant])), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mlp.fc1", "mlp.fc2", "attn.DLA.conv_exp"])
@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "hook", "instance"])
def test_reparametrised_layers_compute_with_the_weight_of_the_moment(name, kind):
    model = small_model(**RELEASED)
    layer = model.get_submodule(f"blocks.1.{name}")
    if kind == "instance":  # as accelerate and some quantisers do
        called = []
        layer.forward = lambda x, forward=layer.forward: (called.append(1), forward(x))[1]
    elif kind == "hook":
        nn.utils.weight_norm(layer)
    else:
        getattr(parametrizations, kind)(layer)
    _, gradients, _ = training_step(model)
    if kind == "instance":
        assert called
        return
    owned = [gradient for key, gradient in gradients.items() if name in key and "bias" not in key]
    assert owned and all(gradient.abs().sum() > 0 for gradient in owned)
    if parametrize.is_parametrized(layer):
        parametrize.remove_parametrizations(layer, "weight")


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@pytest.mark.parametrize("change", ["RMSNorm", "wrapped", "no bias", "quantised"])
def test_other_layers_in_place_of_an_mlps_are_called(change):
    model = small_model(**RELEASED)
    block = model.blocks[1]
    if change == "RMSNorm":
        block.norm2 = nn.RMSNorm(24)
    elif change == "wrapped":
        block.mlp.fc1, block.norm2 = Wrapped(block.mlp.fc1), Wrapped(block.norm2)
    elif change == "no bias":
        block.mlp.fc1 = nn.Linear(24, 72, bias=False)
    else:
        model = torch.ao.quantization.quantize_dynamic(model.eval(), {nn.Linear})
        assert model(pictures()).isfinite().all()
        return
    _, gradients, _ = training_step(model)
    assert all(gradient.isfinite().all() for gradient in gradients.values())


NORMS = {
    "torch's SyncBatchNorm": nn.SyncBatchNorm.convert_sync_batchnorm,
    "timm's SyncBatchNorm": timm.layers.convert_sync_batchnorm,
    "frozen by timm": lambda model: (timm.utils.freeze(model, include_bn_running_stats=True), model)[1],
    "BatchNorm2d": lambda model: swap_norms(model, lambda norm: nn.BatchNorm2d(norm.num_features)),
    "cumulative": lambda model: swap_norms(model, lambda norm: nn.BatchNorm2d(norm.num_features, momentum=None)),
    "no gain": lambda model: swap_norms(model, lambda norm: nn.BatchNorm2d(norm.num_features, affine=False)),
    "no statistics": lambda model: swap_norms(
        model, lambda norm: nn.BatchNorm2d(norm.num_features, track_running_stats=False)
    ),
    "GroupNorm": lambda model: swap_norms(model, lambda norm: nn.GroupNorm(2, norm.num_features)),
}


def swap_norms(model: nn.Module, make) -> nn.Module:
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, make(module))
    return model


@pytest.mark.parametrize("kind", NORMS)
def test_what_people_do_to_batch_norms_trains_and_evaluates(kind):
    original = small_model(**RELEASED).train()
    original(pictures())  # running statistics that are no longer the initial ones
    model = NORMS[kind](copy.deepcopy(original))
    assert not any(type(module).__module__.startswith("refiner_ds.attention") for module in model.modules()) or (
        "frozen" in kind
    )
    if kind in ("torch's SyncBatchNorm", "timm's SyncBatchNorm", "frozen by timm"):
        torch.testing.assert_close(model.eval()(pictures()), original.eval()(pictures()), rtol=1e-4, atol=1e-5)
    class_logits, patch_logits, _ = model.train()(pictures(), BOX)
    assert class_logits.isfinite().all() and patch_logits.isfinite().all()
    if kind == "frozen by timm":
        timm.utils.unfreeze(model)
        assert isinstance(model.blocks[1].attn.DLA.bn1, nn.BatchNorm2d)
        model.train()(pictures(), BOX)
    elif "SyncBatchNorm" in kind or kind == "BatchNorm2d":
        before = int(model.blocks[1].attn.adapt_bn.num_batches_tracked)
        model.set_grad_checkpointing(unit="block")
        training_step(model)
        assert int(model.blocks[1].attn.adapt_bn.num_batches_tracked) == before + 1


def test_functional_transforms_go_through_the_mlp():
    model = small_model(**VARIANTS["plain"]).eval()
    weights = {name: value.detach() for name, value in model.named_parameters()}

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, weights, (pictures(),)).square().mean()

    gradients = torch.func.grad(loss)(weights)
    loss({name: parameter for name, parameter in model.named_parameters()}).backward()
    torch.testing.assert_close(gradients["blocks.0.mlp.fc1.weight"], model.blocks[0].mlp.fc1.weight.grad)


def test_layers_that_compute_more_than_their_weights_are_not_folded():
    model, _ = adapted("mlp.fc2")
    model.patch_embed.bn2.register_forward_hook(lambda *_: None)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"^patch_embed\.bn2, blocks\.1\.mlp\.fc2 cannot be folded: they compute more"):
        model.fuse()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert isinstance(model.patch_embed.bn1, nn.BatchNorm2d)
