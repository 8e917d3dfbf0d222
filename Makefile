# Everything happens in .venv, built on first use from pyproject.toml and constraints.txt.
# Another Python than `python3`: PYTHON=python3.12 make demo

PYTHON ?= python3
BIN    := .venv/bin
# Not byte-compiled: that is half of the installing time, for modules of which few are ever imported.
PIP    := -m pip install -qq --no-compile --disable-pip-version-check
# Containers tend to set it: then every Python that a test starts compiles all that it imports anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo test lint figures lock clean

help:  ## these lines
	@sed -n 's/^\([a-z]*\):.*  ## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

demo: .venv/experiments.stamp  ## subset training, fine-tuning and Adam on digits: a table and figures, in minutes
	$(BIN)/python -m experiments.demo --again

test: lint  ## the linters, then every test
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile

lint: .venv/test.stamp  ## ruff and pyright
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/basedpyright

figures: .venv/experiments.stamp  ## draw the figures from the committed results
	$(BIN)/python -m paper_figures

lock:  ## renew constraints.txt (with the oldest supported Python, so that the newer ones find every version too)
	$(PYTHON) -m venv --clear .venv-lock && .venv-lock/bin/python $(PIP) -e '.[test]'
	.venv-lock/bin/python -m pip freeze --exclude-editable > constraints.txt && rm -r .venv-lock

clean:  ## remove .venv, caches and the demo's output
	rm -rf .venv .venv-lock .pytest_cache .ruff_cache .hypothesis out
	find subsetopt experiments paper_figures tests -name __pycache__ -prune -exec rm -rf {} +

# A stamp says which extra is installed; a changed list of packages makes it stale. `test` includes `experiments`.
.venv/%.stamp: pyproject.toml constraints.txt | .venv/created.stamp
	@echo "Installing subsetopt[$*] into .venv, which takes about a minute ..."
	@$(BIN)/python $(PIP) -c constraints.txt -e '.[$*]'
	@touch .venv/experiments.stamp $@

# ensurepip is asked for first: without it, `venv` leaves half a .venv behind.
.venv/created.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo "subsetopt needs \
	Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>/dev/null || echo missing). \
	Name another: PYTHON=python3.12 make ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "'$(PYTHON)' cannot make virtual environments. \
	On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	@$(PYTHON) -m venv --clear .venv && touch $@
