# `make` alone lists the targets; the text after ## is what it prints.

PREFIX ?= /usr/local
DESTDIR ?=
PYTHON := .venv/bin/python
PYTEST := $(PYTHON) -m pytest --numprocesses=auto --maxprocesses=4 --dist=loadfile --no-loadscope-reorder
export PATH := $(PATH):/usr/sbin:/sbin

.DEFAULT_GOAL := help
.PHONY: help setup setup-demo setup-install setup-bench setup-xfstests xfstests demo test nightly conformance lint bench install uninstall clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1	\2/p' $(MAKEFILE_LIST) | expand -t 20

demo: setup-demo  ## run a real container on this snapshotter and leave nothing behind (root)
	@$(PYTHON) -m tests.demo

test: setup lint  ## lint, then all tests but the nightly ones (root)
	@$(PYTEST)

setup:  ## install what is missing: Debian packages, and .venv with the project (root)
	@deploy/setup.sh test

setup-demo:
	@deploy/setup.sh demo

setup-install:
	@deploy/setup.sh install

setup-bench:
	@deploy/setup.sh bench

setup-xfstests:
	@deploy/setup.sh xfstests

nightly: setup  ## the tests again, with larger numbers (root)
	@$(PYTEST) --nightly

conformance: setup  ## containerd's own snapshotter test suite (root)
	@$(PYTHON) -m pytest tests/conformance

xfstests: setup-xfstests  ## xfstests' overlay group with our fsck.overlay (root; XFSTESTS=DIR, where it is built)
	@$(PYTHON) -m tests.xfstests $(XFSTESTS)

lint: setup  ## style, types, and the order of imports
	@.venv/bin/ruff check --quiet .
	@.venv/bin/ruff format --check --quiet .
	@.venv/bin/mypy --no-error-summary
	@mkdir -p .cache
	@.venv/bin/lint-imports >.cache/lint-imports.log || { cat .cache/lint-imports.log; exit 1; }

bench: setup-bench  ## measure; prints ratios (root)
	@for file in bench/[a-z]*.py; do $(PYTHON) -m bench.$$(basename $$file .py) || exit 1; done

install: setup-install  ## install the daemon, snapctl and fsck.overlay on this host (PREFIX=/usr/local, DESTDIR=)
	@PREFIX='$(PREFIX)' DESTDIR='$(DESTDIR)' deploy/install.sh install

uninstall:  ## remove what install put there; configuration and data stay
	@PREFIX='$(PREFIX)' DESTDIR='$(DESTDIR)' deploy/install.sh uninstall

clean:  ## remove .venv and everything else that can be made again
	rm -rf .venv .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist
	rm -f snapshotter/api/*_pb2.py snapshotter/api/*_pb2.pyi snapshotter/api/*_pb2_grpc.py
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
