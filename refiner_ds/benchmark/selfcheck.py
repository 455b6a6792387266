"""Do the kernels agree with the tiled backend on this device? ``python -m refiner_ds.benchmark selfcheck``.

The check that a process makes before it uses them, said in a line. Exit codes: 0 they agree, 1 they do not.
"""

from __future__ import annotations

import torch

from refiner_ds.attention import BACKENDS
from refiner_ds.attention.backends.selfcheck import mismatch
from refiner_ds.command_line import command_parser
from refiner_ds.errors import ConfigError

__all__ = ["main"]


def main(argv: list[str] | None = None) -> int:
    """Check and print.

    Raises:
        ConfigError: kernels cannot run on the device.
    """
    parser = command_parser(__doc__, "python -m refiner_ds.benchmark selfcheck")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=50, help="of the two images it is checked on")
    given = parser.parse_args(argv)
    device, kernels = torch.device(given.device), BACKENDS["triton"]
    if (reason := kernels.runs_on(device)) is not None:
        raise ConfigError(f"--device {given.device}: {reason}; TRITON_INTERPRET=1 interprets them on a CPU")
    found = mismatch(kernels, device, given.tokens)
    print(f"the kernels {found or 'agree with the tiled backend, in fp32 and bf16'}")
    return 1 if found else 0
