# Every command below is one a person can type: `source .venv/bin/activate` first, then the lines as printed.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup setup-robosuite smoke example demo demo-full robots nano-base test test-wheel check fix bench clean
# One stage after another: the stages share the machine's cores, and the clock below means something.
.NOTPARALLEL:

export PATH := $(CURDIR)/.venv/bin:$(PATH)
# Two OpenMP threads that wait for each other collapse when anything else runs (docs/decisions.md): one per process.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

WORKERS ?= 2
START := $(shell date +%s)
comma := ,
# $(call stage,what,how long)
stage = @printf '\n=== %s  [about %s; %d s so far]\n' "$(1)" "$(2)" "$$(( $$(date +%s) - $(START) ))"
total = @s=$$(( $$(date +%s) - $(START) )); printf '\n=== %s: %d min %d s in all\n' "$(1)" $$(( s / 60 )) $$(( s % 60 ))

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

setup:  ## the environment in .venv, and Debian packages for rendering; quick when nothing changed
	@bash .ci/setup

setup-robosuite: setup  ## robosuite (Panda and UR5e lifting) in .venv-robosuite: it needs another numpy
	@bash .ci/setup-robosuite

demo: setup  ## the main job: record, train on two robots, evaluate with controls, report; then LoRA on 25 demonstrations
	$(call stage,Recording 3600 tabletop demonstrations,30 s to 2 min)
	vla data record --suite tabletop --episodes 3600 --seed 0 --out data/tabletop
	$(call stage,Recording 100 Meta-World demonstrations,20 s to 1 min)
	vla data record --suite metaworld --task button-press-topdown-v3 --episodes 100 --seed 0 --out data/metaworld
	$(call stage,Training one policy on both robots,8 min)
	vla train configs/train/demo.yaml --resume
	$(call stage,Tabletop: 200 fresh scenes per verb with matched controls,3 min)
	vla eval runs/demo --suite tabletop --episodes 200 --seed 900000 --out runs/demo/eval/tabletop.json
	$(call stage,Meta-World: 50 fresh scenes with matched controls,3 min)
	vla eval runs/demo --suite metaworld --task button-press-topdown-v3 --episodes 50 --seed 900000 --out runs/demo/eval/metaworld.json
	$(call stage,The report,10 s)
	vla report runs/demo
	$(call stage,25 demonstrations of a task that nano-base never saw,10 s)
	vla data record --suite tabletop --task lift --episodes 25 --seed 0 --out data/lift
	$(call stage,LoRA from models/nano-base on those 25,1 min)
	vla train configs/train/lora.yaml --resume
	$(call stage,Lifting in 100 fresh scenes,30 s)
	vla eval runs/lora --suite tabletop --task lift --episodes 100 --seed 900000 --out runs/lora/eval/tabletop.json
	vla report runs/lora
	$(call total,make demo)

FULL_TASKS := button-press-topdown-v3 dial-turn-v3 door-lock-v3 door-unlock-v3 handle-pull-v3 door-open-v3
demo-full: setup  ## six Meta-World tasks in one policy, with the curve over training (about 30 min)
	$(call stage,Recording 600 demonstrations of six Meta-World tasks,3 min)
	vla data record --suite metaworld $(FULL_TASKS:%=--task %) --episodes 600 --seed 0 --out data/metaworld-full
	$(call stage,Training one policy on all of them,16 min)
	vla train configs/train/demo_full.yaml --resume
	$(call stage,The curve over training: every checkpoint on validation scenes,4 min)
	vla eval runs/demo-full --suite metaworld $(FULL_TASKS:%=--task %) --episodes 20 --curve
	$(call stage,50 fresh scenes per task with matched controls,6 min)
	vla eval runs/demo-full --suite metaworld $(FULL_TASKS:%=--task %) --episodes 50 --seed 900000 --out runs/demo-full/eval/metaworld.json
	$(call stage,The report,10 s)
	vla report runs/demo-full
	$(call total,make demo-full)

BASE_TASKS := button-press-topdown door-lock door-unlock door-open dial-turn drawer-open drawer-close window-open window-close \
  button-press plate-slide faucet-open faucet-close handle-press coffee-button door-close
nano-base: setup setup-robosuite  ## pretrains models/nano-base again, into runs/nano-base (about 30 min)
	$(call stage,Recording four robots,12 min)
	vla data record --suite tabletop --task touch push --episodes 4000 --seed 0 --out data/base-tabletop
	vla data record --suite tabletop --task touch --episodes 4000 --seed 100000 --out data/base-touch
	vla data record --suite metaworld $(BASE_TASKS:%=--task %-v3) --episodes 960 --seed 0 --out data/base-metaworld
	vla data record --suite fetch --task reach push --episodes 240 --seed 0 --out data/base-fetch
	vla data record --suite robosuite-panda --episodes 150 --seed 0 --out data/base-panda
	vla data questions --task touch push --scenes 4000 --out data/base-questions
	$(call stage,Pretraining,15 min)
	vla train configs/train/nano_base_words.yaml --resume
	vla train configs/train/nano_base.yaml --resume
	$(call total,make nano-base)

