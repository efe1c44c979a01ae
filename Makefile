# Everything runs in virtual environments that these targets make; PYTHON is what makes them.
PYTHON ?= python3
VENV ?= .venv
PIP_OPTIONS ?=
# That test at a time. They wait more than they compute: four take two thirds of the time of two.
WORKERS ?= 4
# With --cov, the lines that the tests reach are counted, for half as much again of their time.
COVERAGE ?=
# What the tests try in newer versions than tests/oldest.txt has.
NEWEST ?= --group newest
# How much `make bench` measures: 0.5 takes half of the rounds.
SHARE ?= 1
# That the benchmarks take: no contender supports a newer one than 3.13. Those of pyenv need its path.
NEWEST_PYTHON = $(shell for p in python3.13 ~/.pyenv/versions/3.13.*/bin/python \
	python3.12 ~/.pyenv/versions/3.12.*/bin/python $(PYTHON); do \
	$$p -c 'import ensurepip' 2>&- && echo $$p && break; done)

# Set in many a container, it lets each process that a test starts compile all that it imports.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-oldest lint format docs docs-serve bench bench-quick soak clean

demo: $(VENV)/.demo  ## the main job, shown; DATABASE_URL=postgresql+asyncpg://… for another server
	@$(VENV)/bin/python -m examples.demo

test: $(VENV)/.test  ## every test; TEST_DATABASE_URL=postgresql://… for another server
	$(VENV)/bin/python -m pytest --numprocesses $(WORKERS) --dist worksteal $(COVERAGE)

test-oldest:  ## every test, on the oldest versions that are supported
	$(MAKE) test VENV=.venv-oldest NEWEST= PIP_OPTIONS="--constraint tests/oldest.txt"

lint: $(VENV)/.lint  ## style, types, and which room imports which
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/ruff check
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

format: $(VENV)/.lint
	$(VENV)/bin/ruff format
	$(VENV)/bin/ruff check --fix

docs: $(VENV)/.docs  ## the site, in site/; every link and anchor is checked
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

docs-serve: $(VENV)/.docs  ## the site, while it is written
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs serve

bench: .venv-bench/.all  ## what a request costs, here and elsewhere; BENCH_DATABASE_URL=postgresql://… for another server
	@.venv-bench/bin/python -m benchmarks --share $(SHARE)
	@.venv-bench/bin/python -m benchmarks.report

bench-quick: .venv-bench/.all  ## the same with fewer rounds, for a first look
	@.venv-bench/bin/python -m benchmarks --share 0.2 --print

soak: $(VENV)/.test  ## 20,000 requests, after which nothing may have leaked or be lost
	$(VENV)/bin/python -m tests.soak

clean:
	rm -rf .venv .venv-oldest .venv-bench site

# The version before this one has the same name: a directory of its own, with the same dependencies.
.venv-bench/.all: pyproject.toml
	@$(MAKE) .venv-bench/.bench VENV=.venv-bench PYTHON=$(NEWEST_PYTHON)
	@.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
		--target ".venv-bench/context-async-sqlalchemy 2.1.9" context-async-sqlalchemy==2.1.9
	@touch $@

$(VENV)/.test $(VENV)/.lint: EXTRA = $(NEWEST)
$(VENV)/.test $(VENV)/.lint: APART = --no-deps --group apart
$(VENV)/.%: pyproject.toml
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=25.1"
	@$(VENV)/bin/python -m pip install --quiet $(PIP_OPTIONS) --group $* $(EXTRA) --editable .
	@test -z "$(APART)" || $(VENV)/bin/python -m pip install --quiet $(PIP_OPTIONS) $(APART)
	@touch $@
