# Every target sets up what it needs, once: a virtual environment in .venv, with clipfast installed editable in it.
#   make demo   explain rendered scenes; the page to look at is named at the end
#   make test   all tests
#   make lint   formatting, lint, types, import layers
#   make bench  the benchmarks, beside the libraries they are compared with; BENCH=benchmarks/bench_mmel.py for one of them
#   make gallery    the documentation's pictures, with the demo model
#   make scoreboard  every method by every protocol with the demo model, in hours; stopped, it goes on where it was
#   make roar   accuracy after removing what four methods mark and training anew, in an hour
#   make study-run  memory of a run over 20,000 images
#   make study-aft  what AFT and FARE do to the demo model, in hours; stopped, it goes on where it was
#   make study-grounded  what Grad-ECLIP-guided fine-tuning does to it
#   make test-matrix  every model of open_clip against its own modules, in an hour; what `clipfast models` says
#   make test-releases  the tests that meet other libraries, with the oldest releases that are supported
#   make gpu-check  what needs a GPU: every fast path checked and timed, figures in benchmarks/results/
#   make wheel  sdist and wheel in dist/
# VENV names another environment, PYTHON the interpreter that makes it, BUILD what must be built (see setup.py).

VENV ?= .venv
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := $(VENV)/bin

# What can be built here must be built: a fallback would pass unnoticed.
ifneq ($(shell command -v c++ 2>/dev/null),)
BUILD ?= $(if $(shell command -v nvcc 2>/dev/null),strict,cpu)
else
BUILD ?= auto
endif

NATIVE := $(wildcard csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu)
CPP := $(NATIVE) $(wildcard tests/ops/*/*.h)
RESULTS ?= benchmarks/results/local.json
BENCH ?= benchmarks

.PHONY: demo test test-matrix test-releases lint format bench gallery scoreboard roar
.PHONY: study-run study-aft study-grounded gpu-check wheel clean

demo: $(VENV)/.installed
	$(BIN)/clipfast demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(ARGS)

test-matrix: $(VENV)/.dev
	$(BIN)/python scripts/verify_models.py $(ARGS)

test-releases: $(VENV)/.dev
	$(BIN)/python scripts/test_releases.py $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

bench: $(VENV)/.bench
	mkdir -p $(dir $(RESULTS))
	$(BIN)/python -m pytest $(BENCH) -o python_files='bench_*.py' -o filterwarnings=default --benchmark-json=$(RESULTS) -s $(ARGS)
	$(BIN)/python benchmarks/methods_page.py
	$(BIN)/python benchmarks/readme_figures.py

gallery: $(VENV)/.installed
	$(BIN)/python scripts/make_pictures.py
	$(BIN)/python scripts/make_gallery.py
	$(BIN)/python examples/concepts.py --out docs/images/concepts.png
	$(BIN)/python examples/typographic.py --out docs/images/typographic.png

scoreboard: $(VENV)/.dev
	$(BIN)/python scripts/make_scoreboard.py $(ARGS)

roar: $(VENV)/.dev
	$(BIN)/python scripts/make_roar.py $(ARGS)

study-run: $(VENV)/.dev
	$(BIN)/python scripts/study_run.py $(ARGS)

study-aft: $(VENV)/.dev
	$(BIN)/python scripts/study_aft.py $(ARGS)

study-grounded: $(VENV)/.dev
	$(BIN)/python scripts/study_grounded.py $(ARGS)

gpu-check: $(VENV)/.dev
	$(BIN)/python benchmarks/gpu_check.py $(ARGS)

wheel: $(VENV)/.dev
	$(BIN)/python -m build --outdir dist .

clean:
	rm -rf build dist clipfast.egg-info clipfast/_native*.so

$(VENV)/.created:
	@test -n "$(PYTHON)" || { echo "clipfast needs Python 3.11 or newer: make PYTHON=path/to/python"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.installed: $(VENV)/.created setup.py CMakeLists.txt pyproject.toml $(NATIVE)
	CLIPFAST_BUILD=$(BUILD) $(BIN)/python -m pip install --quiet --disable-pip-version-check -e . \
		|| { echo "With BUILD=auto, make leaves out the native modules that do not build here."; exit 1; }
	touch $@

$(VENV)/.dev: $(VENV)/.installed
	CLIPFAST_BUILD=none $(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

$(VENV)/.bench: $(VENV)/.dev
	CLIPFAST_BUILD=none $(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[bench]'
	touch $@
