"""Which folder becomes which package; everything else about the project stands in pyproject.toml.

``launch``, ``data_tools`` and ``ds_configs`` are names too general to install, so what is installed has them inside
``refiner_ds``: ``refiner_ds.launch``, ``refiner_ds.data_tools`` and, as data, ``refiner_ds/ds_configs``.
"""

import shlex
import subprocess
import sysconfig
import tempfile

from setuptools import Extension, find_namespace_packages, find_packages, setup


def libjpeg_turbo_is_here() -> bool:
    """Whether libjpeg-turbo's headers and library can be built against."""
    program = (
        "#include <stdio.h>\n#include <jpeglib.h>\n"
        "int main(void) { return !(jpeg_crop_scanline && jpeg_skip_scanlines); }\n"
    )
    compiler = shlex.split(sysconfig.get_config_var("CC") or "cc")
    with tempfile.NamedTemporaryFile(suffix=".out") as out:
        command = (*compiler, "-x", "c", "-", "-o", out.name, "-ljpeg")
        try:
            return subprocess.run(command, input=program, capture_output=True, text=True).returncode == 0
        except OSError:
            return False


inside = find_namespace_packages(
    include=["launch*", "data_tools*", "ds_configs*"],  # with folders that hold only data
    exclude=["*__pycache__*"],
)

# Decodes only a crop of a JPEG; without it the whole image is decoded, to the same pixels.
jpeg_crop = Extension("refiner_ds.data._jpeg_crop", ["refiner_ds/data/_jpeg_crop.c"], libraries=["jpeg"], optional=True)

setup(
    ext_modules=[jpeg_crop] if libjpeg_turbo_is_here() else [],
    packages=find_packages(include=["refiner_ds*"]) + [f"refiner_ds.{package}" for package in inside],
    package_dir={f"refiner_ds.{package}": package.replace(".", "/") for package in inside},
    package_data={"": ["*.json", "*.yaml", "*.sbatch", "py.typed"]},
)
