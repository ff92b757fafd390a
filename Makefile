# `make demo`, `make lessons` and `make test` need nothing but Python ≥ 3.10: they install into .venv by themselves.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo lessons check-lessons check-kernels check-rivals check-models test test-compiled test-portable \
	lint clean

demo: $(VENV)/finetune.installed
	$(BIN)/handtuned finetune

lessons: $(VENV)/notebooks.installed
	$(BIN)/python -m handtuned.lessons mine
	$(BIN)/jupyter lab notebooks/mine/00_start_here.ipynb

# Runs every notebook from its script, two at a time with one thread each.
check-lessons: $(VENV)/notebooks.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m handtuned.lessons check --jobs 2

# As many workers as cores, one thread each.
test: $(VENV)/test.installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist worksteal

# The tests that launch kernels, as machine code in the emulator: all on sm_90, a few on the other architectures.
# COMPILED="--slow" runs all on all.
test-compiled: $(VENV)/test.installed
	for arch in sm_90 sm_75 sm_80 sm_89 sm_120; do \
		HANDTUNED_BACKEND=$$arch OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist worksteal $(COMPILED) \
			$$(grep -lE "kernel_backend|each_backend" tests/test_*.py | grep -vE "test_emulator|test_kernels_on_cards") || exit 1; \
	done

# The numerical tests again as other CPUs would compute them: fewer instructions, other threads, no compiled C.
test-portable: $(VENV)/test.installed
	$(BIN)/python tests/portable.py

# Compiles every kernel without a GPU; fails if one does not compile, spills registers or is too large for its card.
# Two at a time; every tile of tuned kernels on sm_90. Products on sm_75 are the vendor's library's.
check-kernels: $(VENV)/test.installed
	for arch in "sm_90 --every-tile" sm_80 sm_89 sm_120 sm_100 \
		"sm_75 nf4_dequantize nf4_quantize nf4_one_row adamw unscale dropout_mask"; do echo "$$arch"; done | \
		xargs -P 2 -I{} sh -c 'OMP_NUM_THREADS=1 $(BIN)/handtuned xray --check --arch {}'

# The tests behind the tables of docs/from-peft.md and docs/from-torch.md, those that take minutes too.
check-rivals: $(VENV)/test.installed
	OMP_NUM_THREADS=1 $(BIN)/pytest --slow -n auto --dist worksteal tests/test_docs_tables.py \
		$$(grep -ohE "test_\w+\.py::\w+" docs/from-*.md | sort -u | sed "s|^|tests/|")

# Every causal architecture of the installed transformers, tiny, through the commands: the table of docs/models.md.
# All that have no row yet; MODELS="--again" for all, MODELS="mamba qwen3_vl" for some.
check-models: $(VENV)/test.installed
	OMP_NUM_THREADS=1 $(BIN)/python tests/check_models.py $(MODELS)

lint: $(VENV)/test.installed
	$(BIN)/ruff check .

$(VENV)/finetune.installed: setup.py constraints.txt handtuned/__init__.py kernels/nf4_cpu.c kernels/nf4_kinds.h kernels/nf4_tile.h
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -c constraints.txt -e ".[finetune]"
	touch $@

$(VENV)/notebooks.installed: setup.py constraints.txt handtuned/__init__.py kernels/nf4_cpu.c kernels/nf4_kinds.h kernels/nf4_tile.h
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -c constraints.txt -e ".[finetune,notebooks,tune]"
	touch $@

$(VENV)/test.installed: setup.py constraints.txt handtuned/__init__.py kernels/nf4_cpu.c kernels/nf4_kinds.h kernels/nf4_tile.h
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -c constraints.txt -e ".[finetune,test,dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
