# `make demo` and `make test` need python3 (3.10 or newer) and make; everything else goes into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE := 1

.PHONY: demo test test-slow lint docs clean

demo: $(VENV)/installed
	@echo "== lladamedv demo"
	$(BIN)/lladamedv demo

test: $(VENV)/installed-test
	@echo "== lint"
	$(BIN)/ruff check .
	@echo "== documentation"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	@echo "== tests"
	$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist worksteal

# Thousands of cases of each property and fuzzer, and fifty kills of each task: an hour or more.
test-slow: $(VENV)/installed-test
	$(BIN)/python -m pytest -m slow
	LLADAMEDV_HYPOTHESIS_PROFILE=thorough $(BIN)/python -m pytest tests/properties

lint: $(VENV)/installed-test
	$(BIN)/ruff check .

docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The demo needs the package alone; tests and lint also what the `test` extra names.
$(VENV)/installed: EXTRAS :=
$(VENV)/installed-test: EXTRAS := [test]
$(VENV)/installed-docs: EXTRAS := [docs]
$(VENV)/installed $(VENV)/installed-test $(VENV)/installed-docs: pyproject.toml constraints.txt
	@echo "== setting up $(VENV) (first time only; downloads torch and transformers)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "$(PYTHON) is missing or older than 3.10; set PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
		|| { echo "$(PYTHON) cannot make virtual environments; install its venv module"; exit 1; }
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.$(EXTRAS)' \
		|| { echo "installation failed: a package index that has the versions in constraints.txt is needed"; exit 1; }
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info lladamedv_demo.png
