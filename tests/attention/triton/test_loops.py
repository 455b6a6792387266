"""What a kernel's loop assigns is there in its next step, compiled as it is interpreted."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from refiner_ds import attention


def test_the_compiler_loses_no_variable_of_a_loop(tmp_path):
    sources = [path.read_text() for path in Path(attention.__file__).parent.rglob("*.py")]
    launched = {name for source in sources for name in re.findall(r"launch\(\s*(_\w+)", source)}
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.attention.triton.loops_script"],
        env={**env, "TRITON_CACHE_DIR": str(tmp_path)}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert set(told["kernels"]) == launched and len(launched) > 10
    assert told["lost"] == []
