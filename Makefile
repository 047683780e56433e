# make demo            sets everything up and runs the main job on the recordings that come with the project
# make demo AUDIO=x.wav  transcribes a file of yours (or a folder) instead
# make test            sets everything up and passes the tests
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || echo 2)
export TOKENIZERS_PARALLELISM := false
# Tests run in so many processes of one thread each; a file's tests stay together, as they share what is dear to make.
JOBS ?= $(shell (nproc 2>/dev/null || echo 2) | awk '{print ($$1 < 4) ? $$1 : 4}')
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

# KenLM is compiled from source: where there is no compiler its tests are skipped, and say so.
$(VENV)/.ngram: $(VENV)/.ready
	-$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[ngram]' || echo "KenLM cannot be built here (cmake, g++): its tests are skipped"
	@touch $@

.PHONY: demo test test-core lint bench clean

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed: make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[gguf,plots,dev]'
	@touch $@

demo: $(VENV)/.ready
ifdef AUDIO
	$(BIN)/duolect transcribe "$(AUDIO)"
else
	$(BIN)/duolect compare --out out/demo --overwrite
endif

test: $(VENV)/.ngram lint
	$(PYTEST)

test-core: $(VENV)/.ngram
	$(PYTEST) -m "not slow"

lint: $(VENV)/.ready
	$(BIN)/ruff check src tests bench demo
	$(BIN)/ruff format --check src tests bench demo
	$(BIN)/pyright

bench: $(VENV)/.ready
	for name in ctc_prefix rescoring ctc_beam train; do OMP_NUM_THREADS=1 $(BIN)/python bench/$$name.py || exit 1; done

clean:
	rm -rf $(VENV) out build dist
