# make train   train a small GPT with fusedopt.AdamW and compare with torch.optim   (ARGS="--steps 50" passes options on)
# make test    lint and tests, in JOBS=2 processes of one thread each, but for tests of threads
# make check   lint, types and quick tests, in less than a minute: formulas, documents, the contract of one class on CPUs
# make fuzz    N=20000 random examples a class against the reference   (SEED=1 repeats a run)
# make bench   the CPU benchmark
# make gpu     on a machine with a GPU: its tests, quick benchmark and compute-sanitizer, reports in OUT=runs/gpu
# make sanitize  the tests that reach the CPU engine, under the address, undefined-behaviour and thread sanitizers (Linux, GCC)
# make kernels   what the compilers make of every GPU kernel, Triton's for many GPUs; none need be there
# make versions  the oldest and newest Python, torch, Triton and NumPy, each in an environment of its own   (ARGS="oldest")
# make same-bits OTHER=folder  random runs of every class give the same bits as that other checkout, built in place
# make rooms   checks which module imports which, and draws docs/rooms.svg
# make mutants planted bugs, each of which a test must notice   (ARGS="Lion norm" takes those whose names contain a word)
#
# Needs python3 >= 3.10 and a C++ compiler. Makes .venv; uses the torch and Triton that python3 already has, else installs
# $(TORCH) and $(TRITON).

PYTHON ?= python3
TORCH ?= torch==2.13.0
TRITON ?= triton==3.6.0
ARGS ?=
JOBS ?= 2
OUT ?= runs/gpu
N ?= 20000
SEED ?= $(shell date +%s)
VENV := .venv
BIN := $(VENV)/bin
SOURCES := pyproject.toml setup.py fusedopt/_C.pyi $(shell find csrc -type f)

.PHONY: train test check lint fuzz kernels versions same-bits rooms mutants bench gpu sanitize clean

train: $(VENV)/built
	$(BIN)/python examples/train_gpt.py $(ARGS)

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadgroup $(ARGS)

# All of these files, except what compiles; of the large ones, the contract of AdamW on the backend `cpu`.
QUICK := types formula rooms options show docs recipes schedules
QUICK_IN_PART := parity torch_contract checkpoints clip errors drop_in
check: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadgroup $(patsubst %,tests/test_%.py,$(QUICK) $(QUICK_IN_PART)) \
		-k "($(patsubst %,test_%.py or,$(QUICK)) cpu-AdamW or ten_steps or clipped_step_is) and not page_on_adding and not keep_tensors_apart" $(ARGS)

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

fuzz: $(VENV)/ready
	FUZZ_EXAMPLES=$(N) $(BIN)/python -m pytest -q -rP tests/test_fuzz.py --hypothesis-seed=$(SEED) $(ARGS)

bench: $(VENV)/built
	$(BIN)/python -m bench cpu $(ARGS)

# With the packages that are there: such a machine often has no way to others, and the linter is not needed.
gpu: $(VENV)/made
	PATH="$$PATH:/usr/local/cuda/bin" FUSEDOPT_REQUIRE_CPU=1 FUSEDOPT_BUILD_CUDA=1 $(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	$(BIN)/python -m tests.gpu --out $(OUT) $(ARGS)

kernels: $(VENV)/ready
	$(BIN)/python -m tests.compile_kernels --all $(ARGS)

versions:
	$(PYTHON) -m tests.versions $(ARGS)

same-bits: $(VENV)/built
	$(BIN)/python -m tests.same_bits $(OTHER) $(ARGS)

rooms: $(VENV)/built
	$(BIN)/python -m tests.rooms

mutants: $(VENV)/ready
	$(BIN)/python -m tests.mutants $(ARGS)

# A build apart; python itself is not sanitized, so the runtimes must be there before it (libstdc++ for their view of throw).
sanitize: build/sanitize-address/built build/sanitize-thread/built
	$(call sanitized,address,asan ubsan) tests/test_clip.py tests/test_errors.py tests/test_checkpoints.py \
		tests/test_torch_contract.py tests/test_threads.py tests/test_parity.py tests/test_sparse.py tests/test_sam.py -k "$(ADDRESS_TESTS)" $(ARGS)
	$(call sanitized,thread,tsan) tests/test_threads.py tests/test_torch_contract.py tests/test_sparse.py -k "$(THREAD_TESTS)" $(ARGS)

# Not: those whose tensors are large; torch's and the reference backend's part; memory that grows, as freed memory is kept.
ADDRESS_TESTS := not triton and not engine_is_the_reference and not reference_backend and not equal_torch and not planted and not memory_does_not
THREAD_TESTS := not triton and (test_threads or number_of_threads or two_threads_never_overlap)
# detect_leaks=0: python keeps much until it ends.
SANITIZER_OPTIONS := ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	TSAN_OPTIONS="halt_on_error=1 suppressions=tests/thread_sanitizer.supp"
runtimes = $(foreach name,$(1) stdc++,$(shell $(CXX) -print-file-name=lib$(name).so))
sanitized = $(SANITIZER_OPTIONS) LD_PRELOAD="$(call runtimes,$(2))" \
	$(BIN)/pytest -q -p no:cacheprovider -o pythonpath=build/sanitize-$(1)/lib

build/sanitize-address/built: FUSEDOPT_SANITIZE := address,undefined
build/sanitize-thread/built: FUSEDOPT_SANITIZE := thread
build/sanitize-%/built: $(VENV)/ready $(SOURCES) $(shell find fusedopt kernels -name '*.py')
	FUSEDOPT_SANITIZE=$(FUSEDOPT_SANITIZE) FUSEDOPT_BUILD_CUDA=0 $(BIN)/python setup.py --quiet build \
		--build-base build/sanitize-$* --build-lib build/sanitize-$*/lib
	@touch $@

$(VENV)/made: Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "fusedopt needs Python 3.10 or newer: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	options="--clear $$($(PYTHON) -c 'import torch' 2>/dev/null && echo --system-site-packages)"; \
		$(PYTHON) -m venv $$options $(VENV) || $(PYTHON) -m venv $$options --without-pip $(VENV)
	@# Where that torch is in a virtual environment itself, "system" does not mean its packages.
	@$(PYTHON) -c 'import site, sys, torch; sys.prefix == sys.base_prefix or print(*site.getsitepackages(), sep="\n")' 2>/dev/null \
		> "$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])')/of_python.pth" || true
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/python -m pip install --quiet $(TRITON) \
		|| echo "Triton cannot be installed: its tests will be skipped" >&2
	$(BIN)/python -m pip install --quiet "setuptools>=77" "pybind11>=3" wheel
	@touch $@

$(VENV)/built: $(VENV)/made $(SOURCES)
	FUSEDOPT_REQUIRE_CPU=1 $(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[bench]"
	@touch $@

# What tests need besides; to train and to measure takes less.
$(VENV)/ready: $(VENV)/built
	$(BIN)/python -m pip install --quiet "fusedopt[test]"
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info fusedopt/*.so fusedopt/_cuda.txt fusedopt/kernels runs
