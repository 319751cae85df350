# Two commands for a newcomer, each doing its own set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
DATA   ?= data/emoji
RUN    ?= runs/demo
STEPS  ?= 600

.PHONY: demo test test-gpu aot check format clean

# The stamp is older than pyproject.toml when a dependency changed, and the packages are then brought up to date.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[all]'
	touch $@

$(DATA)/dataset.json: | $(VENV)/.installed
	$(BIN)/mvlm data emoji $(DATA)

demo: $(VENV)/.installed $(DATA)/dataset.json
	$(BIN)/mvlm pretrain tiny --data $(DATA) --out $(RUN) --max-steps $(STEPS)
	$(BIN)/mvlm eval retrieval --checkpoint $(RUN) --data $(DATA) --split test --out $(RUN)/eval/test.json
	$(BIN)/mvlm report $(RUN)

test: $(VENV)/.installed
	$(BIN)/python -m pytest

# Kernels compile on a GPU, so this process must not interpret them.
test-gpu: $(VENV)/.installed
	TRITON_INTERPRET=0 $(BIN)/python -m pytest -m gpu

# Every kernel for sm_80, sm_90 and sm_100, with no GPU; the committed table is what `make test` compares a slice with.
aot: $(VENV)/.installed
	$(BIN)/python -m mvlm_kernels.aot --jobs $$(nproc) --json benchmarks/results/aot.json

check: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf build dist $(VENV) runs data
