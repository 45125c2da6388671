# The two commands are `make demo` and `make test`; each sets up what it needs in .venv first.
#   make lint       ruff, mypy, clang-format
#   make check      lint and the fast tests, about two minutes; tests/conftest.py lists what is slow
#   make test       all tests but those marked `machine`
#   make test-machine   those: timings, resident memory and what depends on torch's internals; on a quiet machine
#   make bench      the benchmark suite, which writes docs/benchmarks.md; about 15 minutes
#   make gpu-check  what can be shown about the GPU kernels on a machine without a GPU; the first part is `make gpu-compile`
#   make gpu OUT=DIR    on a machine with a GPU: builds, checks and times everything there, with the Python that is there,
#                   in nine minutes, or BUDGET=SECONDS; docs/gpu.md
#   make format     rewrites the sources as `make lint` wants them
#   make setup      at once what lint and test need, which else each install their own
# PYTHON chooses the interpreter of .venv, TORCH the torch that goes into it; PYTEST is handed on by `make test`.
# WORKERS files of tests run at a time, the longest first and then in the order of their names (tests/conftest.py):
# pytest-xdist's own order, by the number of tests, begins the files with few long tests last.

PYTHON ?= python3
TORCH ?= torch==2.13.0
# The compiler whose counts are in kernels/counts.json.
TRITON ?= triton==3.9.0
PYTEST ?=
WORKERS ?= 2
SPREAD := --numprocesses=$(WORKERS) --dist=loadfile --no-loadscope-reorder
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check -q
CXX_SOURCES := $(shell find csrc tests/cpu tests/cuda -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
SOURCES := $(filter csrc/%,$(CXX_SOURCES)) setup.py pyproject.toml
CXX_FOUND := $(shell command -v $${CXX:-c++} || command -v g++ || command -v clang++)

# How OpenMP's threads wait. Asleep, they leave a machine that runs anything else its time; spinning for a moment first,
# they make a training step on an idle one a third shorter.
demo bench: export GOMP_SPINCOUNT ?= 20000
check test test-machine gpu-check: export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo check test test-machine lint bench gpu gpu-check gpu-compile format setup clean

demo: $(VENV)/train.stamp
	$(BIN)/fastvq demo --out runs/demo --overwrite

check: lint $(VENV)/test.stamp
	$(BIN)/python -m pytest $(SPREAD) -q -m "not slow and not machine" $(PYTEST)

test: $(VENV)/test.stamp
	$(BIN)/python -m pytest $(SPREAD) -m "not machine" $(PYTEST)

# One at a time: they measure.
test-machine: $(VENV)/test.stamp
	$(BIN)/python -m pytest -m machine $(PYTEST)

lint: $(VENV)/lint.stamp $(VENV)/train.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)

format: $(VENV)/lint.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

bench: $(VENV)/bench.stamp
	$(BIN)/fastvq bench --suite --out docs --readme README.md
	$(BIN)/python -m pytest benchmarks -q --benchmark-columns=median,iqr,rounds --benchmark-group-by=group
	for threads in 1 2; do $(BIN)/python -m benchmarks.bench_clients --threads $$threads; done

gpu-compile: $(VENV)/test.stamp
	@echo "Each kernel compiled for sm_80, sm_90, sm_100 and gfx942, and what the compiler made of it:"
	$(BIN)/python -m fastvq.kernels.aot

gpu-check: gpu-compile
	@echo "The same kernels in Triton's interpreter; a training step on the meta device, which mixes no devices and never"
	@echo "waits for one; the CUDA kernels, compiled by nvcc for sm_80, sm_90a and sm_100 and loaded, where nvcc is, and run"
	@echo "in the emulator, by the reference and by sanitizers, where Boost.Context is:"
	$(BIN)/python -m pytest $(SPREAD) -m "not machine" tests/kernels tests/quantizers/test_devices.py tests/cuda -rsP

gpu:
	@test -n "$(OUT)" || { echo "OUT: must name the folder of the results, as in make gpu OUT=results"; exit 1; }
	"$(PYTHON)" -m fastvq.bench.gpu "$(OUT)"$(if $(BUDGET), --seconds $(BUDGET))$(if $(WORK), --work "$(WORK)")

clean:
	rm -rf build $(VENV) fastvq/_native.* fastvq/_native_cuda.so fastvq/native_build.json

setup: $(VENV)/build.stamp
	$(PIP) install --no-build-isolation -e ".[lint,test]" "$(TRITON)"
	@touch $(VENV)/lint.stamp $(VENV)/train.stamp $(VENV)/test.stamp

# The package is installed in place; a change in csrc/ or in the metadata installs it again.
$(VENV)/build.stamp:
	@"$(PYTHON)" -c 'import sys; assert sys.version_info >= (3, 10), "fastvq needs Python 3.10 or newer"'
	@"$(PYTHON)" -c 'import ensurepip' || { echo "Python has no venv: apt install python3-venv"; exit 1; }
	"$(PYTHON)" -m venv $(VENV)
	$(PIP) install "$(TORCH)" numpy "setuptools>=77" wheel ninja
	@touch $@

$(VENV)/%.stamp: $(VENV)/build.stamp $(SOURCES)
	@test -n "$(CXX_FOUND)" || echo "No C++ compiler found: the native backend is left out. Debian: apt install g++"
	$(PIP) install --no-build-isolation -e ".[$*]" $(if $(filter test,$*),"$(TRITON)")
	@touch $@
