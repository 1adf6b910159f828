# make demo    install, train on phantom data, export, infer: a few minutes
# make test    install, run the tests
# make check   install, lint, type check
# make clean   remove what the others wrote, but for the environment

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test check clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(READY)
	rm -rf demo
	mkdir demo
	@set -e; cd demo; PATH="$(CURDIR)/$(BIN):$$PATH"; export PATH CDT_CACHE="$(CURDIR)/demo/cache"; \
	set -x; \
	cdt-train --kshot 5; \
	cdt-export --fp16; \
	cdt-infer models/phantom_data/new_patient/ct models/phantom_data/new_patient/*.tif; \
	set +x; \
	echo; \
	echo "written   demo/models (checkpoints, curves, metrics.json, phantom_data)"; \
	echo "          demo/engines (the bundle)"; \
	echo "next      put your data in DATA/ct_data and DATA/pathology_data with labels.csv, then"; \
	echo "          . .venv/bin/activate && cdt-train --kshot 5 --data-dir DATA --output-dir mine"

test: $(READY)
	$(BIN)/python -m pytest --cov --cov-report=term

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf demo .coverage .pytest_cache .mypy_cache .ruff_cache
