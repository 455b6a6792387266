"""How samples lie in a tar: USTAR headers, the span of a sample that one read fetches, and its checksum.

    header <key>.jpg │ image, padded to 512 │ header <key>.map │ map, padded to 512 │ …
    └──────────────────────── span: one read, one checksum ──────────┘

The headers written here are USTAR with every field that could vary (time, owner, mode) fixed; those read may be
anybody's: `read_members` knows the long names of GNU tar and of POSIX (pax) as well. Nothing here needs torch.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import numpy as np
import xxhash

BLOCK = 512
NAME_BYTES = 100  # of USTAR's name field
END_OF_TAR = bytes(2 * BLOCK)
KEY_AND_ENDING = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)", re.DOTALL)
EXTENDED_HEADERS = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE)
PAX_RECORD = re.compile(rb"\d+ ([^=]+)=([^\n]*)\n")
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


def split_name(name: str) -> tuple[str, str]:
    """Key and ending of a member's name as WebDataset splits them, at the first dot of the last part of its path.

    The ending is in lower case. Both are empty where the member belongs to no sample: hidden files, names without an
    ending.
    """
    match = KEY_AND_ENDING.fullmatch(name)
    return (match[1], match[2].lower()) if match else ("", "")


class TarMember(NamedTuple):
    """A regular file in a tar.

    Attributes:
        name: its whole path.
        offset: of its 512-byte header in the tar; the payload follows at once.
        header, payload: their bytes.
    """

    name: str
    offset: int
    header: bytes
    payload: bytes


def header_name(header: bytes) -> str:
    """The name in a header itself, cut where the whole one is longer than the header can hold."""
    name = header[:NAME_BYTES].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if header[257:265] == b"ustar\x0000" else b""
    return (prefix + b"/" + name if prefix else name).decode("ascii", "replace")


def read_members(stream: BinaryIO) -> Iterator[TarMember]:
    """The regular files of a tar, read from its beginning to its end.

    Raises:
        ValueError: not a tar, damaged, or cut; says at which byte.
    """
    offset, long_name, size_override = 0, "", -1
    while True:
        header = stream.read(BLOCK)
        if header == bytes(BLOCK):
            return
        if len(header) < BLOCK:
            raise ValueError(f"does not end as a tar does (at byte {offset + len(header)}); it was cut")
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            raise ValueError(f"no tar header at byte {offset}, where one should be") from None
        has_payload = info.isreg() or info.type not in tarfile.SUPPORTED_TYPES or info.type in EXTENDED_HEADERS
        size = (info.size if size_override < 0 else size_override) if has_payload else 0
        payload = stream.read(padded(size))
        if len(payload) < padded(size):
            raise ValueError(f"the member at byte {offset} ({info.name}) is cut off")
        payload = payload[:size]
        if info.type == tarfile.GNUTYPE_LONGNAME:
            long_name = payload.rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif info.type == tarfile.XHDTYPE:
            records = dict(PAX_RECORD.findall(payload))
            long_name = records.get(b"path", b"").decode("utf-8", "surrogateescape") or long_name
            size_override = int(records.get(b"size", -1))
        elif info.type not in EXTENDED_HEADERS:
            if info.isreg():
                yield TarMember(long_name or info.name, offset, header, payload)
            long_name, size_override = "", -1
        offset += BLOCK + padded(size)
