"""What people put in a layer's place or hang on it is honoured in training as in evaluation."""

from __future__ import annotations

import copy

import pytest
import timm.utils
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, parametrize

import refiner_ds.models
from refiner_ds import attention
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
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_hooks_on_every_module_fire_and_change_nothing(variant, mode):
    """On those that hold others as well, such as a whole refiner, and backward hooks where there is a backward."""

    def outputs(model: nn.Module) -> Tensor:
        with torch.set_grad_enabled("without" not in mode):
            return model.train()(pictures(), BOX)[1] if mode == "training" else model.eval()(pictures())

    model = small_model(**VARIANTS[variant])
    fired: list[str] = []
    names = [name for name, _ in model.named_modules()]
    backward: list[str] = []
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: fired.append(name))
        model.get_submodule(name).register_full_backward_hook(lambda *_, name=name: backward.append(name))
    hooked = outputs(model)
    assert set(names) <= set(fired)
    if hooked.requires_grad:
        hooked.square().sum().backward()
        # The class token's head has no part in patch logits, which are what training gives here.
        assert set(names) - set(backward) <= ({"head"} if mode == "training" else set())
    torch.testing.assert_close(hooked, outputs(small_model(**VARIANTS[variant])), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("variant", "name"), [("released", "DLA"), ("paper", "refiner"), ("fused", "DLA")])
@pytest.mark.parametrize("kind", ["hook", "subclass"])
def test_a_refiner_that_alone_is_hooked_or_of_another_class_is_called(variant, name, kind):
    model = small_model(**VARIANTS["released" if variant == "fused" else variant]).eval()
    model = model.fuse() if variant == "fused" else model
    refiner, logits, seen = getattr(model.blocks[1].attn, name), model(pictures()), []
    if kind == "hook":
        refiner.register_forward_hook(lambda module, args, out: seen.append(out) or 2 * out)
    else:

        class Doubled(type(refiner)):
            def forward(self, *args: object) -> Tensor:
                seen.append(super().forward(*args))
                return 2 * seen[-1]

        refiner.__class__ = Doubled
    assert (model(pictures()) - logits).abs().max() > 1e-4
    assert [map_.shape for map_ in seen] == [(4, 2, 17, 17)]
    assert len(model.attention_maps(pictures())) == 4 and len(seen) == 2


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

    def forward(self, *inputs: object) -> object:
        return self.inner(*inputs)


BEHIND = ["patch_embed", "patch_embed.conv1", "blocks.1", "blocks.1.attn", "blocks.1.attn.DLA", "blocks.1.mlp"]


@pytest.mark.parametrize("name", [*BEHIND, "blocks.1.attn.refiner", "blocks.1.attn.refiner.conv_pro"])
def test_a_wrapper_that_hides_what_it_holds_changes_nothing(name):
    options = VARIANTS["paper" if "attn.refiner" in name else "released"]

    def outputs(wrapped: bool) -> tuple[Tensor, ...]:
        model = small_model(**options)
        if wrapped:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Wrapped(model.get_submodule(name)))
        model.set_grad_checkpointing(unit="refiner")
        model.set_input_size((32, 64))
        images = torch.randn(2, 3, 32, 64, generator=torch.Generator().manual_seed(3))
        class_logits, patch_logits, _ = model.train()(images, BOX)
        (class_logits.square().mean() + patch_logits.square().mean()).backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        return class_logits, patch_logits, model.eval()(images), *gradients

    for ours, truth in zip(outputs(True), outputs(False), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-3, atol=1e-5)


def test_what_is_wrapped_is_not_folded_or_resampled():
    model = small_model(**RELEASED)
    child = "proj"
    setattr(model.patch_embed, child, Wrapped(model.patch_embed.proj))
    with pytest.raises(ValueError, match=r"^patch_embed\.proj computes more than its weights say, .*; merge adapters"):
        model.set_input_size(patch_size=4)
    assert model.patch_size == 8
    for name in ("patch_embed", "blocks.1", "blocks.1.attn", "blocks.1.mlp", "blocks.1.attn.DLA"):
        model = small_model(**RELEASED).train()
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, Wrapped(model.get_submodule(name)))
        with pytest.raises(ValueError, match=rf"^{name.removesuffix('.DLA')} cannot be folded: they compute more"):
            model.fuse()
        assert model.training and model.blocks[0].training


