# Everything runs in virtual environments that these targets make; PYTHON is what makes them.
PYTHON ?= python3
VENV ?= .venv
PIP_OPTIONS ?=
WORKERS ?= 2

.PHONY: demo test test-oldest lint format bench soak clean

demo: $(VENV)/.demo  ## the main job, shown; DATABASE_URL=postgresql+asyncpg://… for another server
	@$(VENV)/bin/python -m examples.demo

test: $(VENV)/.test  ## every test; TEST_DATABASE_URL=postgresql://… for another server
	$(VENV)/bin/python -m pytest --numprocesses $(WORKERS) --cov

test-oldest:  ## every test, on the oldest versions that are supported
	$(MAKE) test VENV=.venv-oldest PIP_OPTIONS="--constraint tests/oldest.txt"

lint: $(VENV)/.lint  ## style and types
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/ruff check
	$(VENV)/bin/mypy

format: $(VENV)/.lint
	$(VENV)/bin/ruff format
	$(VENV)/bin/ruff check --fix

bench: $(VENV)/.test  ## what the middleware costs
	$(VENV)/bin/python -m benchmarks.no_database

soak: $(VENV)/.test  ## 20,000 requests, after which nothing may have leaked or be lost
	$(VENV)/bin/python -m tests.soak

clean:
	rm -rf .venv .venv-oldest

$(VENV)/.%: pyproject.toml
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=25.1"
	@$(VENV)/bin/python -m pip install --quiet $(PIP_OPTIONS) --group $* --editable .
	@touch $@
