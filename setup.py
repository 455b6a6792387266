"""Which folder becomes which package; everything else about the project stands in pyproject.toml.

``launch``, ``data_tools`` and ``ds_configs`` are names too general to install, so what is installed has them inside
``refiner_ds``: ``refiner_ds.launch``, ``refiner_ds.data_tools`` and, as data, ``refiner_ds/ds_configs``.
"""

from setuptools import find_namespace_packages, find_packages, setup

inside = find_packages(include=["launch*", "data_tools*"]) + find_namespace_packages(include=["ds_configs*"])

setup(
    packages=find_packages(include=["refiner_ds*"]) + [f"refiner_ds.{package}" for package in inside],
    package_dir={f"refiner_ds.{package}": package.replace(".", "/") for package in inside},
    package_data={
        "refiner_ds": ["py.typed"],
        "refiner_ds.launch": ["clusters/*.yaml"],
        **{f"refiner_ds.{package}": ["*.json"] for package in inside if package.startswith("ds_configs")},
    },
)
