# Each target sets up what it needs in .venv. Python 3.10 to 3.13: `make PYTHON=python3.12 demo`.
PYTHON ?= python3
CONSTRAINTS := -c constraints.txt
# setuptools warns at length of what every editable install does: pip runs without such warnings.
PIP := -W ignore::UserWarning -m pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo esci teacher space bench test test-oldest lint clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# glibc hands large blocks back to the kernel after every step and faults them in again: training on a CPU feels it.
demo esci teacher: export MALLOC_MMAP_MAX_ := 0
demo esci teacher: export MALLOC_TRIM_THRESHOLD_ := 20000000000

demo: .venv/demo  ## Train, evaluate, save and reload LRKD students on the embedded marketplace (10 minutes, 2 cores)
	.venv/bin/python -m recipes.demo

esci: .venv/demo  ## A teacher and students on real pairs: make esci ESCI=FOLDER with pairs.parquet and completions.parquet
	@test -f "$(ESCI)/pairs.parquet" -a -f "$(ESCI)/completions.parquet" || \
		{ echo "make esci ESCI=FOLDER: a folder with pairs.parquet and completions.parquet"; exit 2; }
	.venv/bin/python -m recipes.data.prepare --config recipes/configs/data/esci_local.yaml \
		--source "$(ESCI)/pairs.parquet" --output runs/esci/pairs
	.venv/bin/python -m recipes.teacher.evaluate --config recipes/configs/teacher/evaluate_esci.yaml \
		--completions "$(ESCI)/completions.parquet" --output runs/esci/teacher
	.venv/bin/python -m recipes.rationales.build --pairs runs/esci/pairs \
		--completions "$(ESCI)/completions.parquet" --output runs/esci/rationales.parquet
	.venv/bin/python -m recipes.rationales.embed --encoder minilm --max_length 256 \
		--rationales runs/esci/rationales.parquet --output runs/esci/rationales_embedded.parquet
	.venv/bin/python -m recipes.student.bench --config recipes/configs/student/esci_bench.yaml

TEACHER := runs/bazaar_teacher
CONFIGS := --config recipes/configs/teacher/bazaar
teacher: .venv/teacher  ## A tiny teacher learns to reason on the marketplace: SFT, DPO, held-out pairs (half an hour, 1 core)
	.venv/bin/python -m recipes.data.bazaar $(CONFIGS)/data.yaml
	.venv/bin/python -m recipes.teacher.scripted --pairs $(TEACHER)/bazaar --samples 5 --output $(TEACHER)/completions.parquet
	.venv/bin/python -m recipes.teacher.sft_data $(CONFIGS)/sft_data.yaml
	.venv/bin/python -m recipes.teacher.tiny $(CONFIGS)/base.yaml
	.venv/bin/python -m recipes.teacher.sft $(CONFIGS)/sft.yaml
	.venv/bin/python -m recipes.teacher.sft_data $(CONFIGS)/sft_structured_data.yaml
	.venv/bin/python -m recipes.teacher.sft $(CONFIGS)/sft_structured.yaml
	.venv/bin/python -m recipes.teacher.preferences $(CONFIGS)/preferences.yaml
	.venv/bin/python -m recipes.teacher.preferences $(CONFIGS)/preferences.yaml --splits validation --size 200 \
		--output $(TEACHER)/preferences_validation.parquet
	.venv/bin/python -m recipes.teacher.dpo $(CONFIGS)/dpo.yaml
	.venv/bin/python -m recipes.teacher.generate $(CONFIGS)/generate.yaml
	.venv/bin/python -m recipes.teacher.evaluate $(CONFIGS)/evaluate.yaml
	.venv/bin/python -m recipes.teacher.generate $(CONFIGS)/generate.yaml --adapter $(TEACHER)/dpo \
		--output $(TEACHER)/generated_dpo.parquet
	.venv/bin/python -m recipes.teacher.evaluate $(CONFIGS)/evaluate.yaml --adapter $(TEACHER)/dpo \
		--completions $(TEACHER)/generated_dpo.parquet --output $(TEACHER)/evaluation_dpo

MODEL ?= runs/demo/students/lrkd-gat-0
space: .venv/space  ## The Space in a browser, on the demo's student: make space MODEL="FOLDER owner/name" for others
	.venv/bin/python space/app.py --model $(MODEL)

# With MODEL, PAIRS (its folder of pairs) and LABELS: that student; else a quick one, on the bazaar.
BENCHED := $(if $(PAIRS),--model $(MODEL) --pairs $(PAIRS) --labels $(LABELS))
bench: .venv/bench  ## Speed, side by side with the peers: recipes/results (15 minutes, 2 cores; MODEL=, PAIRS=, LABELS=)
	.venv/bin/python -m recipes.bench.throughput $(BENCHED)
	.venv/bin/python -m recipes.bench.latency $(BENCHED)
	.venv/bin/python -m recipes.bench.item_cache $(BENCHED)
	.venv/bin/python -m recipes.bench.scaling $(BENCHED)
	MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=20000000000 .venv/bin/python -m recipes.bench.efficiency --config recipes/configs/bench/efficiency_cpu.yaml

# Two test files at a time, each with one thread: more of both only get in each other's way.
PARALLEL := -n 2 --dist loadfile
test test-oldest: export OMP_NUM_THREADS := 1

test: .venv/dev .venv-oldest/done lint  ## Everything CI checks: lint, types, tests, inference on the oldest transformers
	LRKD_OLDEST_PYTHON=$(CURDIR)/.venv-oldest/bin/python .venv/bin/python -m pytest $(PARALLEL)
	$(MAKE) test-oldest

test-oldest: .venv-oldest/done  ## The models and their remote code on the oldest supported transformers
	.venv-oldest/bin/python -m pytest $(PARALLEL) tests/modeling --durations=3

lint: .venv/dev  ## ruff and mypy
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

clean:  ## Remove the virtual environments and caches (runs/ stays)
	rm -rf .venv .venv-oldest .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info

# One stamp an extra: `make demo` does not wait for the tools of the tests.
.venv/bench .venv/demo .venv/dev .venv/space .venv/teacher: .venv/%: pyproject.toml constraints.txt | .venv/bin/python
	@echo "Installing the '$*' extra into .venv (a few minutes the first time)"
	.venv/bin/python $(PIP) $(CONSTRAINTS) --editable '.[$*]'
	@touch $@

.venv-oldest/done: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	@echo "Installing the oldest supported versions into .venv-oldest"
	.venv-oldest/bin/python $(PIP) -c constraints-oldest.txt pytest pytest-xdist hypothesis sentence-transformers --editable .
	@touch $@

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "Python 3.10 to 3.13 is needed, $$($(PYTHON) --version) was found: make PYTHON=python3.12 ..."; exit 1; }
	$(PYTHON) -m venv .venv
	@.venv/bin/python $(PIP) --upgrade pip