ROBOTS := metaworld fetch aloha robosuite-panda robosuite-ur5e
robots: setup setup-robosuite  ## five robots in one policy, and each alone with as many samples (about 70 min)
	$(call stage,Recording 150 demonstrations of each robot,8 min)
	for r in $(ROBOTS); do vla data record --suite $$r --episodes 150 --seed 0 --out data/$$r; done
	vla data mixture configs/train/robots.yaml
	$(call stage,Training one policy on all of them,25 min)
	vla train configs/train/robots.yaml --resume
	$(call stage,Training each alone,25 min)
	for r in $(ROBOTS); do vla train train/robots "mixture.datasets=[{path: data/$$r}]" run.steps=1500 run.out=runs/alone-$$r --resume; done
	$(call stage,100 fresh scenes of each robot with both,10 min)
	for r in $(ROBOTS); do for run in robots alone-$$r; do \
	  vla eval runs/$$run --suite $$r --episodes 100 --seed 900000 --out runs/$$run/eval/$$r.json; done; done
	$(call total,make robots)

smoke: setup  ## the whole path of the demo, tiny: does it run here? (under 3 minutes; learns nothing)
	rm -rf data/smoke-tabletop data/smoke-metaworld runs/smoke runs/smoke-distill runs/smoke-distill-teacher runs/smoke-export
	$(call stage,Recording a handful of demonstrations in both simulators,30 s)
	vla data record --suite tabletop --episodes 20 --seed 0 --out data/smoke-tabletop
	vla data record --suite metaworld --task button-press-topdown-v3 --episodes 3 --seed 0 --out data/smoke-metaworld
	$(call stage,Training for a few steps,40 s)
	vla train configs/smoke/train.yaml
	$(call stage,Evaluating a few episodes,60 s)
	vla eval runs/smoke --suite tabletop --episodes 2 --seed 900000 --out runs/smoke/eval/tabletop.json
	vla eval runs/smoke --suite metaworld --task button-press-topdown-v3 --episodes 2 --seed 900000 --out runs/smoke/eval/metaworld.json
	$(call stage,The report,5 s)
	vla report runs/smoke
	$(call stage,A student distilled$(comma) exported$(comma) and run without torch,60 s)
	vla distill configs/smoke/distill.yaml
	vla export runs/smoke-distill --to onnx --int8 --windows 16 --rounds 5 --out runs/smoke-export
	vla-edge run runs/smoke-export --sim tabletop --episodes 2
	$(call total,make smoke)

example: setup  ## the README's fine-tuning of a foreign model, as printed there, on small random weights (a few minutes; learns nothing)
	rm -rf data/example runs/example runs/example-merged runs/small-smolvlm runs/hub
	$(call stage,A SmolVLM of the real architecture and 20 demonstrations,30 s)
	python benchmarks/small_smolvlm.py --out runs/small-smolvlm
	vla data record --suite tabletop --episodes 20 --seed 0 --out data/example
	$(call stage,LoRA for a few steps and then for a few more,60 s)
	accelerate launch --num_processes 1 -m vla.train configs/smoke/smolvlm_lora.yaml
	accelerate launch --num_processes 1 -m vla.train configs/smoke/smolvlm_lora.yaml run.steps=10 --resume --allow-change run.steps
	$(call stage,Merged and pushed to a folder in place of the Hub,30 s)
	vla merge runs/example --out runs/example-merged
	vla push runs/example-merged you/smolvlm-tabletop --hub runs/hub --license apache-2.0
	$(call stage,Pulled by its name and evaluated,30 s)
	HF_HUB_OFFLINE=1 HF_HUB_CACHE=runs/hub vla eval you/smolvlm-tabletop --suite tabletop --episodes 2 --conditions policy,blank
	$(call total,make example)

test: setup  ## the tests (pytest); PYTEST="-k mixture" to choose, WORKERS=8 on a larger machine
	python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST)

test-wheel: setup  ## builds the wheel and runs the tests against it, outside this checkout
	bash .ci/test-wheel $(PYTEST)

check: setup  ## lint, types, import contracts
	ruff check .
	pyright
	lint-imports --no-logo

fix: setup  ## what ruff can mend by itself
	ruff check --fix .

bench: setup  ## every benchmarks/bench_*.py on this machine
	@found=0; for script in benchmarks/bench_*.py; do [ -e "$$script" ] || continue; found=1; echo "== $$script"; python "$$script"; done; \
	[ $$found = 1 ] || { echo "no benchmarks/bench_*.py"; exit 2; }

clean:  ## removes smoke data, runs and caches; never data/ or runs/ of your own
	rm -rf data/smoke-tabletop data/smoke-metaworld runs/smoke runs/smoke-distill runs/smoke-distill-teacher \
	  runs/smoke-export data/example runs/example runs/example-merged runs/small-smolvlm \
	  runs/hub .cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist
