"""Shard sets on a server or in an object store, kept in a local cache as they are used.

    https://host/sets/train                          files of the set under one address
    https://user:password@host/sets/train?token=…    the file's name goes before the query string
    pipe:aws s3 cp s3://bucket/train/{name} -        a command a file, {name} standing for the file's name
    hf://datasets/me/set/train, gs://bucket/train    anything else webdataset's gopen opens

    <cache>/remote/<hash of index.json>/             index.json and members.npy at once;
        shard-000000.tar                             a shard when its first sample is wanted, whole and checked
        shard-000000.tar.lock                        held by the process that fetches it; the others wait

The name of the folder follows from the index, so a set that changed on the server gets a new one. A shard is renamed
into place only after its size and sha256 agree with the index.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable
from contextlib import closing
from http.client import HTTPException
from pathlib import Path
from typing import Any

from refiner_ds.config.addresses import is_redacted, redacted, scrubbed, with_variables
from refiner_ds.data.index import INDEX_NAME, MEMBERS_NAME, ShardIndex
from refiner_ds.data.writer import cannot_write, locked, write_whole
from refiner_ds.errors import DataError
from refiner_ds.files import is_full

STALL_SECONDS = 60.0  # a server that sends nothing for so long is given up
ATTEMPTS = 3
CHUNK = 1 << 20
PIPE_ENDED = re.compile(r"exit (-?\d+) \(read\)")  # webdataset's words for a command that failed
BAD_CHECKSUM = "its checksum differs from the index"


class _NotThere(Exception):
    """The source says that there is no such thing, or that it is nobody's who asks: asking again is no use."""


def fetch_set(spec: str, cache: Path) -> Path:
    """The cache folder of a remote set, with its index and members table in place; shards follow when wanted.

    Args:
        spec: an address as in the module's docstring.
        cache: folder that holds all remote sets.
    Raises:
        DataError: there is no set at the address, or the cache cannot be written.
    """
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(cannot_write(cache, error)) from None
    # Not by process number: in containers it is often the same on every node that shares the cache.
    downloaded = cache / f".index-{uuid.uuid4().hex}.json"
    _fetch(spec, INDEX_NAME, downloaded, lambda size, sha256: "" if size else "nothing came")
    index = downloaded.read_bytes()
    downloaded.unlink()
    folder = cache / hashlib.sha256(index).hexdigest()[:24]
    folder.mkdir(exist_ok=True)
    with locked(folder / INDEX_NAME):
        if not (folder / INDEX_NAME).is_file():
            expected = _members_sha256(spec, index)
            _fetch(
                spec,
                MEMBERS_NAME,
                folder / MEMBERS_NAME,
                lambda size, sha256: "" if sha256 == expected else BAD_CHECKSUM,
            )
            write_whole(folder / INDEX_NAME, index)
    return folder


def _members_sha256(spec: str, index: bytes) -> str:
    try:
        return str(json.loads(index)["members_sha256"])
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{redacted(spec)}: what lies there as {INDEX_NAME} is not the index of a shard set") from None


def fetch_shard(index: ShardIndex, number: int) -> Path:
    """The local file of a shard, fetched if it is not there yet. Safe for any number of processes at once.

    Raises:
        DataError: it cannot be had, arrives damaged, or the cache's disk is full; names shard and source.
    """
    shard = index.shards[number]
    path = index.shard_path(number)
    if index.source is None or path.is_file():
        return path

    def verify(size: int, sha256: str) -> str:
        if size != shard.bytes:
            return f"{size} of {shard.bytes} bytes came"
        return "" if sha256 == shard.sha256 else BAD_CHECKSUM

    with locked(path):
        if not path.is_file():
            _fetch(index.source, shard.name, path, verify)
    return path


def _fetch(source: str, name: str, path: Path, verify: Callable[[int, str], str]) -> None:
    """Fetch a file to its place, in several attempts; ``verify`` says of size and sha256 what is wrong with them."""
    address = _address(source, name)
    temporary = path.with_name(f"{path.name}.tmp")
    reason = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(min(30, 2**attempt * STALL_SECONDS / 60))
        try:
            reason = verify(*_copy(address, temporary))
        except _NotThere as error:
            reason = str(error)
            break
        except OSError as error:
            if is_full(error):
                temporary.unlink(missing_ok=True)
                raise DataError(cannot_write(path, error)) from None
            reason = _reason(error)
        except (ValueError, HTTPException) as error:  # ValueError: an address that is none
            reason = _reason(error)
        if not reason:
            os.replace(temporary, path)
            return
    temporary.unlink(missing_ok=True)
    reason = scrubbed(reason, address)
    raise DataError(f"{name} cannot be fetched from {redacted(source)} ({reason}); see that it is there and whole")


