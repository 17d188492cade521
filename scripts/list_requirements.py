"""Print what pyproject.toml asks for under some extras, one requirement a line, for the images' layers.

`python scripts/list_requirements.py core worker`; with `--only NAME` (repeatable) those of these names alone. A layer that is made of this
list stays as it is when anything else in pyproject.toml or the source changes.
"""

import argparse
import re
import tomllib
from pathlib import Path

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("extras", nargs="+")
parser.add_argument("--only", action="append")
arguments = parser.parse_args()

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
wanted = [*project["dependencies"], *(one for extra in arguments.extras for one in project["optional-dependencies"][extra])]
for requirement in dict.fromkeys(wanted):
    if arguments.only is None or re.split(r"[^\w-]", requirement)[0] in arguments.only:
        print(requirement)
