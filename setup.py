"""What pyproject.toml cannot say: data folders count as packages too, and the weights travel in the wheel."""

from setuptools import find_namespace_packages, setup

setup(
    packages=find_namespace_packages(
        include=["rfengine", "rfengine.*"], exclude=["*.__pycache__", "*.__pycache__.*"]
    ),
    package_data={"rfengine": ["weights/**/*.safetensors", "weights/**/*.json"]},
)
