"""One log file a rank, which takes our lines and what other libraries would print over the progress line.

logs/rank_0.log     our lines, warnings, and log records of other libraries
"""

from __future__ import annotations

import logging

from refiner_ds.run_folder import RunFolder

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def silence_libraries() -> None:
    """Before heavy imports: keep libraries from talking over the progress line. ``write_logs`` gives them a file."""
    logging.captureWarnings(True)
    root = logging.getLogger()
    if not root.handlers:
        root.addHandler(logging.NullHandler())
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime is found"
    # DeepSpeed says this on import, before its records can be given a file, on every rank of a CPU machine.
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())


def write_logs(folder: RunFolder, rank: int) -> None:
    """Send every library's records and warnings, and ours, to ``logs/rank_N.log``."""
    folder.logs.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(folder.rank_log(rank))
    handler.setFormatter(logging.Formatter(FORMAT))
    handler.handleError = lambda record: None  # type: ignore[method-assign]  # a full disk ends no run
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    for name in list(logging.root.manager.loggerDict):
        # DeepSpeed and torch write to the terminal by handlers of their own; here they follow the root.
        if name.partition(".")[0] in ("DeepSpeed", "deepspeed", "torch", "tensorboard", "matplotlib", "PIL"):
            logger = logging.getLogger(name)
            logger.handlers[:] = []
            logger.propagate = True
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
