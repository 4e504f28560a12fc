"""Puts the recipes into the package, which pyproject.toml cannot say beside its search for packages."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["adaptermix*"]), "adaptermix.recipes"],
    package_dir={"adaptermix.recipes": "recipes"},
    package_data={"adaptermix": ["py.typed", "demo/languages/*.json"], "adaptermix.recipes": ["*.yaml"]},
)
