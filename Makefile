# Every target sets the project up first, which takes a second when nothing has changed.
PYTHON_BIN := .venv/bin/python
# One file of tests to a process at a time. One thread each: their tensors are small, and sums depend on the number.
PYTEST_OPTIONS := --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder
PYTEST := OMP_NUM_THREADS=1 $(PYTHON_BIN) -m pytest $(PYTEST_OPTIONS)

# seeds.py comes after these, since it takes the demo's data.
BENCHMARKS := kernels loader pack store label branches latency step

.PHONY: help setup demo test test-slow test-python lint docs check bench bench-seeds ablation-smoke gpu-check gpu-kit gpu-table clean

help:
	@echo "make demo   pack, label, train, fold and export on real images; prints a table (6 to 10 minutes on 2 cores)"
	@echo "make check  what must pass before a pull request: make lint, make docs, make test"
	@echo "make lint   ruff and pyright"
	@echo "make test   the tests"
	@echo "make docs   the pages of docs/ as a site in build/docs; warnings and broken links are errors"
	@echo "make test-slow  the tests that take more than a minute each"
	@echo "make test-python PYTHON=python3.12 [LOWEST=1|NEWEST=1]  the tests on another Python, or on other versions:"
	@echo "            the lowest that pyproject.toml declares, or the newest there are"
	@echo "make bench  the benchmarks, and for the last of them the demo"
	@echo "make ablation-smoke  every row of the study in configs/README.md, two steps each, on a few digits"
	@echo "make gpu-check  everything a GPU must prove, within 25 minutes; results go to gpu-report.json (GPU_CHECK=options)"
	@echo "make gpu-kit  a folder to copy to a GPU machine without network (KIT_PYTHON=python3.12: that machine's version)"
	@echo "make gpu-table  put the tables of benchmarks/reports/ into docs/benchmarks.md"
	@echo "make clean  remove what the demo made"

setup: .venv/.ready

SOURCES := pipeline/images/_jpeg.c trainer/students/fused/_depthwise.c trainer/students/fused/_depthwise.h
.venv/.ready: pyproject.toml setup.py $(SOURCES) constraints.txt scripts/setup.sh
	scripts/setup.sh

demo: setup
	$(PYTHON_BIN) scripts/demo.py

test: setup
	$(PYTEST)

test-slow: setup
	$(PYTEST) -m slow

# An environment of its own, which takes as long and as much room as the first set-up. PYTEST_ARGUMENTS: less than all.
OTHER = build/python-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')$(VERSIONS)
VERSIONS = $(if $(LOWEST),-lowest,$(if $(NEWEST),-newest))
VERSIONS_OF = $(if $(LOWEST),build/lowest.txt,$(if $(NEWEST),/dev/null,constraints.txt))
PYTHON ?= python3
test-python:
	@mkdir -p build
	$(if $(LOWEST),$(PYTHON) scripts/lowest.py > build/lowest.txt)
	PYTHON=$(PYTHON) scripts/setup.sh $(OTHER) $(VERSIONS_OF)
	OMP_NUM_THREADS=1 $(OTHER)/bin/python -m pytest $(PYTEST_OPTIONS) $(PYTEST_ARGUMENTS)

lint: setup
	$(PYTHON_BIN) -m ruff check .
	$(PYTHON_BIN) -m ruff format --check .
	$(PYTHON_BIN) -m pyright

check:
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory docs
	@$(MAKE) --no-print-directory test

docs: setup
	$(PYTHON_BIN) scripts/recipe_keys.py build/recipe-keys
	$(PYTHON_BIN) -m zensical build --strict --clean
	$(PYTHON_BIN) scripts/check_links.py build/docs

bench: setup
	@for name in $(BENCHMARKS); do echo "== $$name"; $(PYTHON_BIN) benchmarks/$$name.py || exit 1; done
	@$(MAKE) --no-print-directory bench-seeds

bench-seeds: demo
	@echo "== seeds"
	$(PYTHON_BIN) benchmarks/seeds.py

ablation-smoke: setup
	OMP_NUM_THREADS=1 $(PYTHON_BIN) scripts/ablation_smoke.py

gpu-check: setup
	@status=0; $(PYTHON_BIN) benchmarks/gpu_check.py $(GPU_CHECK) || status=$$?; [ $$status -ne 2 ] || exit 2; \
	$(PYTHON_BIN) -m pytest -m gpu || status=$$?; exit $$status

# KIT_PYTHON is a Python here, with its headers, of the version that the GPU machine has.
KIT_PYTHON ?= python3.12
gpu-kit: setup
	$(PYTHON_BIN) scripts/gpu_kit.py --python $(KIT_PYTHON)

gpu-table: setup
	$(PYTHON_BIN) benchmarks/gpu_table.py --into docs/benchmarks.md $(wildcard benchmarks/reports/*.json)

clean:
	rm -rf data/demo runs/demo export/demo
