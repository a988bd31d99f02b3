PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Through the environment, constraints also hold for the packages that the build itself needs. pip reads the second name from 25.3 on.
PIP := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip
# Other transformers, each a folder that goes in front of the path: the oldest that is supported, and whatever is newest today.
OLDEST := $(CURDIR)/build/transformers-oldest
NEWEST := $(CURDIR)/build/transformers-newest
# The `kernels` package, and the ops laid out for it.
KERNELS := $(CURDIR)/build/kernels
HUB := $(CURDIR)/build/hub
# vLLM with what it asks for, and tiny checkpoints that the newest transformers has exported.
VLLM := $(CURDIR)/build/vllm
VLLM_MODELS := $(CURDIR)/build/vllm_models
# A worker more than there are cores, as many tests wait for processes of their own, and at most four; a thread a worker.
WORKERS := $(shell $(PYTHON) -c 'import os; print(min(4, 1 + (os.cpu_count() or 1)))')
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS)
# What rests on names inside transformers.
VERSIONED := $(addprefix tests/kernels/test_,patch.py qwen_patch.py patched_copies.py compiled.py record_caches.py) \
	$(addprefix tests/trainers/test_,generate.py score.py every_family.py family_traps.py families.py unknown_families.py refused_families.py family_runs.py prompts.py \
	preference_trainer.py mdpo_trainer.py given_models.py adapters.py arguments.py training_mode.py \
	reference_cache.py resume.py)

.PHONY: help install test test-vllm nightly demo lint wheels versions hub bench gpu gpu-1 gpu-2 clean

help:
	@echo "make install  virtual environment $(VENV) with everything, C++ extension built"
	@echo "make test     install, then a smoke test on the oldest transformers, and all tests on the newest (options: PYTEST_ADDOPTS)"
	@echo "make test-vllm  install, then vLLM itself, in an environment of its own: every family that it serves, against transformers"
	@echo "make nightly  install, then 10,000 random calls of the ops, sweeps over families and versions, and every kernel compiled for every GPU"
	@echo "make demo     install, then a full MIA-DPO run on the embedded pictures, report in runs/shapes_mia_dpo"
	@echo "make lint     install, then ruff and mypy"
	@echo "make wheels   install, then the sdist and its wheels in dist/ (WHEELS: options of benchmarks.delivery.wheels, as --python python3.12)"
	@echo "make versions install, then core tests on the installed wheel with other versions of what it stands on (VERSIONS: options)"
	@echo "make hub      install, then the ops as a repository for Hugging Face's kernels package in build/hub, checked and tested"
	@echo "make bench    install, then every op against its peers (BENCH: options of python -m benchmarks)"
	@echo "make gpu      on a machine with a GPU and CUDA, without make install: gpu-1 and gpu-2 (five minutes each) in one; results in build/gpu"
	@echo "make clean    remove $(VENV) and everything that was built; runs/ stays"

install: $(STAMP)

$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard csrc/*.cpp csrc/*/*)
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "Python 3.11 or newer is needed, $(PYTHON) is %d.%d; name another: make PYTHON=python3.11" % v[:2])'
	$(PYTHON) -m venv $(VENV)
	@# What is imported is compiled then; compiling all that is installed would take longer than installing it.
	$(PIP) install --no-compile -e '.[train,judge,plots,qlora,dev,peers]'
	@# After torch, which DeepSpeed's set-up imports; its own kernels are left out, ZeRO needs none of them.
	DS_BUILD_OPS=0 $(PIP) install --no-compile --no-build-isolation deepspeed
	@touch $@

$(OLDEST)/.installed: constraints-oldest.txt $(STAMP)
	@rm -rf $(OLDEST)
	PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install -q --no-deps --target $(OLDEST) -r constraints-oldest.txt
	@touch $@

# The oldest first, so that the summary in the end is that of all tests.
test: install $(OLDEST)/.installed
	PYTHONPATH=$(OLDEST) $(PYTEST) -m smoke
	$(PYTEST)

# torch first, by itself: with it pip would take another one.
$(VLLM)/.installed: constraints-vllm.txt
	@rm -rf $(VLLM)
	$(PYTHON) -m venv $(VLLM)
	PIP_DISABLE_PIP_VERSION_CHECK=1 $(VLLM)/bin/python -m pip install -q $$(grep '^torch==' constraints-vllm.txt)
	PIP_DISABLE_PIP_VERSION_CHECK=1 $(VLLM)/bin/python -m pip install -q --no-deps -r constraints-vllm.txt
	@touch $@

test-vllm: install $(VLLM)/.installed
	$(BIN)/python -m benchmarks.runs.vllm_families --write $(VLLM_MODELS)
	MMDPO_VLLM_MODELS=$(VLLM_MODELS) PYTHONPATH=$(CURDIR)/tests/support/vllm_environment:$(CURDIR):$(CURDIR)/trainers \
		$(VLLM)/bin/python -m pytest -q -m vllm tests/trainers/test_vllm_itself.py

nightly: install $(OLDEST)/.installed
	MMDPO_PROPERTY_CASES=10000 $(BIN)/python -m pytest -q tests/kernels/test_properties.py
	$(PYTEST) -m nightly
	PYTHONPATH=$(OLDEST) $(PYTEST) $(VERSIONED)
	@rm -rf $(NEWEST)
	$(BIN)/python -m pip install -q --target $(NEWEST) transformers
	PYTHONPATH=$(NEWEST) $(PYTEST) -m smoke
	$(BIN)/python -m mmdpo_kernels.backends.triton.ahead_of_time --all

demo: install
	$(BIN)/mmdpo run shapes_mia_dpo

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=trainers $(BIN)/python -m mypy -p mmdpo_kernels -p mmdpo_trainers -p benchmarks.delivery.hub

wheels: install
	$(BIN)/python -m benchmarks.delivery.wheels $(WHEELS)

versions: install
	$(BIN)/python -m benchmarks.delivery.versions $(VERSIONS)

$(KERNELS)/.installed: constraints-hub.txt $(STAMP)
	@rm -rf $(KERNELS)
	PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install -q --no-deps --target $(KERNELS) -r constraints-hub.txt
	@touch $@

# The tests of all ops on what `kernels` has loaded, but those of backends that are not in it.
hub: install $(KERNELS)/.installed
	PYTHONPATH=$(KERNELS) $(BIN)/python -m benchmarks.delivery.hub $(HUB)
	PYTHONPATH=$(KERNELS):$(CURDIR) $(PYTEST) -p benchmarks.delivery.hub.plugin --hub $(HUB) -k "not native and not varlen and not compiled_without_a_graph_break" \
		$(addprefix tests/kernels/test_,attention_mass.py tree_attention.py linear_logprobs.py shared_rows.py preference_loss.py \
		preference_loss_backends.py triton_attention_mass.py triton_tree_attention.py)

bench: install
	$(BIN)/python -m benchmarks $(BENCH)

# With the Python that the machine has.
gpu:
	$(PYTHON) benchmarks/gpu $(GPU)

gpu-1 gpu-2:
	$(PYTHON) benchmarks/gpu --part $(@:gpu-%=%) $(GPU)

clean:
	rm -rf $(VENV) build dist *.egg-info mmdpo_kernels/_native*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find mmdpo_kernels trainers tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
