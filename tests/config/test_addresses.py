"""Passwords and presigned query strings in addresses are never printed or stored; variables in them are no secrets."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from refiner_ds.config import load
from refiner_ds.config.addresses import has_secrets, is_redacted, redacted, scrubbed, with_variables
from refiner_ds.errors import ConfigError, print_error

HIDDEN = {
    "https://ann:s3cr-t@host:8080/sets/train": "https://***@host:8080/sets/train",
    "http://token@host/sets": "http://***@host/sets",
    "https://host/train?X-Amz-Signature=abc&X-Amz-Date=1": "https://host/train?***",
    "https://ann:pw@host/{name}?sig=abc#part": "https://***@host/{name}?***#part",
    "pipe:curl -s -u ann:pw https://host/{name}": "pipe:curl -s -u *** https://host/{name}",
    "pipe:curl -s 'https://ann:pw@host/{name}?sig=a' -o -": "pipe:curl -s 'https://***@host/{name}?***' -o -",
    'pipe:curl -H "Authorization: Bearer a" ftp://h/{name}': 'pipe:curl -H "Authorization: Bearer ***" ftp://h/{name}',
    "pipe:AWS_SECRET_KEY=a aws s3 cp s3://b/{name} -": "pipe:AWS_SECRET_KEY=*** aws s3 cp s3://b/{name} -",
    "pipe:wget --password=abc -O - ftp://host/{name}": "pipe:wget --password=*** -O - ftp://host/{name}",
    "pipe:wget --http-passwd abc -O - {name}": "pipe:wget --http-passwd *** -O - {name}",
    "pipe:curl -uann:pw https://host/{name}": "pipe:curl -u*** https://host/{name}",
    "pipe:curl -H 'X-Api-Key: a' https://h/{name}": "pipe:curl -H 'X-Api-Key: ***' https://h/{name}",
    "pipe:curl -H 'Cookie: id=a; b=c' h/{name}": "pipe:curl -H 'Cookie: ***' h/{name}",
    "pipe:sshpass -p abc scp h:{name} -": "pipe:sshpass -p *** scp h:{name} -",
    "pipe:curl -u 'ann:p w' -b sid=a https://host/{name}": "pipe:curl -u *** -b *** https://host/{name}",
    "pipe:curl --user \"ann:p w\" h/{name} | gzip -d": "pipe:curl --user *** h/{name} | gzip -d",
    "https://a@nn:p@ss@host/set": "https://***@host/set",
    "https://ann:p/s?s#@host/set": "https://***@host/set",
    "HTTPS://ann:pw@host/set?sig=abc": "HTTPS://***@host/set?***",
    "ftp://ann:pw@host/set": "ftp://***@host/set",
    "az://container/set?sig=abc": "az://container/set?***",
}  # fmt: skip
OPEN = [
    "/data/imagenet/train", "package:digits/train", "https://host:8080/sets/train", "hf://datasets/me/set@main/train",
    "pipe:aws s3 cp s3://bucket/train/{name} -", "https://${USER}:${PASSWORD}@host/train?${SAS}", "pipe:cat /a/{name}",
    "pipe:curl -u ${LOGIN} https://host/{name}", "pipe:curl -u '${LOGIN}' h/{name}", "pipe:cat {name} | sort -u -",
    "https://host:8080/sets@2/a:b@c", "https://host/a:b@c",
]  # fmt: skip


@pytest.mark.parametrize("address", HIDDEN)
def test_secrets_are_taken_out(address: str) -> None:
    assert redacted(address) == HIDDEN[address] == redacted(redacted(address))
    assert has_secrets(address) and is_redacted(redacted(address))


@pytest.mark.parametrize("address", OPEN)
def test_what_is_no_secret_stays(address: str) -> None:
    assert redacted(address) == address and not has_secrets(address)


def test_variables_are_filled_in_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAS", "sig=a&b")
    assert with_variables("https://host/{name}?${SAS}") == "https://host/{name}?sig=a&b"
    with pytest.raises(KeyError, match="ABSENT"):
        with_variables("https://${ABSENT}@host/")


def test_what_libraries_say_of_an_address_is_scrubbed() -> None:
    address = "https://ann:pass:word@host/sets?sig=abcdef"
    said = f"cannot open {address}: nonnumeric port 'pass:word@host', query sig=abcdef"
    assert scrubbed(said, address) == "cannot open https://***@host/sets?***: nonnumeric port '***@host', query ***"


def test_refusals_do_not_tell_them_wherever_they_were_typed(capsys: pytest.CaptureFixture[str]) -> None:
    """A path of pathlib's has lost one of the slashes."""
    for typed in ("https://ann:hush@host/set", "https:/ann:hush@host/set", "https:/host/set?sig=hush", "x://a:hush@b"):
        print_error(f"--labels {typed}: no such file")
        told = capsys.readouterr().err
        assert "hush" not in told and "***" in told and told.endswith(": no such file\n")
    print_error("https://host:8080/set@2: 3 of 4 bytes came; see https://host/docs")
    assert "***" not in capsys.readouterr().err


def test_nothing_a_run_file_prints_or_stores_holds_them(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    places = {"train": "https://ann:hush@host/train", "val": "https://host/val?sig=hush"}
    file.write_text(json.dumps({"refiner": {"data": places}, "train_batch_size": 8}))
    run = load(file)
    assert run.refiner.data.train == places["train"]
    stored = json.dumps(run.resolved())
    assert "hush" not in stored and "https://***@host/train" in stored and "https://host/val?***" in stored
    for wrong in ("refiner.data.trian=https://ann:hush@host/train", "refiner.recipe.epochs=https://ann:hush@host/"):
        with pytest.raises(ConfigError) as told:
            load(file, [wrong])
        assert "hush" not in str(told.value)


@pytest.mark.parametrize("key", ["model.init_from", "run.output", "data.cache"])
@pytest.mark.parametrize("address", ["https://ann:hush@host/x", "ftp://ann:hush@host/x", "hf://datasets/me/x?sig=hush"])
def test_an_address_where_only_a_disk_can_be_is_refused(key: str, address: str) -> None:
    with pytest.raises(ConfigError, match=rf"refiner\.{key} is .*; it must be on a disk, not an address$") as told:
        load(None, [f"refiner.{key}={address}"])
    assert "hush" not in str(told.value)
