"""Sets on a server, against a real HTTP server on loopback that also stalls, cuts, damages, refuses and recovers."""

from __future__ import annotations

import base64
import gc
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice, product
from pathlib import Path

import pytest
import torch

from data_tools.verify import main as verify
from refiner_ds.data import remote, samples
from refiner_ds.data.augment import EvalSettings
from refiner_ds.data.index import ShardIndex
from refiner_ds.data.loader import eval_batches, train_batches
from refiner_ds.data.locate import open_index
from refiner_ds.data.samples import SampleReader
from refiner_ds.errors import DataError
from tests.data.conftest import views
from tests.data.small_disk import SmallDisk, on_small_disk


class Server(ThreadingHTTPServer):
    """Serves a folder; ``faults`` maps a file name to what goes wrong with it, and for how many requests."""

    daemon_threads = True

    def __init__(self, folder: Path, handler: type[BaseHTTPRequestHandler] | None = None) -> None:
        super().__init__(("127.0.0.1", 0), handler or Handler)
        self.folder = folder
        self.faults: dict[str, tuple[str, int]] = {}
        self.requests: Counter[str] = Counter()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/set"


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Server

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        self.server.requests[name] += 1
        fault, times = self.server.faults.get(name, ("", 0))
        if self.server.requests[name] > times:
            fault = ""
        path = self.server.folder / name
        if fault.isdigit() or not path.is_file():
            self.send_error(int(fault or 404))
            return
        data = path.read_bytes()
        self.send_response(200)
        if fault != "cut without a length":
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if fault == "stall":
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            time.sleep(2)
        elif fault.startswith("cut"):
            self.wfile.write(data[: len(data) // 2])
        elif fault == "damage":
            self.wfile.write(data[:500] + b"\xff?" + data[502:])
        else:
            if fault == "slow":
                time.sleep(0.5)
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def running(server: Server) -> Iterator[Server]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def server(make_set: Callable[..., ShardIndex], monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(remote, "STALL_SECONDS", 0.5)
    monkeypatch.setenv("no_proxy", "*")
    with running(Server(make_set(20, per_shard=7).folder)) as serving:
        yield serving


def epoch(index: ShardIndex, on_bad: str = "error", workers: int = 0) -> list[torch.Tensor]:
    """Colours of every sample, once; bad ones are −1."""
    batches = eval_batches(
        index, EvalSettings(8, 1.0), batch=5, rank=0, world_size=1, workers=workers, on_bad_sample=on_bad
    )
    return [int(c) if ok else -1 for b in batches for c, ok in zip(b.images_BHWC[:, 0, 0, 0], b.valid_B, strict=True)]


def test_remote_set_is_the_local_set_and_is_fetched_once(server: Server, tmp_path: Path) -> None:
    for _ in range(2):
        index = open_index(server.address, tmp_path / "cache")
        assert epoch(index) == list(range(20))
    shards = {name: count for name, count in server.requests.items() if name.endswith(".tar")}
    assert shards == {f"shard-00000{n}.tar": 1 for n in range(3)}
    assert server.requests["members.npy"] == 1
    cached = {path.name for path in index.folder.iterdir() if path.suffix != ".lock"}
    assert cached == {path.name for path in server.folder.iterdir()}


def test_training_batches_are_those_of_the_local_set(server: Server, tmp_path: Path) -> None:
    def batches(index: ShardIndex, workers: int) -> list[torch.Tensor]:
        settings = views(8)
        running = train_batches(
            index, settings, global_batch=8, micro_batch=4, rank=1, world_size=2, seed=3, workers=workers
        )
        return [batch.images_BHWC for batch in islice(running, 5)]

    local = batches(ShardIndex.load(server.folder), 0)
    far = batches(open_index(server.address, tmp_path / "cache"), 2)
    assert all(torch.equal(one, other) for one, other in zip(local, far, strict=True))


@pytest.mark.parametrize(
    "name, fault",
    [
        *product(("shard-000001.tar", "members.npy"), ("stall", "cut", "cut without a length", "damage", "503")),
        *product(("index.json",), ("stall", "cut", "503")),  # nothing else says what it ought to be
    ],
)
def test_passing_trouble_is_survived(server: Server, tmp_path: Path, fault: str, name: str) -> None:
    server.faults[name] = (fault, 2)
    assert epoch(open_index(server.address, tmp_path / "cache")) == list(range(20))
    assert server.requests[name] == 3


LASTING = {
    "stall": "timed out",
    "cut": "bytes came|IncompleteRead",
    "cut without a length": "bytes came",
    "damage": "checksum",
    "404": "the server answers 404",
    "503": "503",
}


@pytest.mark.parametrize("fault", LASTING)
def test_lasting_trouble_is_an_error_or_a_counted_skip(server: Server, tmp_path: Path, fault: str) -> None:
    server.faults["shard-000001.tar"] = (fault, 1000)
    index = open_index(server.address, tmp_path / "cache")
    with pytest.raises(
        DataError, match=rf"(?s)sample 0 \(number 7 .*shard-000001.tar .*127.*({LASTING[fault]})"
    ) as told:
        epoch(index)
    assert "\n" not in str(told.value)
    assert epoch(index, on_bad="skip") == [*range(7), *[-1] * 7, *range(14, 20)]
    assert server.requests["shard-000001.tar"] == (2 if fault == "404" else 6)  # not again for every sample
    assert not list(index.folder.glob("shard-000001.tar*[!k]")), "nothing half-fetched stays"


def test_a_shard_that_was_not_to_be_had_is_asked_for_again_some_day(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.faults["shard-000001.tar"] = ("404", 1)
    reader = SampleReader(open_index(server.address, tmp_path / "cache"))
    for _ in range(2):
        with pytest.raises(DataError, match="answers 404"):
            reader.read(7)
    assert server.requests["shard-000001.tar"] == 1
    monkeypatch.setattr(samples, "RETRY_AFTER_SECONDS", 0.0)
    assert reader.read(7).label == 7 % 3


@pytest.mark.parametrize("name, fault", [("index.json", "404"), ("members.npy", "404"), ("index.json", "stall")])
def test_address_without_a_set_is_refused(server: Server, tmp_path: Path, name: str, fault: str) -> None:
    server.faults[name] = (fault, 1000)
    with pytest.raises(DataError, match=rf"{name} cannot be fetched from http"):
        open_index(server.address, tmp_path / "cache")


def test_server_that_is_not_there_and_page_that_is_no_index(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="index.json cannot be fetched"):
        open_index("http://127.0.0.1:9/set", tmp_path / "cache")
    (server.folder / "index.json").write_text("<html>Sign in</html>")
    with pytest.raises(DataError, match="not the index of a shard set"):
        open_index(server.address, tmp_path / "cache")


def test_many_processes_fetch_a_shard_once(server: Server, tmp_path: Path) -> None:
    for name in ("shard-000000.tar", "shard-000001.tar"):
        server.faults[name] = ("slow", 1000)
    script = (
        "import sys; from refiner_ds.data.locate import open_index; from refiner_ds.data.index import ShardIndex\n"
        "from refiner_ds.data.decoding import decode_image; from refiner_ds.data.samples import SampleReader\n"
        "index = open_index(sys.argv[1], sys.argv[2]); reader = SampleReader(index)\n"
        "sys.exit(sum(int(decode_image(reader.read(n))[0, 0, 0]) for n in range(20)) != 190)"
    )
    command = [sys.executable, "-c", script, server.address, str(tmp_path / "cache")]
    running = [subprocess.Popen(command, env=os.environ | {"no_proxy": "*"}) for _ in range(5)]
    assert [process.wait(timeout=60) for process in running] == [0] * 5
    assert {count for name, count in server.requests.items() if name.endswith(".tar")} == {1}


def test_processes_of_one_number_on_several_nodes_begin_at_once(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch, others = remote._fetch, [0]

    def fetch_and_be_overtaken(source: str, name: str, path: Path, judge: Callable[[int, str], str]) -> None:
        fetch(source, name, path, judge)
        if not others[0]:
            others[0] += 1
            open_index(server.address, tmp_path / "cache")  # a container on another node, with the same process number

    monkeypatch.setattr(remote, "_fetch", fetch_and_be_overtaken)
    assert open_index(server.address, tmp_path / "cache").count == 20
    assert others == [1] and not list((tmp_path / "cache/remote").glob(".index*"))


def test_fetching_killed_on_the_way_leaves_nothing_in_place(server: Server, tmp_path: Path) -> None:
    server.faults["shard-000000.tar"] = ("stall", 1)
    script = (
        "import sys; from refiner_ds.data.locate import open_index; from refiner_ds.data.index import ShardIndex\n"
        "from refiner_ds.data.remote import fetch_shard\n"
        "fetch_shard(open_index(sys.argv[1], sys.argv[2]), 0)"
    )
    process = subprocess.Popen([sys.executable, "-c", script, server.address, str(tmp_path / "cache")])
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("cache/remote/*/shard-000000.tar.tmp")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    index = open_index(server.address, tmp_path / "cache")
    assert not (index.folder / "shard-000000.tar").exists()
    assert epoch(index) == list(range(20))


def test_full_disk_while_caching(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = open_index(server.address, tmp_path / "cache")
    real = remote._copy

    def full(*arguments: str) -> tuple[int, str]:
        real(*arguments)  # type: ignore[arg-type]
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(remote, "_copy", full)
    with pytest.raises(DataError, match="shard-000000.tar: no room left on its disk"):
        epoch(index)
    assert epoch(index, on_bad="skip") == [-1] * 20
    assert not list(index.folder.glob("*.tmp"))


def test_disk_that_is_really_full_while_caching(server: Server, tmp_path: Path) -> None:
    """Every number of bytes and of files from none to enough: an error or a counted skip, and then all of it."""
    cache = tmp_path / "disk" / "cache"

    def attempt() -> str:
        try:
            index = open_index(server.address, cache)
        except DataError as refusal:
            assert "no room left on its disk" in str(refusal) and "\n" not in str(refusal)
            return "refused"
        skipped = epoch(index, on_bad="skip")
        assert all(colour in (number, -1) for number, colour in enumerate(skipped))
        if -1 not in skipped:
            return "whole"
        with pytest.raises(DataError, match="no room left on its disk") as told:
            epoch(index)
        assert f"(number {skipped.index(-1)} " in str(told.value) and "\n" not in str(told.value)
        return "skipped"

    def fill(disk: SmallDisk) -> None:
        outcomes: Counter[str] = Counter()
        for room in [{"size": 4096 * n} for n in range(1, 18)] + [{"files": n} for n in range(1, 15)]:
            disk.resize(**room)
            outcomes[attempt()] += 1
            assert not list(disk.folder.rglob("*.tmp"))
            disk.resize()
            assert epoch(open_index(server.address, cache)) == list(range(20))
            shutil.rmtree(cache)
            gc.collect()  # what is still open keeps its room
            assert disk.used() == (0, 1)
        assert min(outcomes[kind] for kind in ("refused", "skipped", "whole")) > 2

    on_small_disk(tmp_path / "disk", fill)


def test_whole_set_can_be_fetched_and_checked_beforehand(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = ["--cache", str(tmp_path / "cache")]
    server.faults["shard-000002.tar"] = ("404", 1)
    assert verify([server.address, *cache, "--processes", "2"]) == 1
    assert "shard-000002.tar cannot be fetched" in capsys.readouterr().out
    assert verify([server.address, *cache, "--processes", "2"]) == 0
    assert len(list(tmp_path.glob("cache/remote/*/*.tar"))) == 3


def test_set_remade_on_the_server_gets_a_cache_of_its_own(
    server: Server, tmp_path: Path, make_set: Callable[..., ShardIndex]
) -> None:
    first = open_index(server.address, tmp_path / "cache")
    server.folder = make_set(9, name="other").folder
    second = open_index(server.address, tmp_path / "cache")
    assert first.folder != second.folder
    assert epoch(second)[:9] == list(range(9))


def test_set_behind_a_command(make_set: Callable[..., ShardIndex], tmp_path: Path) -> None:
    folder = make_set(20).folder
    index = open_index(f"pipe:cat {folder}/{{name}}", tmp_path / "cache")
    assert index.folder != folder and epoch(index) == list(range(20))


def test_command_that_fails_or_names_no_file(
    make_set: Callable[..., ShardIndex], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "STALL_SECONDS", 0.5)
    folder = make_set(20).folder
    with pytest.raises(DataError, match="index.json cannot be fetched from pipe:"):
        open_index("pipe:cat /absent/{name}", tmp_path / "cache")
    with pytest.raises(DataError, match="{name}"):
        open_index(f"pipe:cat {folder}/index.json", tmp_path / "cache")


class Guarded(Handler):
    """Wants a password, or a query string; redirects what is asked for under /elsewhere."""

    def do_GET(self) -> None:
        self.server.seen.append((self.path, self.headers.get("Authorization", "")))  # type: ignore[attr-defined]
        path, _, query = self.path.partition("?")
        if path.startswith("/elsewhere/"):
            self.send_response(302)
            self.send_header(
                "Location", f"http://localhost:{self.server.server_port}{path.replace('/elsewhere', '/open')}"
            )
            self.end_headers()
        elif path.startswith("/open/") or query == "sig=hu%20sh" or self.headers.get("Authorization") == HUSH:
            self.path = path
            super().do_GET()
        else:
            self.send_error(401, "Unauthorized")


HUSH = "Basic " + base64.b64encode(b"ann:hu sh").decode()


def test_passwords_and_query_strings_are_understood_and_go_nowhere_else(
    make_set: Callable[..., ShardIndex], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("SIGNATURE", "sig=hu%20sh")
    with running(Server(make_set(20, per_shard=7).folder, Guarded)) as server:
        server.seen = []  # type: ignore[attr-defined]
        host, cache = f"127.0.0.1:{server.server_port}", tmp_path / "cache"
        for number, address in enumerate(
            (
                f"http://ann:hu%20sh@{host}/set",
                f"http://{host}/set?sig=hu%20sh",
                f"HTTP://{host}/set/{{name}}?${{SIGNATURE}}",
            )
        ):
            index = open_index(address, cache / str(number))
            assert epoch(index, workers=1) == list(range(20))
            assert "hu" not in index.describe()
        assert ("/set/index.json", HUSH) in server.seen and ("/set/index.json?sig=hu%20sh", "") in server.seen  # type: ignore[attr-defined]
        server.seen.clear()  # type: ignore[attr-defined]
        assert epoch(open_index(f"http://ann:hu%20sh@{host}/elsewhere", cache / "moved")) == list(range(20))
        assert {bool(login) for path, login in server.seen if path.startswith("/open/")} == {False}  # type: ignore[attr-defined]
        for wrong in (
            f"http://ann:hush@{host}/set",
            f"http://{host}/set?sig=hush",
            f"http://ann:hu@sh@{host}/set",
            f"ftp://ann:hush@{host}/set",
            f"az://{host}/set?sig=hush",
        ):
            with pytest.raises(DataError, match="index.json cannot be fetched from ") as told:
                open_index(wrong, cache / "none")
            assert "hu" not in str(told.value).replace("truth", "") and "***" in str(told.value)
    kept = [path for path in cache.rglob("*") if path.is_file()]
    assert len(kept) > 12 and not any(b"hu%20sh" in path.read_bytes() or b"hu sh" in path.read_bytes() for path in kept)


def test_addresses_whose_secrets_were_not_stored_or_not_set_are_refused(tmp_path: Path) -> None:
    for address, says in {
        "https://***@host/set": "its password or query string was not stored; give the whole address again",
        "https://ann:pass:word@host:port/set": "https://***@host:port/set: not an address, since its port is no number",
        "https://ann:pa/ss@host/set": "https://***@host/set: not an address, since its port is no number; write / ? #",
        "https://${NOBODY_SETS_THIS}@host/set": "the environment variable NOBODY_SETS_THIS is not set",
        "s3://bucket/set": "write pipe:aws s3 cp s3://bucket/set/{name} -",
    }.items():
        with pytest.raises(DataError, match=re.escape(says)):
            open_index(address, tmp_path / "cache")


def test_commands_that_fail_do_not_tell_what_was_in_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "STALL_SECONDS", 0.5)
    with pytest.raises(DataError, match="its command ended with exit code 22") as told:
        open_index("pipe:TOKEN=hush sh -c 'exit 22' {name}", tmp_path / "cache")
    assert "hush" not in str(told.value) and "TOKEN=***" in str(told.value)


OPEN_FROM_THE_HUB = """
import sys
from refiner_ds.data import remote
from refiner_ds.data.locate import open_index
from refiner_ds.errors import DataError
remote.STALL_SECONDS = 0.5
try:
    open_index("hf://datasets/nobody/no-set/train", sys.argv[1])
except DataError as error:
    print(error)
"""


@pytest.mark.parametrize("offline", ["1", "0"])
def test_hugging_face_without_a_network_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offline: str
) -> None:
    """The hub's client in a process of its own, for it reads its environment once. Nobody listens where its hub is."""
    environment = os.environ | {
        "HF_HUB_OFFLINE": offline,
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "HF_TOKEN": "hf_hush",
        "HF_HOME": str(tmp_path / "hf"),
        "no_proxy": "*",
    }
    command = [sys.executable, "-c", OPEN_FROM_THE_HUB, str(tmp_path / "cache")]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert told.returncode == 0, told.stderr
    (sentence,) = told.stdout.splitlines()
    assert sentence.startswith("index.json cannot be fetched from hf://datasets/nobody/no-set/train (")
    assert "hush" not in told.stdout + told.stderr
