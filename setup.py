"""Packaging. The version is read from the package's text, so that building needs none of its imports."""
import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "agentserver" / "__init__.py").read_text("utf-8"), re.M)[1]

setup(
    name="agentserver",
    version=VERSION,
    description="Run command-line agents on this machine; spawn, talk to, watch, pause and stop them over ZeroMQ.",
    long_description=(HERE / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.9",
    packages=find_packages(include=["agentserver", "agentserver.*"]),
    package_data={"agentserver": ["py.typed"]},
    install_requires=["pyzmq>=22"],
    extras_require={"dev": ["pytest>=7", "pytest-xdist>=3", "tox>=4", "ruff", "mypy"]},
    entry_points={"console_scripts": ["agentserver=agentserver.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: Console",
        "Intended Audience :: Developers",
        "Operating System :: POSIX",
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(9, 15)),
        "Topic :: System :: Distributed Computing",
        "Typing :: Typed",
    ],
)
