"""Which folder becomes which package; everything else about the project stands in pyproject.toml.

``launch``, ``data_tools`` and ``ds_configs`` are names too general to install, so what is installed has them inside
``refiner_ds``: ``refiner_ds.launch``, ``refiner_ds.data_tools`` and, as data, ``refiner_ds/ds_configs``.
"""

from setuptools import find_namespace_packages, find_packages, setup

inside = find_namespace_packages(
    include=["launch*", "data_tools*", "ds_configs*"],  # with folders that hold only data
    exclude=["*__pycache__*"],
)

setup(
    packages=find_packages(include=["refiner_ds*"]) + [f"refiner_ds.{package}" for package in inside],
    package_dir={f"refiner_ds.{package}": package.replace(".", "/") for package in inside},
    package_data={"": ["*.json", "*.yaml", "py.typed"]},
)
