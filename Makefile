# Bulkhead's commands. Each is thin: set-up is engine/setup.py, everything else is `python -m cli` in .venv.
# `make help` lists them. Variables: ENV="prod dev" (all if empty), POLICY_PACK (default: policies),
# POLICY_CONFIG (default: policy-config.json beside the pack, if it is there), ARGS.

SHELL := /bin/sh
SETUP := engine/bootstrap.sh
PYTHON := .venv/bin/python
CLI := $(PYTHON) -m cli
ENV ?=
ARGS ?=
HOST ?=
DEPLOYER ?= deploy
KEY ?=

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup bootstrap up preview report drift down verify prove firewall backup restore drill refresh-dev prune recover bucket plan doctor pulumi test test-slow test-engine \
	mutate lint lint-workflows format \
	bench bench-interference bench-backup diagram engine-start engine-stop clean

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## Install what is missing: Python environment, Pulumi, Docker engine, base image
	@$(SETUP) up

bootstrap: ## Prepare a bare Debian server to deploy to: make bootstrap HOST=ssh://root@server (DEPLOYER=, KEY=)
	@$(SETUP) plan
	@$(CLI) bootstrap "$(HOST)" --deployer "$(DEPLOYER)" $(if $(KEY),--key "$(KEY)")

up: setup ## Deploy host and environments, as far as they differ: make up ENV=dev
	@$(CLI) up $(ENV)

preview: ## Show what would change, through the policies; changes nothing
	@$(SETUP) preview
	@$(CLI) preview $(ENV)

report: ## Every verdict of the policies, in .bulkhead/report: text, JSON, JUnit, SARIF; changes nothing
	@$(SETUP) preview
	@$(CLI) report $(ENV) $(ARGS)

drift: ## Compare the state with the engine; fails on any difference
	@$(SETUP) preview
	@$(CLI) preview --drift $(ENV)

down: ## Destroy; asks for a protected environment's name (or BULKHEAD_CONFIRM=prod), keeps its volumes
	@$(SETUP) preview
	@$(CLI) down $(ENV)

verify: ## Compare what was declared with what the host really has; fails on any difference
	@$(SETUP) plan
	@$(CLI) verify

prove: ## Try every way between environments and to the host; fails if one is open: make prove ENV=dev
	@$(SETUP) plan
	@$(CLI) prove $(ENV) $(ARGS)

firewall: ## What the firewall has dropped, rule by rule
	@$(SETUP) plan
	@$(CLI) firewall

bucket: ## Make or check a backup target's bucket: make bucket ENV=prod ARGS='--target offsite' (--policies)
	@$(SETUP) preview
	@$(CLI) bucket $(ENV) $(ARGS)

backup: ## Back up now: make backup ENV=prod SERVICE=db; ARGS=--list shows what there is
	@$(SETUP) plan
	@$(CLI) backup $(ENV) $(if $(SERVICE),--service "$(SERVICE)") $(ARGS)

restore: ## Bring a backup back, checked: make restore ENV=prod SERVICE=db AT="2026-11-25 14:00:05" YES=1 (or TO=volume)
	@$(SETUP) plan
	@$(CLI) restore $(ENV) $(if $(SERVICE),--service "$(SERVICE)") $(if $(AT),--at "$(AT)") $(if $(TO),--to "$(TO)") \
		$(if $(TARGET),--target "$(TARGET)") $(if $(YES),--yes) $(if $(LOSE_NEWER),--lose-newer) \
		$(if $(RELEASE),--release "$(RELEASE)") $(ARGS)

refresh-dev: ## A masked copy of prod's data for dev, from the newest backup: make refresh-dev YES=1 (ENV=, SERVICE=)
	@$(SETUP) plan
	@$(CLI) refresh-dev $(ENV) $(if $(SERVICE),--service "$(SERVICE)") $(if $(YES),--yes)

