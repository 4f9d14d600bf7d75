# Two commands do all the set-up: `make demo` and `make test`. Each needs only Python 3.10 or newer and a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo docs listing test coverage fuzz check test-loggers test-lowest format lock bench bundled clean

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/collapse-probe demo --output demo

# The site, into docs/_build/html; a warning is an error.
docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -W --keep-going -q docs docs/_build/html

listing: $(VENV)/.installed
	$(BIN)/python -c "from collapse_probe.cli.ls import STORED, listing; STORED.write_text(listing(), encoding='utf-8')"

test: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -n 2

# Every family of models in every precision, and docs/coverage.md.
coverage: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.coverage --write --processes 2

# Hostile and unlucky input of every kind, about half an hour; docs/fuzz.md.
fuzz: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --processes 2

check: test

# The tests of the experiment trackers, with all of them: trackio and mlflow hold other packages at lower releases, so they are not in dev.
test-loggers:
	$(PYTHON) -m venv .venv-loggers
	.venv-loggers/bin/python -m pip install --quiet --editable ".[dev,loggers]"
	.venv-loggers/bin/python -m pytest -q tests/training/test_logs.py

# The suite with the oldest releases that pyproject.toml declares; warnings of old releases about newer ones are not errors there.
test-lowest:
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet uv
	.venv-lowest/bin/uv pip install --quiet --python .venv-lowest/bin/python --resolution lowest-direct --editable ".[dev]"
	.venv-lowest/bin/python -m pytest -q -n 2 -W default

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock:
	rm -rf .venv-lock
	$(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet ".[dev]"
	.venv-lock/bin/python -m pip freeze --exclude collapse-probe > requirements.lock
	rm -rf .venv-lock

# What the analysis costs beside plain inference: one table, about ten minutes on two cores.
bench: $(VENV)/.installed
	$(BIN)/python benchmarks/overhead.py

bundled: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python experiments/bundle_models.py bundled-runs

clean:
	rm -rf $(VENV) .venv-loggers .venv-lowest build dist *.egg-info
