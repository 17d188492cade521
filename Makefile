# Two commands matter: `make demo` and `make test`. Each sets up everything it needs in .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test chaos fuzz compose-test check up setup clean constraints settings
.DEFAULT_GOAL := help

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

setup: $(INSTALLED)  ## the virtual environment .venv with everything in it

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "cliprd needs Python 3.11 or newer; set PYTHON=path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[core,remote,s3,service,worker,embedded,dev]'
	@touch $@

demo: $(INSTALLED)  ## teacher, student alone, student distilled: end to end on embedded defaults
	$(BIN)/python examples/emoji/demo.py

PORT = 8000
HOST = 127.0.0.1

up: $(INSTALLED)  ## the embedded service on http://127.0.0.1:8000; PORT=8001: on another port; HOST=0.0.0.0: for other machines, too
	$(BIN)/cliprd up --port $(PORT) --host $(HOST)

test: $(INSTALLED)  ## all tests, with a real Redis and a real PostgreSQL
	$(BIN)/python -m pytest tests --numprocesses 2 --dist loadfile

chaos: $(INSTALLED)  ## faults injected into the running service, one at a time; ONLY="redis clock": those whose names contain a word
	$(BIN)/python -m tests.chaos $(ONLY)

fuzz: $(INSTALLED)  ## 10,000 requests along the API's links (CLIPRD_FUZZ_CASES=N), with a real Redis and a real PostgreSQL; and property tests on new examples
	$(BIN)/python -m pytest -s tests/fuzz/api_stateful.py
	$(BIN)/python -m pytest --hypothesis-profile=anew tests/unit/test_store_state_machine.py tests/unit/test_teacher_store.py

compose-test: $(INSTALLED)  ## the compose stack on a real Docker engine; skipped where there is none
	$(BIN)/python -m tests.compose.run

check: $(INSTALLED)  ## ruff, mypy, the import contracts, images, compose files and Kubernetes' manifests, the table of settings
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint service/Dockerfile worker/Dockerfile
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker-compose.yml
	sed 's/ !reset / /' docker-compose.cpu.yml | $(BIN)/check-jsonschema --builtin-schema vendor.compose-spec --default-filetype yaml -
	$(BIN)/python scripts/check_k8s.py
	$(BIN)/python scripts/write_settings_table.py --check

settings: $(INSTALLED)  ## write the table of settings in docs/deploy.md
	$(BIN)/python scripts/write_settings_table.py

constraints: $(INSTALLED)  ## write constraints.txt from what is installed
	$(BIN)/python scripts/write_constraints.py

clean:  ## remove the virtual environment and the embedded service's state
	rm -rf $(VENV) .cliprd