@pytest.mark.parametrize("variant", ["released", "paper"])
@pytest.mark.parametrize("change", ["bias", "3x3"])
@pytest.mark.parametrize("name", ["conv_exp", "conv_pro"])
def test_a_refiners_convolution_that_is_no_product_with_its_weight_is_called(variant, change, name):
    model = small_model(**VARIANTS[variant])
    refiner = getattr(model.blocks[1].attn, "DLA" if variant == "released" else "refiner")
    before = getattr(refiner, name)
    size = 3 if change == "3x3" else 1
    layer = nn.Conv2d(before.in_channels, before.out_channels, size, padding=size // 2, bias=change == "bias")
    setattr(refiner, name, layer)
    _, gradients, _ = training_step(model)
    reached = [
        gradient.abs().sum()
        for key, gradient in gradients.items()
        if f"blocks.1.attn.{'DLA' if variant == 'released' else 'refiner'}.{name}." in key
    ]
    assert len(reached) == (2 if change == "bias" else 1) and reached[0] > 0
    with torch.no_grad():
        logits = model.eval()(pictures())
        layer.weight[..., 0, 0] += 1
        if change == "bias":
            layer.weight[..., 0, 0] -= 1
            layer.bias += torch.linspace(0, 3, len(layer.bias))
        assert (model(pictures()) - logits).abs().max() > 1e-4


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


SETTINGS = {
    "momentum": {"momentum": None},
    "not tracking": {"track_running_stats": False},
    "no statistics": {"track_running_stats": False, "running_mean": None, "running_var": None},
    "no gain": {"weight": None, "bias": None},
    "no shift": {"bias": None},
    "nothing": {"running_mean": None, "running_var": None, "num_batches_tracked": None, "weight": None, "bias": None},
    "another momentum": {"momentum": 0.5},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("synchronised", [False, True])
def test_a_norm_whose_settings_people_change_is_still_pytorchs(settings, synchronised):
    """SWA's update_bn averages cumulatively, ``torch.func`` and test-time adaptation take running statistics away."""
    model = small_model(**RELEASED).train()
    model(pictures())
    for norm in [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]:
        for name, value in settings.items():
            setattr(norm, name, value)
    theirs = copy.deepcopy(model)
    if synchronised:
        refiner_ds.models.SyncBatchNorm.convert(model)
    for norm in [module for module in theirs.modules() if isinstance(module, nn.BatchNorm2d)]:
        norm.__class__ = nn.BatchNorm2d
    for training in (True, True, False):
        ours, truth = (one.train(training)(pictures() + 1, *([BOX] if training else [])) for one in (model, theirs))
        torch.testing.assert_close(ours[:2], truth[:2], rtol=1e-4, atol=1e-5)
    for (name, buffer), truth in zip(model.named_buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(buffer, truth, rtol=1e-4, atol=1e-6, msg=name)


def test_swas_update_bn_averages_over_what_it_is_given():
    model = small_model(**RELEASED)
    torch.optim.swa_utils.update_bn([pictures(), 2 * pictures()], model)
    norm = model.patch_embed.bn1
    assert int(norm.num_batches_tracked) == 2 and norm.momentum == 0.1
    with torch.no_grad():
        mean = model.patch_embed.conv1(1.5 * pictures()).mean((0, 2, 3))
    torch.testing.assert_close(norm.running_mean, mean, rtol=1e-4, atol=1e-6)


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


@pytest.mark.parametrize("variant", ["released", "paper-spatial", "paper-bottleneck", "plain"])
def test_functional_transforms_go_through_the_model(variant):
    model, images = small_model(**VARIANTS[variant]).eval(), pictures(2)
    weights = {name: value.detach() for name, value in model.named_parameters()}

    def logits(weights: dict[str, Tensor], images: Tensor) -> Tensor:
        return torch.func.functional_call(model, weights, (images,))

    gradients = torch.func.grad(lambda weights: logits(weights, images).square().mean())(weights)
    logits(dict(model.named_parameters()), images).square().mean().backward()
    name = "blocks.0.mlp.fc1.weight"
    truth = model.get_parameter(name).grad
    torch.testing.assert_close(gradients[name], truth, rtol=1e-4, atol=1e-6)
    one_by_one = torch.func.vmap(lambda image: logits(weights, image[None])[0])(images)
    torch.testing.assert_close(one_by_one, logits(weights, images), rtol=1e-4, atol=1e-5)
    direction = torch.randn(weights[name].shape, generator=torch.Generator().manual_seed(5))

    def loss(weight: Tensor) -> Tensor:
        return logits({**weights, name: weight}, images).square().mean()

    slope = (truth * direction).sum()
    torch.testing.assert_close(torch.func.jvp(loss, (weights[name],), (direction,))[1], slope, rtol=1e-3, atol=1e-6)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(loss(forward_ad.make_dual(weights[name], direction))).tangent
    torch.testing.assert_close(tangent, slope, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("cos_reg", [0.0, 0.1])
def test_gradients_image_by_image_in_training_need_norms_without_statistics_alone(cos_reg):
    model = small_model(**VARIANTS["paper-bottleneck"], cos_reg=cos_reg).train()
    torch.func.replace_all_batch_norm_modules_(model)
    weights = {name: value.detach() for name, value in model.named_parameters()}

    def loss(weights: dict[str, Tensor], image: Tensor) -> Tensor:
        return torch.func.functional_call(model, weights, (image[None], BOX))[0].square().mean()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0), randomness="different")(weights, pictures(2))
    name = "blocks.1.attn.DLA.conv_exp.weight"
    alone = torch.func.grad(loss)(weights, pictures(2)[1])
    torch.testing.assert_close(each[name][1], alone[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("cos_reg", [0.0, 0.1])
def test_second_derivatives_of_a_model_need_the_eager_backend(cos_reg):
    for variant in ("released", "paper"):
        model = small_model(**VARIANTS[variant], cos_reg=cos_reg).train()
        for backend in ("eager", "tiled"):
            with attention.attention_backend(backend):
                class_logits, _, _ = model(pictures(2), BOX)
                loss = class_logits.square().mean() + (model.cos_reg_loss() if cos_reg else 0)
                (gradient,) = torch.autograd.grad(loss, model.blocks[0].attn.qkv.weight, create_graph=True)
                if backend == "eager":
                    gradient.square().sum().backward()
                    assert model.blocks[0].mlp.fc1.weight.grad.abs().sum() > 0
                    continue
                with pytest.raises(RuntimeError, match="^second derivatives need REFINER_ATTENTION=eager"):
                    gradient.square().sum().backward()


def test_layers_that_compute_more_than_their_weights_are_not_folded():
    model, _ = adapted("mlp.fc2")
    model.patch_embed.bn2.register_forward_hook(lambda *_: None)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"^patch_embed\.bn2, blocks\.1\.mlp\.fc2 cannot be folded: they compute more"):
        model.fuse()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert isinstance(model.patch_embed.bn1, nn.BatchNorm2d)


def test_folding_keeps_a_convolutions_own_bias_and_does_not_ask_how_statistics_were_averaged():
    model = swap_norms(small_model(**RELEASED), lambda norm: nn.BatchNorm2d(norm.num_features, momentum=None))
    model.patch_embed.conv2 = nn.Conv2d(4, 8, 3, padding=1)
    block = model.blocks[0]
    block.mlp.fc2 = nn.Linear(72, 24, bias=False)
    model.train()(pictures())
    logits = model.eval()(pictures())
    fused = model.train().fuse()
    torch.testing.assert_close(fused(pictures()), logits, rtol=1e-3, atol=1e-4)
    shown = []
    fused.blocks[1].attn.DLA.register_forward_hook(lambda *_: shown.append(1))
    torch.testing.assert_close(fused(pictures()), logits, rtol=1e-3, atol=1e-4)
    assert shown
