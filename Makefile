# Thin: every target is one or two plain commands (README: the same without make).
# Paths are relative, so a checkout under a name with spaces works.

PYTHON ?= python3
PY = .venv/bin/python
PIP_QUIET = $(if $(CI),--quiet --progress-bar off)

.DEFAULT_GOAL := help
.PHONY: help run test lab notebooks slides sweeps lint bench bench-peers gpu clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | awk -F'|' '{printf "%-20s %s\n", $$1, $$2}'

run: .venv/.installed ## run all notebooks, print the results (NOTEBOOKS="05 09"; CT_PROFILE=quick; small install: TORCH=cpu)
	$(PY) notebooks/run_notebooks.py $(if $(NOTEBOOKS),--only $(NOTEBOOKS))

test: .venv/.installed ## ruff, unit tests and every notebook against its stored outputs
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pytest

lab: .venv/.installed ## JupyterLab on notebooks/
	cd notebooks && ../$(PY) -m jupyterlab

notebooks: .venv/.installed ## run the notebooks in profile standard and store their outputs in place
	$(PY) notebooks/run_notebooks.py --in-place $(if $(NOTEBOOKS),--only $(NOTEBOOKS))
	$(PY) notebooks/run_notebooks.py --in-place --solutions $(if $(NOTEBOOKS),--only $(NOTEBOOKS))

slides: .venv/.installed ## slides of the taught notebooks, in data/slides (some: NOTEBOOKS="05 09")
	$(PY) notebooks/make_slides.py $(if $(NOTEBOOKS),--only $(NOTEBOOKS))

SWEEPS = 10_augmentation 11_optimizers 12_epochs_and_unfreezing
sweeps: .venv/.installed ## make all runs of notebooks 10 to 12 anew (hours on 2 cores), and the records that come with the course
	for name in $(SWEEPS); do CT_PROFILE=standard $(PY) -m ctutils sweep notebooks/plans/$$name.toml \
		--pack data/reference_runs/standard/$$name || exit 1; done

lint: .venv/.installed ## ruff alone
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

bench: .venv/.installed ## the benchmark table
	$(PY) tests/bench/bench.py

bench-peers: .venv/.installed ## the same work in other libraries, in an environment of its own
	$(PY) tests/bench/peers.py

PROFILE ?= full
gpu: .venv/.installed ## on a GPU: the deck's six backbones at full size, head and all layers; records in data/reference_runs/full
	CT_PROFILE=$(PROFILE) $(PY) -m ctutils sweep notebooks/plans/gpu.toml --pack "$(or $(OUT),data/reference_runs/$(PROFILE))"

clean: ## remove caches and executed copies; data sets, run records and .venv stay
	rm -rf .pytest_cache .ruff_cache build dist *.egg-info data/cache data/executed
	find ctutils tests notebooks -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf

RIGHT_VERSION = import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))
TORCHVISION_WORKS = import torch, torchvision; \
	torchvision.ops.nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([1.0]), 0.5)

# TORCH=cpu: torch without CUDA from PyTorch's own index and no other one, then the rest from the usual one.
TORCH_INDEX = https://download.pytorch.org/whl/$(TORCH)
SMALL_TORCH = PIP_CONFIG_FILE=/dev/null PIP_EXTRA_INDEX_URL= PIP_FIND_LINKS= \
	$(PY) -m pip install --disable-pip-version-check $(PIP_QUIET) --no-deps --retries 1 --timeout 20 \
	--index-url $(TORCH_INDEX) "torch>=2.14" "torchvision>=0.29" || { \
	echo "Found no torch at $(TORCH_INDEX) (no such build, or no way there)." \
		"Expected PyTorch's own package index." \
		"To mend: leave TORCH=$(TORCH) out; pip then takes torch from the usual index."; exit 1; }

.venv/.installed: pyproject.toml
	@found=""; if ! $(PY) -m pip --version >/dev/null 2>&1; then \
		for p in "$(PYTHON)" python3.14 python3.13 python3.12 python3.11; do \
			if "$$p" -c '$(RIGHT_VERSION)' >/dev/null 2>&1; then found="$$p"; break; fi; \
		done; \
		if test -z "$$found"; then \
			echo "Found no Python 3.11 to 3.14 (tried $(PYTHON), python3.14, python3.13, python3.12, python3.11)." \
				"Expected one of them. To mend: install one, or name it: make PYTHON=/path/to/python3.12"; \
			exit 1; \
		fi; \
		echo "Making .venv with $$found"; \
		"$$found" -m venv --clear .venv || exit 1; \
	fi
	@$(if $(TORCH),$(SMALL_TORCH))
	@echo "Installing into .venv (once; minutes$(if $(TORCH),,, and up to 6 GB))"
	@$(PY) -m pip install --disable-pip-version-check $(PIP_QUIET) -e '.[test]'
	@$(PY) -c '$(TORCHVISION_WORKS)' || { \
		echo "Found a torch and a torchvision that do not fit each other." \
			"Expected torch 2.14 or newer with its torchvision." \
			"To mend: rm -rf .venv, then run the same command again."; exit 1; }
	@touch $@
