# Every target sets the project up first, which takes a second when nothing has changed.
PYTHON_BIN := .venv/bin/python
# One file of tests to a process at a time. One thread each: their tensors are small, and sums depend on the number.
PYTEST := OMP_NUM_THREADS=1 $(PYTHON_BIN) -m pytest \
	--numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

# seeds.py comes after these, since it takes the demo's data.
BENCHMARKS := kernels loader pack store label branches latency step

.PHONY: help setup demo test check bench bench-seeds ablation-smoke clean

help:
	@echo "make demo   pack, label, train, fold and export on real images; prints a table (about 10 minutes on 2 cores)"
	@echo "make test   the tests"
	@echo "make check  ruff, pyright and the tests"
	@echo "make bench  the benchmarks, and for the last of them the demo"
	@echo "make ablation-smoke  every row of the study in configs/README.md, two steps each, on a few digits"
	@echo "make clean  remove what the demo made"

setup: .venv/.ready

SOURCES := pipeline/_jpeg.c trainer/students/_depthwise.c trainer/students/_depthwise.h
.venv/.ready: pyproject.toml setup.py $(SOURCES) constraints.txt scripts/setup.sh
	scripts/setup.sh

demo: setup
	$(PYTHON_BIN) scripts/demo.py

test: setup
	$(PYTEST)

check: setup
	$(PYTHON_BIN) -m ruff check .
	$(PYTHON_BIN) -m ruff format --check .
	$(PYTHON_BIN) -m pyright
	$(PYTEST)

bench: setup
	@for name in $(BENCHMARKS); do echo "== $$name"; $(PYTHON_BIN) benchmarks/$$name.py || exit 1; done
	@$(MAKE) --no-print-directory bench-seeds

bench-seeds: demo
	@echo "== seeds"
	$(PYTHON_BIN) benchmarks/seeds.py

ablation-smoke: setup
	OMP_NUM_THREADS=1 $(PYTHON_BIN) scripts/ablation_smoke.py

clean:
	rm -rf data/demo runs/demo export/demo
