"""How samples lie in a tar: USTAR headers, the span of a sample that one read fetches, and its checksum.

    header <key>.jpg │ image, padded to 512 │ header <key>.map │ map, padded to 512 │ …
    └──────────────────────── span: one read, one checksum ──────────┘

Headers are USTAR with every field that could vary (time, owner, mode) fixed. Nothing here needs torch.
"""

from __future__ import annotations

import numpy as np
import xxhash

BLOCK = 512
NAME_BYTES = 100  # of USTAR's name field
END_OF_TAR = bytes(2 * BLOCK)
CHECKSUM_MASK = 0xFFFFFFFF  # the low half of xxh3_64 is kept

MEMBER = np.dtype(
    [
        ("offset", "<u8"),  # of the image's tar header in its shard
        ("image_bytes", "<u4"),
        ("map_bytes", "<u4"),  # 0: no map
        ("label", "<i4"),
        ("check", "<u4"),  # `checksum` of the sample's span, see `span_bytes`
    ]
)


def padded(size: int) -> int:
    """Bytes a tar keeps for a payload of ``size`` bytes: whole 512-byte blocks."""
    return -(-size // BLOCK) * BLOCK


def span_bytes(image_bytes: int, map_bytes: int) -> int:
    """Bytes from an image's tar header to the end of its map (of itself, without one): what one read fetches."""
    if not map_bytes:
        return BLOCK + image_bytes
    return BLOCK + padded(image_bytes) + BLOCK + map_bytes


def checksum(*parts: bytes | memoryview) -> int:
    """The checksum a MEMBER record keeps of its sample's span, which may be given in parts."""
    hashed = xxhash.xxh3_64()
    for part in parts:
        hashed.update(part)
    return hashed.intdigest() & CHECKSUM_MASK


def tar_header(name: str, size: int) -> bytes:
    """A 512-byte USTAR header of a regular file.

    Raises:
        ValueError: the name is not ASCII or longer than 100 bytes.
    """
    encoded = name.encode("ascii")
    if len(encoded) > NAME_BYTES:
        raise ValueError(f"{name}: {len(encoded)} bytes; a key and its ending have room for {NAME_BYTES}")
    mode_and_owner = b"0000644\0" + b"0000000\0" * 2
    before_sum = encoded.ljust(NAME_BYTES, b"\0") + mode_and_owner + b"%011o\0" % size + b"0" * 11 + b"\0"
    after_sum = (b"0" + bytes(100) + b"ustar\x0000").ljust(BLOCK - 156, b"\0")
    total = sum(before_sum) + 8 * ord(" ") + sum(after_sum)
    return before_sum + b"%06o\0 " % total + after_sum


def tar_member(name: str, payload: bytes) -> list[bytes]:
    """A tar member in three parts: header, payload, and zeros up to a whole block."""
    return [tar_header(name, len(payload)), payload, bytes(padded(len(payload)) - len(payload))]