def _reason(error: Exception) -> str:
    """What went wrong, in few words: commands and headers that an exception quotes may hold secrets."""
    ended = PIPE_ENDED.search(str(error))
    if ended:
        return f"its command ended with exit code {ended[1]}"
    if isinstance(error, urllib.error.URLError) and not isinstance(error, urllib.error.HTTPError):
        return str(error.reason)
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _address(source: str, name: str) -> str:
    """Where one file of a set is.

    Raises:
        DataError: the address cannot be used as it stands.
    """
    if is_redacted(source):
        raise DataError(f"{source}: its password or query string was not stored; give the whole address again")
    given = redacted(source)
    try:
        source = with_variables(source)
    except KeyError as error:
        raise DataError(f"{given}: the environment variable {error.args[0]} is not set") from None
    scheme, colon, rest = source.partition(":")
    source = scheme.lower() + colon + rest
    if source.startswith(("http:", "https:")) and not _is_url(source):
        advice = "write / ? # @ and : in a user name or password as %2F %3F %23 %40 and %3A"
        raise DataError(f"{given}: not an address, since its port is no number; {advice}")
    if "{name}" in source:
        return source.replace("{name}", name)
    if source.startswith("pipe:"):
        raise DataError(f"{given}: a pipe needs {{name}} where the file's name goes")
    if source.startswith("s3:"):
        raise DataError(f"{given}: not opened directly; write pipe:aws s3 cp {given}/{{name}} -")
    folder, mark, query = source.partition("?")
    return f"{folder.rstrip('/')}/{name}{mark}{query}"


def _is_url(address: str) -> bool:
    """Whether its host ends where it should: a / in a password ends it too early."""
    try:
        urllib.parse.urlsplit(address).port  # noqa: B018
    except ValueError:
        return False
    return True


def _copy(address: str, temporary: Path) -> tuple[int, str]:
    """Fetch a file under a temporary name; returns its size and sha256."""
    digest = hashlib.sha256()
    size = 0
    with open(temporary, "wb") as file, closing(_open(address)) as stream:
        while chunk := stream.read(CHUNK):
            file.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        if missing := getattr(stream, "length", 0):  # read in pieces, http.client lets a cut connection pass as the end
            raise OSError(f"{size} of {size + missing} bytes came")
        file.flush()
        os.fsync(file.fileno())
    return size, digest.hexdigest()


def _open(address: str) -> Any:
    """A readable stream of one file of a set."""
    if address.startswith(("http:", "https:")):
        try:
            return urllib.request.urlopen(_request(address), timeout=STALL_SECONDS)
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code not in (408, 429):
                raise _NotThere(f"the server answers {error.code} {error.reason}") from None
            raise
    from webdataset.gopen import gopen, gopen_schemes  # brings torch, which plain addresses do without

    if (scheme := address.partition(":")[0]) not in gopen_schemes:
        known = ", ".join(sorted(name for name in gopen_schemes if name.isalnum()))
        raise _NotThere(f"nothing here opens {scheme}:, of addresses only {known}")
    try:
        return gopen(address, "rb")
    except (OSError, ValueError):
        raise
    except ImportError as error:
        raise _NotThere(f"{error.name} is not installed; pip install {error.name}") from None
    except Exception as error:  # every library behind an address has exceptions of its own
        raise OSError(f"{type(error).__name__}: {_reason(error)}") from None


def _request(address: str) -> urllib.request.Request:
    """A request that sends user and password as HTTP's basic authentication, and only to the host that they are for."""
    parts = urllib.parse.urlsplit(address)
    user, at, host = parts.netloc.rpartition("@")
    request = urllib.request.Request(parts._replace(netloc=host).geturl())
    if at:
        credentials = base64.b64encode(urllib.parse.unquote(user).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {credentials}")
    return request