prune: ## Let go of a bucket's old snapshots, with the pruner's AWS_… credentials: make prune ENV=prod ARGS='--target offsite'
	@$(SETUP) preview
	@$(CLI) prune $(ENV) $(ARGS)

recover: setup ## Bring a lost host back, on a fresh machine: make recover FROM=/srv/backup
	@$(CLI) recover $(if $(FROM),--from "$(FROM)") $(if $(ENV),--environment "$(ENV)")

drill: ## Restore the newest backups, check them, throw them away: make drill ENV=prod
	@$(SETUP) plan
	@$(CLI) drill $(ENV) $(if $(SERVICE),--service "$(SERVICE)") $(ARGS)

plan: ## The ledger as a table: capacity, promised, free
	@$(SETUP) plan
	@$(CLI) plan

doctor: ## What is there and what is not, line by line; installs nothing
	@if test -x $(PYTHON) && $(PYTHON) -c 'import typer, rich, docker, pydantic, yaml' 2>/dev/null; \
	then $(CLI) doctor $(ARGS); else $(SETUP) check; fi

pulumi: ## Pulumi itself in this project: make pulumi ARGS='stack output --stack prod'
	@$(SETUP) preview
	@$(CLI) pulumi $(ARGS)

diagram: ## A picture of the deployed environments, networks and budgets: make diagram ARGS=picture.svg
	@$(SETUP) diagram
	@$(CLI) diagram $(ARGS)

test: lint test-engine ## All tests: unit, policies, end to end on the real engine and on a virtual server
	@$(SETUP) test
	@$(PYTHON) -m tests.vm
	@$(PYTHON) -m pytest tests -m "not interference and not slow" --numprocesses=2 --dist=loadscope --no-loadscope-reorder $(ARGS)

test-slow: ## What make test leaves out: the benchmarks, the loss of a whole host, what dev reaches of the world
	@$(SETUP) test
	@$(PYTHON) -m pytest tests -m "interference or slow" $(ARGS)

test-engine: ## Vet and test the Go parts of the engine
	@$(SETUP) test
	@$(PYTHON) engine/build.py --check

mutate: ## Change the rules step by step; fails on a change no fixture notices: make mutate ARGS='--module reach'
	@$(SETUP) test
	@$(PYTHON) -m tests.mutation $(ARGS)

lint: ## Style, types and the direction of imports
	@$(SETUP) lint
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m mypy .
	@.venv/bin/lint-imports
	@$(MAKE) --no-print-directory lint-workflows

lint-workflows: ## Check .github/workflows with actionlint, where Go is there to run it
	@if command -v go >/dev/null; then go run github.com/rhysd/actionlint/cmd/actionlint@v1.7.12; \
	else echo "no Go here: workflows not checked by actionlint"; fi

format: ## Rewrite the code in the house style
	@$(SETUP) lint
	@$(PYTHON) -m ruff format .
	@$(PYTHON) -m ruff check --fix .

policy-docs: ## Write docs/policies.md and the schema of policy configs from the rules
	@$(SETUP) test
	@$(PYTHON) -m tests.policies.document

bench: setup ## Deploys as ratios to plain Pulumi and Compose, previews at 10, 100, 400 containers
	@$(PYTHON) -m tests.bench $(ARGS)

bench-interference: ## What dev's misbehaviour costs prod, and what dev gets: 5 minutes, or ARGS=--full; loads the machine
	@$(SETUP) test
	@$(PYTHON) -m bench.interference $(ARGS)

bench-backup: ## What a backup costs prod's clients, and its speed beside pg_basebackup and restic alone: half an hour
	@$(SETUP) test
	@$(PYTHON) -m bench.backup $(ARGS)

engine-start: ## Start a Docker engine if none answers
	@$(SETUP) engine-start

engine-stop: ## Stop the Docker engine that set-up started by hand, and no other; containers go on
	@$(SETUP) engine-stop

clean: ## Remove what set-up made in the checkout (not the state, not what is deployed)
	rm -rf .venv .bulkhead *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
