# Everything a newcomer or CI runs. PYTHON is any Python 3.11 or later.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet -c constraints.txt

.PHONY: demo test lint types proto proto-check check model-card clean

demo: $(VENV)/.demo
	$(BIN)/fullframe demo

# What only computes, on all cores; servers, schedules and measures of memory have the machine to themselves.
COMPUTING := tests/convert tests/engine/graph tests/learn tests/model
test: $(VENV)/.dev
	$(BIN)/python -m pytest $(PYTEST_ARGS) $(addprefix --ignore=,$(COMPUTING) tests/kernels)
	$(BIN)/python -m pytest $(PYTEST_ARGS) $(COMPUTING) -n auto --dist worksteal
	$(BIN)/python -m pytest $(PYTEST_ARGS) tests/kernels -n auto --dist worksteal

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

# The messages and stubs in service/fullframe/v1 from proto/; PROTO_OUT sends them elsewhere.
PROTO_OUT ?= service
proto: $(VENV)/.dev
	$(BIN)/python -m grpc_tools.protoc -Iproto -I$$($(BIN)/python -c 'import google.rpc, pathlib; print(pathlib.Path(google.rpc.__path__[0]).parents[1])') \
		--python_out=$(PROTO_OUT) --pyi_out=$(PROTO_OUT) --grpc_python_out=$(PROTO_OUT) fullframe/v1/vision.proto

proto-check: $(VENV)/.dev
	rm -rf build/proto && mkdir -p build/proto
	$(MAKE) --no-print-directory proto PROTO_OUT=build/proto
	for f in build/proto/fullframe/v1/*; do diff -u "service/fullframe/v1/$${f##*/}" "$$f" || exit 1; done

# The bundled model's int8 copy and card again, from DATA as `fullframe train` takes it: make model-card DATA=cifar10.tar.xz
MODEL := service/fullframe/model/bundled/cifar10.onnx
model-card: $(VENV)/.dev
	$(if $(DATA),,$(error say where the images are: make model-card DATA=cifar10.tar.xz [PHOTOS=FOLDER] [RIVAL=NAME=FILE]))
	$(BIN)/fullframe quantize $(MODEL) --calibrate $(DATA) --sizes 24,32,48,64,128 --images 300
	$(BIN)/python -m benchmarks.model --model $(MODEL) --data $(DATA) $(if $(PHOTOS),--photos $(PHOTOS)) $(if $(RIVAL),--rival $(RIVAL))

check: lint types proto-check test

$(VENV)/.demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[demo]'
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist
