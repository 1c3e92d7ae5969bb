# make demo   the whole of LUMOS on eight of the 34 tasks, on two CPU cores, in 15 minutes;
#             SEED=1 DEMO=runs/demo1 for another seed
# make test   the tests
# make ablations   Table I: seven methods, three seeds each; four of them in the published world model
# make gpu    whether a GPU computes what the CPU does, and how fast: results/gpu_NAME.json
# make chaos   kills, damaged inputs, two processes at once: is anything lost, or wrong in silence?
# make robot-test   those of the real robot, with a simulated arm
# All set up a local virtual environment in .venv first, when it is missing or out of date.

PYTHON ?= python3
BIN := .venv/bin
PROCS ?= 2

# The real robot's optional packages, and a simulated arm.
ROBOT := franky-control==2.0.0 franky-sim==1.0.4 opencv-python-headless==5.0.0.93 pyrealsense2==2.59.1.11053

.PHONY: demo test chaos ablations gpu robot robot-test clean
.DELETE_ON_ERROR:

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

test: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -q -rs tests

chaos: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python tests/chaos.py

robot: .venv/ready
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint requirements.txt $(ROBOT)

# The real robot's tests, against a simulated arm, which is driven for a minute in real time: on an idle machine.
robot-test: robot
	LUMOS_ROBOT_SECONDS=$${LUMOS_ROBOT_SECONDS:-60} $(BIN)/python -m pytest -q -s -rs tests/test_robot.py tests/test_deploy.py

SEED ?= 0
DEMO ?= runs/demo
DEMO_TASKS := open_drawer close_drawer move_slider_left move_slider_right turn_on_lightbulb turn_off_lightbulb \
	turn_on_led turn_off_led

# Every step resumes or is skipped when it was done, so an interrupted demo can be started again.
demo: .venv/ready
	@echo "Five steps, 15 minutes on two cores: record 21,000 frames of play (2 minutes), pack them, train the world model (6)"
	@echo "and the agent in it (5), try 20 chains of instructions (1). It learns the eight tasks that move the table's own"
	@echo "parts; blocks lie in the way. All 34 take hours: README, Install and run."
	@! test -d $(DEMO)/data || echo "The play in $(DEMO)/data is used again; for new play give another DEMO."
	test -d $(DEMO)/data || $(BIN)/python teleop.py record $(DEMO)/play --frames 20000 --val-frames 1000 --skip 2 \
		--procs $(PROCS) --seed $(SEED) --tasks $(DEMO_TASKS)
	test -d $(DEMO)/data || $(BIN)/python data.py pack $(DEMO)/play $(DEMO)/data --procs $(PROCS)
	$(BIN)/python train.py --stage wm --preset sim --steps 1000 --seed $(SEED) --data $(DEMO)/data --out $(DEMO)
	$(BIN)/python train.py --stage agent --preset sim --steps 1500 --seed $(SEED) --data $(DEMO)/data --out $(DEMO)
	$(BIN)/python evaluate.py --env sim --checkpoint $(DEMO)/agent.pt --tasks $(DEMO_TASKS) --chains 20 --procs $(PROCS) \
		--film 1 --out $(DEMO)/evaluation
	@echo; echo "Worth a look:"
	@ls $(DEMO)/report.html $(DEMO)/pictures/prediction_0001000.png $(DEMO)/evaluation/*.gif $(DEMO)/evaluation/report.html

# All methods and seeds share data/play; LUMOS and its ablations practise in the published world model, as long as those of
# docs/results.md, "34 tasks". This, too, goes on where it was.
ablations: .venv/ready
	test -d data/play || { echo "First play in data/play: README, Install and run."; exit 1; }
	mkdir -p runs/ablations
	set -e; for seed in 0 1 2; do for method in lumos no_ditto no_latent_plan no_alignment gcbc mcil hulc; do \
		run=runs/$${method}_$$seed; file=$$method; stage="--stage $$method"; \
		case $$method in lumos|no_*) file=agent; stage="--stage agent --method $$method --wm assets/sim.pt --steps 12000";; esac; \
		$(BIN)/python train.py $$stage --preset sim --seed $$seed --data data/play --out $$run; \
		$(BIN)/python evaluate.py --checkpoint $$run/$$file.pt --chains 200 --procs $(PROCS) --out $$run/evaluation; \
		cp $$run/evaluation/results.json runs/ablations/$${method}_seed$$seed.json; \
	done; done
	$(BIN)/python evaluate.py --table runs/ablations/*.json

# Where there is a GPU but no PyBullet, carry runs/gpu_play there and run the last line.
GPU := runs/gpu_play
gpu: .venv/ready $(GPU)
	$(BIN)/python tests/gpu.py

$(GPU): | .venv/ready
	$(BIN)/python teleop.py record $(GPU)_recording --frames 1400 --val-frames 400 --skip 2 --procs $(PROCS) --seed 0
	$(BIN)/python data.py pack $(GPU)_recording $(GPU) --procs $(PROCS)
	rm -rf $(GPU)_recording

clean:
	rm -rf .venv runs/demo
