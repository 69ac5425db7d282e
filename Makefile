# make demo   the environment, a part of the pipeline on the embedded corpus (`dvc repro`: all), and where to look
# make test   the environment if need be, and the test suite
# make lint   formatter, linter, type checker, import contracts
# make pins   write constraints.txt anew from the environment

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
# Each of a hundred commands would compile torch and transformers anew: four seconds instead of two.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: env demo test lint pins readme
env: $(VENV)/.ready

# uv, itself from the package index, installs the pinned environment in well under a minute where pip takes several.
$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Decant needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	uv pip install --quiet --python $(VENV)/bin/python --constraint constraints.txt --editable '.[dvc,embedded,test,lint]'
	@touch $@

# What of params.yaml the demo makes: `dvc repro` makes the rest, and nothing of this again.
DEMO_MODELS := logmel hubert robust wavlm wav2vec2 distil ekd-heads
DEMO := similarity $(foreach model,$(DEMO_MODELS),$(foreach task,pr kws sid er,probe@$(model)-$(task))) \
  $(foreach model,logmel hubert distil,probe@$(model)-sv)

demo: env
	decant warm dvc repro $(DEMO)
	decant warm dvc repro --single-item profile report
	@echo
	@echo "Done. Open the report: $(CURDIR)/reports/index.html"
	@echo "'dvc repro' goes on with the other students of params.yaml; change one there, and nothing but that one runs again."

test: env
	pytest -n 2 --dist worksteal

lint: env
	ruff format --check .
	ruff check .
	lint-imports
	mypy

# The table of the README, from the reports of the last run.
readme: env
	decant report --manifest data/manifest.jsonl --waves receipts/waves.json --quarantine data/quarantine.json \
	  --receipts receipts/teachers --features receipts/features --models models --probes reports/probe --similarity reports/similarity --profile reports/profile.json --out reports \
	  --readme README.md

pins: env
	@uv pip freeze --python $(VENV)/bin/python --exclude-editable > constraints.txt
