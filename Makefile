# Two commands for a newcomer, each doing its own set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
DATA   ?= data/emoji
RUN    ?= runs/demo
STEPS  ?= 640

.PHONY: demo test faults faults-data faults-loading soak test-gpu test-triton wheel-smoke aot traffic bench check format clean

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

# One process a core, a file of tests to each; more processes than that only wait for one another.
JOBS ?= 2
test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

# Writers of shards, killed at 50 moments; `make test` has ten.
faults-data: $(VENV)/.installed
	$(BIN)/python tests/promises/faults/kill_writers.py --trials 50

# Fifty loading processes killed at random moments; `make test` kills ten.
faults-loading: $(VENV)/.installed $(DATA)/dataset.json
	$(BIN)/python tests/promises/faults/kill_loaders.py $(DATA) --kills 50

# Kernels compile on a GPU, so this process must not interpret them.
test-gpu: $(VENV)/.installed
	TRITON_INTERPRET=0 $(BIN)/python -m pytest -m gpu

# Every kernel for sm_80, sm_90 and sm_100, with no GPU; `make test` compares a slice with the committed table.
aot: $(VENV)/.installed
	$(BIN)/python -m mvlm_kernels.aot --jobs $$(nproc) --json benchmarks/results/aot.json

# Bytes moved, counted in the interpreter, over the fewest possible.
traffic: $(VENV)/.installed
	$(BIN)/python -m mvlm_kernels.traffic --json benchmarks/results/traffic.json

# Both, and runs of a micro model, each disturbed in one way and resumed: a table, and a JSON file. About 3 s a trial.
FAULTS ?= 1000
faults: faults-data faults-loading
	$(BIN)/python tests/promises/faults/campaign.py --count $(FAULTS) --jobs $(JOBS) --json benchmarks/results/faults.json

# Every measured figure of docs/, on a machine that does nothing else; MACHINE is part of
# the files' names. Where there is a GPU, all of it runs there.
RESULTS ?= benchmarks/results
MACHINE ?= here
bench: $(VENV)/.installed $(DATA)/dataset.json
	$(BIN)/mvlm bench kernels --out $(RESULTS)
	$(BIN)/python -m mvlm_benchmarks.kernels.host_time --json $(RESULTS)/host.json
	$(BIN)/mvlm bench step --rounds 9 --contenders timm+roberta timm+decoder-layer plain fast drop_masked \
	    --json $(RESULTS)/step-tiny-$(MACHINE).json --csv $(RESULTS)/step-tiny-$(MACHINE).csv
	$(BIN)/mvlm bench step --rounds 3 --contenders timm+roberta timm+roberta-compiled fast \
	    --json $(RESULTS)/step-tiny-compiled-$(MACHINE).json --csv $(RESULTS)/step-tiny-compiled-$(MACHINE).csv
	$(BIN)/mvlm bench step --preset base --batch 4 --rounds 3 --no-optimizer --contenders timm+roberta timm+decoder-layer fast \
	    --json $(RESULTS)/step-base-$(MACHINE).json --csv $(RESULTS)/step-base-$(MACHINE).csv
	$(BIN)/mvlm bench data --rounds 11 --soak 200000 --start 1000000 --step $(RESULTS)/step-tiny-$(MACHINE).json --out $(RESULTS)
	$(BIN)/mvlm bench data --data $(DATA) --rounds 11 --out $(RESULTS)
	$(BIN)/python -m mvlm_benchmarks.step.overhead $(DATA) --json $(RESULTS)/overhead.json

# One run for two hours: memory and speed stay flat, nothing leaks.
MINUTES ?= 120
soak: $(VENV)/.installed
	$(BIN)/python tests/promises/faults/soak.py --minutes $(MINUTES) --json benchmarks/results/soak.json

# The kernels' tests with the oldest and the newest supported Triton, each in its own environment. Before 3.7 Triton's
# interpreter converts arrays of one element to scalars, which NumPy 2.4 refuses. Compiled kernels do not use NumPy.
TRITONS ?= 3.6.0 3.9.0
test-triton:
	for version in $(TRITONS); do \
	    case $$version in 3.6.*) numpy="numpy<2.4";; *) numpy=numpy;; esac; \
	    $(PYTHON) -m venv build/triton-$$version && \
	    build/triton-$$version/bin/python -m pip install --quiet --disable-pip-version-check \
	        --editable . "triton==$$version" "$$numpy" pytest hypothesis "transformers>=5.24,<5.25" timm && \
	    build/triton-$$version/bin/python -m pytest tests/kernels \
	        -W "ignore:Conversion of an array with ndim:DeprecationWarning" || exit 1; \
	done

# The kernels from a wheel, away from the source, with nothing but torch and Triton beside them.
wheel-smoke: $(VENV)/.installed
	rm -rf build/smoke
	$(PYTHON) -m venv build/smoke
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir build/smoke/wheel .
	build/smoke/bin/python -m pip install --quiet --disable-pip-version-check build/smoke/wheel/*.whl
	cd build/smoke && bin/python $(CURDIR)/tests/kernels/wheel_smoke.py

check: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf build dist $(VENV) runs data
