# make quickstart   the whole experiment: demonstrations, imitation, reinforcement learning, evaluation, report
#                   OUTPUT=runs/again SET="seed=1 runner.max_epochs=30" for another folder or other params
# make test         linter, types and tests; `make test-slow` adds the ones that take minutes
# make docs         the documentation as a site, in site/; `python -m http.server -d site` shows it with its search
# make serve        Prefect's server and a worker on this machine, for `prefect deployment run libero-sweep/quickstart`
# make mlflow       MLflow's pages on this machine, http://127.0.0.1:5000
# make doctor       check this machine
# Each sets the machine up first; the second time that takes no time.

SHELL := /bin/bash
STAMP := .venv/.set-up
BIN := .venv/bin
EXPERIMENT ?= quickstart
# DVC starts the stages as `pi0rl ...`
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: quickstart serve mlflow setup doctor docs lint types browser test test-slow lock clean

quickstart: $(STAMP)
	pi0rl run $(EXPERIMENT) $(foreach override,$(SET),--set $(override)) $(if $(OUTPUT),--output $(OUTPUT))

serve: $(STAMP)
	python -m flows.serve

mlflow: $(STAMP)
	MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false \
		mlflow server --backend-store-uri $${MLFLOW_TRACKING_URI:-sqlite:///$(CURDIR)/mlflow.db} --workers 1

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt scripts/setup
	scripts/setup
	@touch $@

doctor: $(STAMP)
	pi0rl doctor

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 mkdocs build --strict

lint: $(STAMP)
	ruff check
	ruff format --check

types: $(STAMP)
	pyright

browser: $(STAMP)
	scripts/setup browser

test: lint types browser
	pytest -m "not slow"

test-slow: lint types browser
	pytest

# After changing a pin in pyproject.toml: install it, then write down what it pulled in
lock:
	$(BIN)/python -m pip install -e '.[dev]'
	$(BIN)/python scripts/lock.py > constraints.txt.new && mv constraints.txt.new constraints.txt

# Outputs of experiments stay (runs/, reports/, DVC's cache); see `dvc gc` for the cache
clean:
	rm -rf .venv site .prefect .pytest_cache .ruff_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
