# make demo     export, validate and run the bundled demo model; no torch
# make test     everything that must hold before a change lands: lint, format, types, tests
# make matrix   every Python and version that is claimed, tried; writes docs/compatibility.md (half an hour);
#               make matrix ONLY=corners tries three of them
# make mutants  whether the tests notice small wrong changes of runtime and graphs (an hour);
#               make mutants ONLY=runtime.patching tries one module
# make fuzz     hostile files and requests by the hundred thousand against all that reads them (an hour or two);
#               make fuzz ONLY=manifest COUNT=1000 SEED=7 makes a thousand, others than by default
# make image    build the container image and run it with Podman: read-only, without privileges (as root, on Debian)
# make bench    measurements behind the README's figures (minutes; best on a quiet machine)
# make help     this list

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo-bundle
FOLDERS := runtime graphs export calibration tools
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test lint types pytest matrix mutants fuzz image bench clean

demo: $(VENV)/.installed-demo
	$(BIN)/blt-edge export demo -o $(DEMO) --force --no-validate
	$(BIN)/blt-edge build $(DEMO)
	$(BIN)/blt-edge validate $(DEMO) --golden export/demo/golden.safetensors
	$(BIN)/blt-edge generate -m $(DEMO) -p "Once upon a time" -n 200 --temperature 0.7 --seed 7

help:
	@sed -n '/^#/!q; s/^# //p' $(firstword $(MAKEFILE_LIST))

test: lint types pytest

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy does not follow an editable install's import hook: links give it the package as it will be installed.
types: $(VENV)/.installed-test
	mkdir -p $(VENV)/types/blt_edge
	ln -sfn $(foreach part,$(FOLDERS) tools/package/__init__.py tools/package/__main__.py,$(CURDIR)/$(part)) $(VENV)/types/blt_edge/
	MYPYPATH=$(VENV)/types $(BIN)/mypy -p blt_edge

# One thread for each of two workers: more threads than cores make matrix libraries wait for each other.
pytest: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

matrix: $(VENV)/.installed-test
	$(BIN)/python -m blt_edge.tools.matrix $(if $(ONLY),--only '$(ONLY)',--page docs/compatibility.md)

mutants: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m blt_edge.tools.mutation $(ONLY) --jobs 2

fuzz: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m blt_edge.tools.fuzz $(ONLY) --jobs 2 \
		$(if $(SEED),--seed $(SEED)) $(if $(COUNT),--count $(COUNT))

image:
	test -f $(DEMO)/manifest.json || $(MAKE) demo
	tools/image/check.sh $(DEMO)

bench: $(VENV)/.installed-test
	$(BIN)/blt-edge export demo -o $(DEMO) --force --no-validate -q
	$(BIN)/blt-edge build $(DEMO) -q
	$(BIN)/python -m blt_edge.tools.bench.decode --bundle $(DEMO) --checkpoint export/demo --text tests/data/alice.txt
	$(BIN)/python -m blt_edge.tools.bench.positions --bundle $(DEMO) --text tests/data/alice.txt
	$(BIN)/python -m blt_edge.tools.bench.speculation --bundle $(DEMO) --text tests/data/alice.txt
	$(BIN)/python -m blt_edge.tools.bench.overhead --bundle $(DEMO)

clean:
	rm -rf $(VENV) $(DEMO)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install -q -c constraints.txt -e '.[cpu,export,plot,serve]'
	touch $@

$(VENV)/.installed-test: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install -q -c constraints.txt -e '.[cpu,export,validate,plot,serve,dev]'
	touch $@ $(VENV)/.installed-demo
