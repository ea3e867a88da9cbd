# make quickstart   makes .venv, installs the pinned dependencies, trains, prints a table and where the plots are
# make test         makes .venv if absent, runs the tests, two files at a time, and those of time limits alone
# make test-full    the slow tests too
# make test-oracle  parity with transformers, asked live: makes .venv-oracle, with torch and peft
# make kill-matrix  every broken version against every layer of proof; writes the table into docs/proofs.md
# make compare      ten methods, five seeds, equal budgets; in the background, and on where it was stopped
# make base-model   trains the base model that the repository ships
# make base-model-longer   the same training carried on: the teacher and author in the examples of `hptjax methods`
# make bench        what a step costs as the work grows, into docs/benchmarks.md; goes on where it was stopped
# make bench-peers  hptjax beside TRL, transformers, tunix and hand-written references, in one run; PEER_BENCH=folder of the harness
# make lint         ruff and mypy
# make plan-1.5b    what HPT on a 1.5B model does on 16 v5e chips that need not be there (installs libtpu into .venv-tpu)
# make plan-all     the same for 1.5B, 7B and 8B on v5e, v5p, v6e and two slices
# make venv         only the environment
#
# ACCEL=cuda13 or ACCEL=tpu chooses the jax build. VENV=folder puts the environment elsewhere.

ACCEL ?= cpu
VENV ?= .venv
ORACLE_VENV ?= .venv-oracle
PYTHONS := $(PYTHON) python3.13 python3.12 python3.11 python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(ACCEL)
comma := ,
EXTRAS := dev$(if $(filter-out cpu,$(ACCEL)),$(comma)$(ACCEL))

ifeq ($(filter $(ACCEL),cpu cuda13 tpu),)
$(error expected ACCEL to be cpu, cuda13 or tpu, got '$(ACCEL)')
endif

.PHONY: bench bench-peers compare plan-1.5b plan-all quickstart test test-full test-oracle kill-matrix base-model base-model-longer lint venv

quickstart: $(STAMP)
	$(BIN)/hptjax train configs/quickstart.toml

SIDE_BY_SIDE := -n 2 --dist loadfile --no-loadscope-reorder
# the compiler's cheapest level, to save time; test-full runs the same tests at the level that users have
CHEAPLY := XLA_FLAGS="$(XLA_FLAGS) --xla_backend_optimization_level=0"

# what holds a limit of time runs last, with nothing beside it
test: $(STAMP)
	$(CHEAPLY) $(BIN)/python -m pytest -q $(SIDE_BY_SIDE) -m "not slow and not gpu and not tpu and not timed"
	$(CHEAPLY) $(BIN)/python -m pytest -q -m "timed and not slow"

test-full: $(STAMP)
	$(BIN)/python -m pytest -q $(SIDE_BY_SIDE) -m "not gpu and not tpu and not timed"
	$(BIN)/python -m pytest -q -m timed

test-oracle:
	$(MAKE) venv VENV=$(ORACLE_VENV) ACCEL=cpu EXTRAS=dev,oracle
	$(ORACLE_VENV)/bin/python -m pytest -q $(SIDE_BY_SIDE) tests/test_oracle_golden.py tests/test_oracle_live.py

kill-matrix: $(STAMP)
	$(BIN)/python -m tests.proofs.kill_matrix

compare: $(STAMP)
	@mkdir -p runs
	@setsid nohup $(BIN)/hptjax compare configs/compare_countdown.toml >>runs/compare.log 2>&1 </dev/null &
	@echo "running in the background; tail -f runs/compare.log, and make compare again after a stop"

base-model: $(STAMP)
	$(BIN)/hptjax train configs/base_model.toml

base-model-longer: $(STAMP)
	$(BIN)/hptjax train configs/base_model.toml --name base_model_longer --train.steps 1200 \
	    --checkpoint.export-folder hptjax/base_model_longer

bench: $(STAMP)
	$(BIN)/hptjax bench

PEER_BENCH ?= ../shared/bench
PEERS ?= .peers
PEER_SIZES ?= XS S M
PEER_ROUNDS ?= 2

bench-peers: $(STAMP)
	@test -f $(PEER_BENCH)/common.py || { echo "expected the harness (common.py) in $(PEER_BENCH); make bench-peers PEER_BENCH=folder" >&2; exit 1; }
	@test -x $(PEERS)/A/bin/pip || python3 -m venv $(PEERS)/A
	@test -x $(PEERS)/B/bin/pip || python3 -m venv $(PEERS)/B
	$(PEERS)/A/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(PEERS)/A/bin/pip install --quiet --disable-pip-version-check transformers==5.23.0 trl==1.16.0 accelerate==1.15.0 datasets==5.2.0 tokenizers==0.23.3
	$(PEERS)/B/bin/pip install --quiet --disable-pip-version-check google-tunix==0.1.7
	PEER_BENCH=$(abspath $(PEER_BENCH)) TORCH_PYTHON=$(abspath $(PEERS))/A/bin/python JAX_PYTHON=$(abspath $(PEERS))/B/bin/python \
	    $(BIN)/python benchmarks/peers.py --out peers.jsonl --sizes $(PEER_SIZES) --rounds $(PEER_ROUNDS)

lint: $(STAMP)
	$(BIN)/ruff format --check hptjax tests launch benchmarks
	$(BIN)/ruff check hptjax tests launch benchmarks
	$(BIN)/mypy

plan-1.5b:
	$(MAKE) venv ACCEL=tpu VENV=.venv-tpu
	JAX_PLATFORMS=cpu .venv-tpu/bin/hptjax plan configs/hpt_qwen2.5_math_1.5b.toml --topology v5e:4x4

plan-all: plan-1.5b
	JAX_PLATFORMS=cpu .venv-tpu/bin/hptjax plan configs/hpt_qwen2.5_math_1.5b.toml --topology v5p:2x2x1 v6e:2x4
	JAX_PLATFORMS=cpu .venv-tpu/bin/hptjax plan configs/hpt_qwen2.5_math_1.5b.toml --topology 2xv5e:4x4 --batch.rows 32 \
	    --rollout.prefill-rows 32
	JAX_PLATFORMS=cpu .venv-tpu/bin/hptjax plan configs/hpt_qwen2.5_math_7b.toml --topology v5e:4x8 v5p:2x2x4 v6e:4x4
	JAX_PLATFORMS=cpu .venv-tpu/bin/hptjax plan configs/hpt_llama3.1_8b.toml --topology v5e:8x8 v5p:2x2x4 v6e:4x4

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@python=; for candidate in $(PYTHONS); do \
	  if $$candidate -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	    python=$$candidate; break; \
	  fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "hptjax needs Python 3.11 or newer with its venv module; looked for: $(PYTHONS)." >&2; \
	  echo "Found: $$(python3 --version 2>&1 || echo no python3). Install a newer one or run make PYTHON=/its/path." >&2; \
	  exit 1; \
	fi; \
	if [ ! -x $(BIN)/pip ]; then echo "making $(VENV) with $$($$python --version)"; $$python -m venv --clear $(VENV); fi
	@echo "installing hptjax[$(EXTRAS)] with the versions of constraints.txt (some minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-input -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@
