# Two commands for a newcomer, each doing its own set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
DATA   ?= data/emoji
RUN    ?= runs/demo
STEPS  ?= 640

.PHONY: demo test check format clean

# The stamp is older than pyproject.toml when a dependency changed, and the packages are then brought up to date.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[all]'
	touch $@

$(DATA)/dataset.json: | $(VENV)/.installed
	$(BIN)/mvlm data emoji $(DATA)

demo: $(VENV)/.installed $(DATA)/dataset.json
	$(BIN)/mvlm pretrain tiny --data $(DATA) --out $(RUN) --max-steps $(STEPS) --eval-every-steps 200 --resume
	$(BIN)/mvlm eval retrieval --checkpoint $(RUN) --data $(DATA) --split test --out $(RUN)/eval/test.json
	$(BIN)/mvlm report $(RUN)
	@echo "Open $(RUN)/report.html in a browser."

test: $(VENV)/.installed
	$(BIN)/python -m pytest

check: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf build dist $(VENV) runs data
