# Two commands: `make demo` and `make test`. They need Python 3.11; what else they need goes into virtual environments
# outside the clone (HARDFIRST_CACHE, else ~/.cache/hardfirst), made once and shared by all clones.

MAKEFLAGS += --no-print-directory
RUN := scripts/py
WITH_LABEL_STUDIO := python="$$(scripts/setup.sh label-studio)" && HARDFIRST_LABEL_STUDIO_PYTHON="$$python"

.PHONY: help demo up newcomer test check lint bench screenshots label-studio-screenshots lock python

help:
	@echo "make demo    the whole loop on generated images, with a Label Studio and scripted annotators"
	@echo "make up      hardfirst itself, for your Label Studio"
	@echo "make test    everything that is tested: lint, types, real servers, browser, the demo"
	@echo "make check   lint, types and the fast tests, in under two minutes"
	@echo "make newcomer   follow the README from a clean clone, and fail where it is wrong (ARGS=--help)"
	@echo "make bench   the benchmarks"
	@echo "make screenshots   the README's pictures, of a generated project"
	@echo "make label-studio-screenshots   those of docs/label-studio.md: a Label Studio, one round"
	@echo "make lock    compile requirements.lock anew"
	@echo "make python  print the interpreter that has our packages"

demo:
	@$(WITH_LABEL_STUDIO) $(RUN) -m backend.cli demo

up:
	@$(RUN) -m backend.cli up

newcomer:
	@$(RUN) -m scripts.newcomer $(ARGS)

test: lint
	@scripts/chromium.sh
	@$(WITH_LABEL_STUDIO) $(RUN) -m pytest

check: lint
	@$(RUN) -m pytest -m "not slow and not e2e"

lint:
	@$(RUN) -m ruff check .
	@$(RUN) -m mypy

bench:
	@$(RUN) -m benchmarks

screenshots:
	@scripts/chromium.sh
	@$(RUN) -m scripts.screenshots

label-studio-screenshots:
	@scripts/chromium.sh
	@$(WITH_LABEL_STUDIO) $(RUN) -m scripts.label_studio_screenshots

lock:
	@scripts/lock.sh

python:
	@scripts/setup.sh ours
