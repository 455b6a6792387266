"""The three-convolution stem, from pixels to a grid of patch embeddings.

    [B,3,H,W] ─ 7×7/2 ─ 3×3 ─ 3×3 (each with norm and ReLU) ─ (p/2)×(p/2)/(p/2) ──> [B,D,H/p,W/p]

Axes: B batch, D width; p is the patch size in pixels.
"""

from __future__ import annotations

from numbers import Integral

from timm.layers import resample_patch_embed
from torch import Tensor, nn

from refiner_ds.attention import BatchNorm
from refiner_ds.models.direct import can_read

__all__ = ["ConvStem", "grid_of"]


def grid_of(img_size: int | tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches in an image.

    Raises:
        ValueError: the patch size is odd, or a side of the image is not a multiple of it.
    """
    if not _is_whole(patch_size) or patch_size < 2 or patch_size % 2:
        raise ValueError(f"patch_size is {patch_size!r}; the stem halves the image first, so it must be an even number")
    sides = tuple(img_size) if isinstance(img_size, tuple | list) else (img_size, img_size)
    if len(sides) != 2 or not all(map(_is_whole, sides)):
        raise ValueError(f"img_size is {img_size!r}; it must be one whole number or two, (height, width)")
    (height, width), patch_size = map(int, sides), int(patch_size)
    if height < 1 or width < 1 or height % patch_size or width % patch_size:
        lower, upper = (max(height // patch_size, 1) * patch_size, (height // patch_size + 1) * patch_size)
        raise ValueError(
            f"img_size {height}x{width} is not a multiple of patch_size {patch_size}; near are {lower} and {upper}"
        )
    return height // patch_size, width // patch_size


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


class ConvStem(nn.Module):
    """Pixels to patch embeddings (released models; the convolutions keep PyTorch's initialisation)."""

    def __init__(self, patch_size: int, in_chans: int, stem_chs: tuple[int, int, int], embed_dim: int) -> None:
        super().__init__()
        first, second, third = stem_chs
        self.patch_size = patch_size
        self.conv1 = nn.Conv2d(in_chans, first, 7, stride=2, padding=3, bias=False)
        self.bn1 = BatchNorm(first)
        self.conv2 = nn.Conv2d(first, second, 3, padding=1, bias=False)
        self.bn2 = BatchNorm(second)
        self.conv3 = nn.Conv2d(second, third, 3, padding=1, bias=False)
        self.bn3 = BatchNorm(third)
        self.act = nn.ReLU()
        self.proj = nn.Conv2d(third, embed_dim, patch_size // 2, stride=patch_size // 2)

    def forward(self, x_B3HW: Tensor) -> Tensor:
        """[B, D, h, w], h×w the patch grid."""
        x = self.act(self.bn1(self.conv1(x_B3HW)))
        x = self.act(self.bn2(self.conv2(x)))
        x = self.act(self.bn3(self.conv3(x)))
        return self.proj(x)

    def set_patch_size(self, patch_size: int) -> None:
        """Another patch size from now on: the weights of ``proj`` are resampled, as timm's patch embeddings are.

        Raises:
            ValueError: ``proj`` is more than its weights (an adapter, a hook).
        """
        if not can_read(self.proj, nn.Conv2d):
            raise ValueError(
                "patch_embed.proj computes more than its weights say, so that they cannot be resampled to another"
                " patch_size; merge adapters and remove hooks first"
            )
        side = patch_size // 2
        proj = nn.Conv2d(self.proj.in_channels, self.proj.out_channels, side, stride=side, device="meta")
        weight = resample_patch_embed(self.proj.weight.detach(), [side, side])
        proj.weight = nn.Parameter(weight.to(self.proj.weight.dtype), requires_grad=self.proj.weight.requires_grad)
        proj.bias = self.proj.bias
        self.proj, self.patch_size = proj, patch_size
