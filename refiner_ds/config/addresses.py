"""Addresses of data on servers, and keeping the secrets in them out of everything that is printed or stored.

    https://user:password@host/sets/train           → https://***@host/sets/train
    https://host/sets/train?sig=…&se=…              → https://host/sets/train?***
    pipe:curl -u user:password https://host/{name}  → pipe:curl -u *** https://host/{name}
    https://host/sets/train?${SAS_TOKEN}            stays: environment variables are filled in when a set is opened

Nothing here needs torch.
"""

from __future__ import annotations

import os
import re

from refiner_ds.errors import HIDDEN, QUERY_IN_URL, USER_IN_URL, VARIABLE, hidden, without_secrets

SCHEME = re.compile(r"[a-z][a-z0-9+.-]*://|(http|https|pipe|gs|s3|ais|hf|sftp|ftps):", re.IGNORECASE)
OPTIONS = r"--user|--oauth2-bearer|--cookie|--[\w-]*pass(?:word|wd|phrase)?|--[\w-]*token|--[\w-]*key"
WORD = r"""('[^']*'|"[^"]*"|[^\s'"]+)"""  # of a command, as a shell takes it
SECRETS_IN_COMMAND = (
    re.compile(rf"((?:^|\s)(?:{OPTIONS})[\s=]+){WORD}"),
    *(re.compile(rf"(\bcurl\b[^|;]*?\s-{letter}\s*){WORD}") for letter in "uUb"),  # user, proxy's user, cookies
    re.compile(rf"(\bsshpass\s+-p\s*){WORD}"),
    re.compile(r"(\b(?:authorization|cookie)\s*:\s*(?:(?:basic|bearer|token|digest)\s+)?)([^'\"]+)", re.IGNORECASE),
    re.compile(
        r"(\b\w*(?:secret|password|passwd|token|api[_-]?key|access[_-]?key|signature)\w*\s*[=:]\s*)([^\s'\"&]+)", re.I
    ),
)


def is_address(spec: str) -> bool:
    """Whether a set is named by an address rather than a folder."""
    return bool(SCHEME.match(spec))


def redacted(address: str) -> str:
    """An address as it may be printed and stored: without user names, passwords, query strings and tokens."""
    address = without_secrets(address)
    if address.startswith("pipe:"):
        for pattern in SECRETS_IN_COMMAND:
            address = pattern.sub(hidden, address)
    return address


def is_redacted(address: str) -> bool:
    """Whether secrets were taken out of an address, so that nothing can be fetched from it."""
    return is_address(address) and HIDDEN in address


def has_secrets(address: str) -> bool:
    """Whether an address carries something that must not be stored."""
    return is_address(address) and redacted(address) != address


def with_variables(address: str) -> str:
    """An address with the values of the environment variables it names as ``${NAME}``.

    Raises:
        KeyError: a variable is not set; carries its name.
    """
    return VARIABLE.sub(lambda match: os.environ[match[1]], address)


def scrubbed(text: str, address: str) -> str:
    """What a library said about an address, without the secrets of that address."""
    text = text.replace(address, redacted(address))
    for pattern in (USER_IN_URL, QUERY_IN_URL, *SECRETS_IN_COMMAND):
        for match in pattern.finditer(address):
            for secret in (match[2], match[2].partition(":")[2]):
                text = text.replace(secret, HIDDEN) if len(secret) > 2 else text
    return redacted(text)
