# Everything runs from .venv, which `make install` creates. PORT, DATA_DIR, DATABASE_URL and
# REDIS_CACHE_URL are passed on.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
PIP := $(VENV)/bin/pip install --quiet --disable-pip-version-check --no-input -c constraints.txt
PYTEST := $(VENV)/bin/pytest -n 2 --dist worksteal
export PORT DATA_DIR DATABASE_URL REDIS_CACHE_URL

.PHONY: help install run demo test test-long test-cache faults model bench lint clean
.DEFAULT_GOAL := help

help: ## Show this
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

install: $(STAMP) ## Set everything up

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed: make PYTHON=python3.12"; exit 1; }
	@echo "setting up $(VENV) ..."
	@$(PYTHON) -m venv $(VENV) \
		|| { echo "$(PYTHON) cannot make a virtual environment: install its venv module"; exit 1; }
	@$(PIP) -e '.[cli,crm,dev]'
	@touch $(STAMP)

run: $(STAMP) ## Start the CRM, its servers and demo data; then open http://localhost:4001/
	@$(VENV)/bin/python -m crm run

demo: $(STAMP) ## The same with traffic and outages; ARGS="--rate 20 --minutes 5"
	@$(VENV)/bin/python -m crm demo $(ARGS)

test: $(STAMP) ## Run the tests on servers that they start themselves (at most 6 minutes)
	@$(PYTEST) -m "not long" $(ARGS)

test-long: $(STAMP) ## Run the long tests: runbooks, faults, schedules, browser (at most 25 minutes)
	@$(PYTEST) -m long $(ARGS)

test-cache: $(STAMP) ## Check a running system's cache, or one started for it
	@$(VENV)/bin/python -m crm test-cache $(ARGS)

faults: $(STAMP) ## Break servers and processes under load and check every read: SECONDS=60 SEED=7
	@$(VENV)/bin/python -m tests.faults.run --seconds $(or $(SECONDS),60) \
		--seed $(or $(SEED),1) $(ARGS)

model: $(STAMP) ## Check the protocol's models (needs spin and a C compiler)
	@$(VENV)/bin/python models/run.py $(ARGS)

# BENCH names a script of bench/: run, metrics, hits, outage, outbox, replay or resp.
bench: $(VENV)/.installed-bench ## Measure and compare with every peer: BENCH=run QUICK=1
	@$(VENV)/bin/python bench/$(or $(BENCH),run).py \
		$(if $(QUICK),$(if $(filter run metrics,$(or $(BENCH),run)),--quick)) $(ARGS)

$(VENV)/.installed-bench: $(STAMP)
	@$(PIP) -e '.[cli,crm,dev,bench]'
	@touch $@

lint: $(STAMP) ## Check style and types
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy

clean: ## Remove the virtual environment (not the data)
	rm -rf $(VENV)
