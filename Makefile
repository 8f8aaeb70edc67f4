# Each target sets up what it needs: `make demo` in a fresh clone creates .venv, installs into it, builds and runs.
# To use an interpreter that has everything already: make test PYTHON=/path/to/python (nothing is installed then).
VENV ?= .venv
TORCH ?= torch==2.13.0
BOOTSTRAP ?= python3
PYTEST_ARGS ?=
BENCH_ARGS ?=

ifdef PYTHON
  py := $(PYTHON)
  deps :=
else
  py := $(VENV)/bin/python
  deps := $(VENV)/.installed
endif

sources := $(wildcard csrc/*.c csrc/*.h csrc/kernels/*)
c_files := $(sources) $(wildcard tests/*/*.c)
extension := peft_c/_C.abi3.so
clang_format = $$(PATH="$(dir $(py)):$$PATH" command -v clang-format)
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
export HF_HUB_OFFLINE ?= 1

.PHONY: help setup demo notebook test bench roofline docs lint format sanitize dist clean
help:
	@echo "make demo      train, switch, merge and save two adapters of a real model; writes out/demo.png"
	@echo "make test      the test suite"
	@echo "make bench     peft_c, peft, plain torch and the floor side by side; BENCH_ARGS='--quick --only merge'"
	@echo "make roofline  the kernels under the machine's limits; writes docs/roofline.png"
	@echo "make docs      check the documentation: links, and that its example runs"
	@echo "make lint      ruff, clang-format, and a build with -Werror"
	@echo "make sanitize  the C code under AddressSanitizer and UBSan"
	@echo "make notebook  run examples/demo.py as a notebook and store it"
	@echo "make dist      sdist and wheel in dist/"
	@echo "make clean     remove what was built and written; VENV=$(VENV) stays (make distclean removes it too)"

setup: $(extension)

$(VENV)/.installed: requirements-dev.txt
	@$(BOOTSTRAP) -c 'import sys; sys.exit("peft_c needs Python 3.10 or newer") if sys.version_info < (3, 10) else None'
	test -x $(VENV)/bin/python || $(BOOTSTRAP) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q "setuptools>=77" wheel "numpy>=2.0"
	$(VENV)/bin/python -m pip install -q "$(TORCH)"
	$(VENV)/bin/python -m pip install -q -r requirements-dev.txt
	touch $@

# Built in place; the editable install lets $(VENV)/bin/python import peft_c from anywhere.
$(extension): $(sources) setup.py pyproject.toml $(deps)
ifdef PYTHON
	$(py) setup.py -q build_ext --inplace
else
	$(py) -m pip install -q --no-build-isolation --no-deps -e .
endif
	@touch $@

demo: $(extension)
	$(py) examples/demo.py

notebook: $(extension)
	$(py) examples/build_notebook.py

test: $(extension)
	$(py) -m pytest -n $(or $(WORKERS),auto) -q $(PYTEST_ARGS)

bench: $(extension)
	$(py) benchmarks/bench.py $(BENCH_ARGS)

roofline: $(extension)
	$(py) benchmarks/roofline.py

docs: $(extension)
	$(py) -m pytest -q tests/isolated/test_docs.py

lint: $(deps)
	$(py) -m ruff check .
	$(py) -m ruff format --check .
	@if [ -n "$(clang_format)" ]; then "$(clang_format)" --dry-run -Werror $(c_files); \
	else echo "clang-format is not installed: the layout of the C code is not checked"; fi
	PEFT_C_WERROR=1 $(py) setup.py -q build_ext --build-temp build/werror --build-lib build/werror

format: $(deps)
	$(py) -m ruff check --fix .
	$(py) -m ruff format .
	@if [ -n "$(clang_format)" ]; then "$(clang_format)" -i $(c_files); fi

sanitize: $(extension)
	bash tests/kernels/run_sanitized.sh
	PYTHON=$(py) bash tests/runtime/sanitize.sh

dist: $(deps)
	$(py) -m build

clean:
	rm -rf build dist out *.egg-info .pytest_cache .ruff_cache .hypothesis $(extension)
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
