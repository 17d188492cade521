"""Write the table of all settings into docs/deploy.md, from the settings' own classes. `--check`: only say whether it is current.

A setting that the API and the workers share stands once, with what the API's class says of it.
"""

from __future__ import annotations

import argparse
import sys
from enum import Enum
from pathlib import Path

from pydantic.fields import FieldInfo

from service.settings import Settings
from worker.settings import WorkerSettings

DOCUMENT = Path("docs/deploy.md")
BEGIN = "<!-- settings: written by `make settings`, from service/settings.py and worker/settings.py -->\n"
END = "<!-- end of settings -->\n"


def table() -> str:
    """All settings as a Markdown table, the shared ones first."""
    api, worker = Settings.model_fields, WorkerSettings.model_fields
    readers = {name: "both" if name in worker else "API" for name in api} | {name: "worker" for name in worker if name not in api}
    order = ["both", "API", "worker"]
    rows = ["| variable | read by | default | what it does |", "|---|---|---|---|"]
    for name, reader in sorted(readers.items(), key=lambda item: order.index(item[1])):
        field = api.get(name) or worker[name]
        description = (field.description or "").replace("|", r"\|")
        rows.append(f"| `CLIPRD_{name.upper()}` | {reader} | {default_of(field)} | {description} |")
    return "\n".join(rows) + "\n"


def default_of(field: FieldInfo) -> str:
    """The default as one would write it into the environment."""
    value = field.default.value if isinstance(field.default, Enum) else field.default
    if value is None or value in ("", ()):
        return "none"
    if isinstance(value, tuple):
        return f"`{','.join(map(str, value))}`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    only_check = parser.parse_args().check
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        sys.exit(f"{DOCUMENT} lacks the two lines that the table stands between:\n{BEGIN}{END}")
    written = f"{before}{BEGIN}\n{table()}\n{END}{after}"
    if only_check and written != DOCUMENT.read_text():
        sys.exit(f"{DOCUMENT}: the table of settings is not current; run `make settings`")
    DOCUMENT.write_text(written)


if __name__ == "__main__":
    main()
