# `make demo` and `make test` need python3 (3.11 or newer) and make; everything else goes into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The oldest versions that are supported, and tools of releases, have environments of their own.
OLDEST := .venv-oldest
TOOLS := .venv-tools
PIP := pip install --quiet --disable-pip-version-check
NOT_INSTALLED := { echo "installation failed: a package index that has the versions asked for is needed"; exit 1; }
PYTEST := python -m pytest -q -n auto --maxprocesses 4 --dist worksteal
export HF_HUB_OFFLINE := 1

.PHONY: demo dev test test-oldest test-slow test-peers lint docs notebooks lock licences audit dist clean

demo: $(VENV)/installed
	@echo "== lladamedv demo"
	$(BIN)/lladamedv demo

# A tree of links for editors and type checkers, which do not follow the hooks of a plain editable installation. New
# files need it again.
dev: $(VENV)/installed-test
	$(BIN)/$(PIP) --no-deps --no-build-isolation -e . --config-settings editable_mode=strict

test: $(VENV)/installed-test
	@echo "== lint"
	$(BIN)/ruff check .
	@echo "== documentation"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo "== tests"
	$(BIN)/$(PYTEST)

test-oldest: $(OLDEST)/installed-oldest
	$(OLDEST)/bin/$(PYTEST)

# Thousands of cases of each property and fuzzer, and fifty kills of each task: an hour or more.
test-slow: $(VENV)/installed-test
	$(BIN)/python -m pytest -m slow
	LLADAMEDV_HYPOTHESIS_PROFILE=thorough $(BIN)/python -m pytest tests/properties

# Transformers' own tests with our classes; docs/peers.md says which of them fail or are left out.
PEERS := build/peers/transformers-$(shell sed -n 's/^transformers==//p' constraints.txt)
test-peers: $(VENV)/installed-test $(PEERS)/tests
	PYTHONPATH=build/peers/packages LLADAMEDV_PEERS=$(PEERS) $(BIN)/$(PYTEST) -o addopts= tests/peers

$(PEERS)/tests:
	@$(BIN)/$(PIP) --target build/peers/packages parameterized || $(NOT_INSTALLED)
	@$(BIN)/pip download --quiet --disable-pip-version-check --no-deps --no-binary transformers --dest build/peers \
		transformers==$(PEERS:build/peers/transformers-%=%) || $(NOT_INSTALLED)
	@tar -xzf $(PEERS).tar.gz -C build/peers

lint: $(VENV)/installed-test
	$(BIN)/ruff check .

docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# Executes the notebooks and stores what they print and draw: after a change of their cells.
notebooks: $(VENV)/installed-test
	UPDATE_NOTEBOOKS=1 $(BIN)/python -m pytest -q -m "slow or not slow" -k stored tests/test_notebooks.py

# After a change of versions in pyproject.toml or constraints.txt. What is locked holds for all platforms and Pythons, and
# leaves torch out: its builds differ from machine to machine.
lock: $(TOOLS)/installed-tools
	echo "torch; python_version < '3'" | $(TOOLS)/bin/uv pip compile --quiet --universal --generate-hashes \
		--no-annotate --custom-compile-command "make lock" --constraint constraints.txt --override - \
		--extra test --output-file requirements.lock pyproject.toml

# The table of docs/dependencies.md. One extra comes on top of what tests need.
licences: $(VENV)/installed-test
	$(BIN)/$(PIP) -c constraints.txt -e '.[browser-tests]' || $(NOT_INSTALLED)
	UPDATE_DEPENDENCIES=1 $(BIN)/python -m pytest -q tests/test_packaging.py -k table

# Known weaknesses of what is locked and pinned. Fails where the database of weaknesses cannot be reached.
audit: $(TOOLS)/installed-tools
	$(TOOLS)/bin/pip-audit --strict --disable-pip -r requirements.lock
	$(TOOLS)/bin/pip-audit --strict --disable-pip --no-deps -r constraints.txt

dist: $(TOOLS)/installed-tools
	rm -rf build/dist
	$(TOOLS)/bin/python -m build --outdir build/dist .
	$(TOOLS)/bin/twine check --strict build/dist/*

.PRECIOUS: %/bin/pip
%/bin/pip:
	@echo "== setting up $* (first time only; downloads torch and transformers)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is missing or older than 3.11; set PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -m venv $* \
		|| { echo "$(PYTHON) cannot make virtual environments; install its venv module"; exit 1; }

# The demo needs the package alone; tests and lint also what the `test` extra names, by hash but for torch.
$(VENV)/installed: EXTRAS :=
$(VENV)/installed-docs: EXTRAS := [docs]
$(VENV)/installed $(VENV)/installed-docs: pyproject.toml constraints.txt | $(BIN)/pip
	@$(BIN)/$(PIP) -c constraints.txt -e '.$(EXTRAS)' || $(NOT_INSTALLED)
	@touch $@

$(VENV)/installed-test: pyproject.toml constraints.txt requirements.lock | $(BIN)/pip
	@$(BIN)/$(PIP) --require-hashes --no-deps -r requirements.lock || $(NOT_INSTALLED)
	@$(BIN)/$(PIP) -c constraints.txt torch || $(NOT_INSTALLED)
	@$(BIN)/$(PIP) --no-deps --no-build-isolation -e . || $(NOT_INSTALLED)
	@touch $@

$(OLDEST)/installed-oldest: pyproject.toml constraints-oldest.txt | $(OLDEST)/bin/pip
	@$(OLDEST)/bin/$(PIP) -c constraints-oldest.txt -e '.[test]' || $(NOT_INSTALLED)
	@touch $@

$(TOOLS)/installed-tools: constraints.txt | $(TOOLS)/bin/pip
	@$(TOOLS)/bin/$(PIP) -c constraints.txt build pip-audit twine uv || $(NOT_INSTALLED)
	@touch $@

clean:
	rm -rf $(VENV) $(OLDEST) $(TOOLS) build *.egg-info lladamedv_demo.png
