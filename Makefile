# Two commands matter: `make run` and `make test`. Each installs what it needs into $(VENV).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PORT ?= 50051
PROTOS := $(wildcard proto/moe_server/v1/*.proto)
BUF := build/buf/node_modules/.bin/buf

.PHONY: run test lint types proto proto-check bench-policy bench-paging bench-routing bench-engine bench-coldstart clean

# Installs, serves the embedded model, waits for its proof, streams a completion, stops.
run: $(VENV)/.installed
	@BIN=$(BIN) PORT=$(PORT) bash benchmarks/first_run.sh

# A file's tests stay together: they share servers.
test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

# Replays every eviction policy on synthetic and recorded traces. QUICK=1: in 20 seconds.
bench-policy: $(VENV)/.installed-dev
	$(BIN)/python -m benchmarks.policy_replay

# Our engine and its peers when experts do not fit: benchmarks/paging.py says what QUICK=1, FULL=1 and
# ARGS do. Caps need root.
bench-paging: $(VENV)/.installed
	@$(BIN)/python -m benchmarks.paging $(if $(QUICK),--quick) $(if $(FULL),--full) $(ARGS)

# The engine process around the model: benchmarks/engine.py says how QUICK=1 and ARGS change it. Needs root.
bench-engine: $(VENV)/.installed
	@$(BIN)/python -m benchmarks.engine $(if $(QUICK),--quick) $(ARGS)

# From process start to READY, the first requests, hot sets and chaos: benchmarks/coldstart.py says how
# QUICK=1 and ARGS change it. Needs root; a picture needs matplotlib (the extra `bench`).
bench-coldstart: $(VENV)/.installed
	@$(BIN)/python -m benchmarks.coldstart $(if $(QUICK),--quick) $(ARGS)

# What routing costs beyond the experts: benchmarks/routing.py says how QUICK=1 and ARGS change it. A
# picture needs matplotlib (the extra `bench`).
bench-routing: $(VENV)/.installed
	@$(BIN)/python -m benchmarks.routing $(if $(QUICK),--quick) $(ARGS)

# Stubs of 1.76 run under every newer grpcio and protobuf 6 or 7.
proto: $(VENV)/.installed-dev
	$(BIN)/python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. --grpc_python_out=. \
	    $(addprefix moe_server/,$(PROTOS))

# The stubs that are checked in are the ones the .proto files give; buf finds them sound.
proto-check: $(VENV)/.installed-dev $(BUF)
	rm -rf build/proto && mkdir -p build/proto
	$(BIN)/python -m grpc_tools.protoc -I . --python_out=build/proto --pyi_out=build/proto \
	    --grpc_python_out=build/proto $(addprefix moe_server/,$(PROTOS))
	diff -r --exclude=*.proto --exclude=__pycache__ build/proto/moe_server/proto/moe_server proto/moe_server
	cd proto && ../$(BUF) lint && ../$(BUF) format --diff --exit-code

# With a prefix: npm would otherwise install into whatever package surrounds this checkout.
$(BUF):
	npm install --prefix build/buf --no-save --no-package-lock --silent @bufbuild/buf@1

$(VENV)/.installed: setup.py constraints.txt $(wildcard kernels/cpu/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "moe-server needs Python 3.11 or newer; set PYTHON=...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) \
	    || { echo "No venv module: install python3-venv, or set VENV to an environment of yours."; exit 1; }
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .[dev]
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info kernels/_cpu.* .pytest_cache .mypy_cache .ruff_cache
