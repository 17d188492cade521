"""Write constraints.txt: the exact version of every installed package that is the same on all machines.

torch, torchvision and the CUDA packages they bring are left to pyproject's ranges, since each platform has its own builds.
"""

import re
from importlib.metadata import distributions
from pathlib import Path

BY_RANGE = re.compile(r"^(torch|torchvision|triton|cuda-.*|nvidia-(?!ml-py$).*|cliprd|pip|setuptools|wheel)$")

versions = {re.sub(r"[-_.]+", "-", one.metadata["Name"]).lower(): one.version for one in distributions()}
lines = [f"{name}=={version}" for name, version in sorted(versions.items()) if not BY_RANGE.match(name)]
Path("constraints.txt").write_text(
    "# Exact versions, for `pip install --constraint constraints.txt`. Written by `make constraints`.\n" + "\n".join(lines) + "\n"
)
