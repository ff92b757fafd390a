# `make demo` and `make test` need nothing but Python ≥ 3.10: they install into .venv by themselves.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint clean

demo: $(VENV)/finetune.installed
	$(BIN)/handtuned finetune

test: $(VENV)/test.installed
	$(BIN)/pytest

lint: $(VENV)/test.installed
	$(BIN)/ruff check .

$(VENV)/finetune.installed: setup.py constraints.txt handtuned/__init__.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -c constraints.txt -e ".[finetune]"
	touch $@

$(VENV)/test.installed: setup.py constraints.txt handtuned/__init__.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -c constraints.txt -e ".[finetune,test,dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
