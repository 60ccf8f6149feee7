# Every target builds what it needs first: .venv, then the packages, each step once per change of its inputs.
PYTHON  ?= python3
WORKERS ?= 3
PROMPT  ?= a large red circle moving slowly to the right over a cloudy sky
VENV    := .venv
# Python compiles a module to bytecode when it is first imported. Most modules never are, and compiling all of
# them takes pip half of the installation's time. Where Python may not keep bytecode, pip still compiles.
NO_COMPILE := $(if $(PYTHONDONTWRITEBYTECODE),,--no-compile)
PIP     := $(VENV)/bin/python -m pip install --disable-pip-version-check $(NO_COMPILE) -c constraints.txt
INPUTS  := pyproject.toml setup.py constraints.txt
# A worker takes file after file, in the order of tests/conftest.py. Three, since two leave two cores idle for a
# quarter of the time, in which tests of servers wait.
PARALLEL := -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: demo serve test test-gpu soak lint format bench toy-study clean
.NOTPARALLEL:  # one pip at a time in one environment

demo: $(VENV)/.core  ## eight seconds of video from a prompt, on any machine
	$(VENV)/bin/rfengine generate "$(PROMPT)" --model tiny --seconds 8 --seed 3 -o demo.mp4

serve: $(VENV)/.serve  ## a server on this machine, and its page in your browser; SERVE_ARGS="--model DIRECTORY"
	$(VENV)/bin/rfengine serve --open-browser $(SERVE_ARGS)

test: $(VENV)/.dev  ## all tests; those that need a GPU skip themselves where there is none
	$(VENV)/bin/python -m pytest $(PARALLEL) $(PYTEST_ARGS)

test-gpu: $(VENV)/.dev  ## the kernel tests and all that need a GPU, on the GPU that is here
	$(VENV)/bin/python -m pytest $(PARALLEL) tests/kernels $(PYTEST_ARGS)
	$(VENV)/bin/python -m pytest $(PARALLEL) -m gpu $(PYTEST_ARGS)

soak: $(VENV)/.dev  ## the tests of the server that take minutes to hours
	$(VENV)/bin/python -m pytest -m soak $(PYTEST_ARGS)

lint: $(VENV)/.lint  ## what pre-commit and CI check
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(VENV)/.lint  ## mend what lint can mend
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: $(VENV)/.core  ## frames per second of this machine, end to end and part by part
	$(VENV)/bin/python bench/throughput.py $(BENCH_ARGS)

toy-study: $(VENV)/.dev  ## DMD against Re-DMD, sinks, eviction: trained and measured; STUDY_ARGS="--size gpu" on a GPU
	$(VENV)/bin/python -m studies.toy.run $(STUDY_ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache

# A stamp appears only when its step has finished, so an interrupted set-up starts that step again.
$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rfengine needs Python 3.11 or newer, \
	not " + sys.version.split()[0] + "; try make PYTHON=python3.11")'
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.lint: $(VENV)/.made constraints.txt
	$(PIP) ruff
	@touch $@

# torch comes first and the build is not isolated, so that no step fetches a second torch or another setuptools.
# .dev includes all of .core and .serve, so that `make test` builds the package once.
$(VENV)/.dev: EXTRA := [dev]
$(VENV)/.serve: EXTRA := [serve]
$(VENV)/.core $(VENV)/.serve $(VENV)/.dev: $(VENV)/.made $(INPUTS)
	$(PIP) torch setuptools
	$(PIP) --no-build-isolation --editable .$(EXTRA)
	@touch $(VENV)/.core $(if $(filter %.dev,$@),$(VENV)/.serve) $@
