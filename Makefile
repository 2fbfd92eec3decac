# make demo    train DMNN and RNP on the embedded data and compare them with the static net of the same cost
# make test    the test suite          make check   format, lint, types, tests
# make cifar10 the experiments of the README; DATA: an .npz or the folder into which CIFAR-10 is downloaded
# make cifar10_long  RNR and its static controls for 28 to 61 epochs, DMNN for 12: 15 rows of 10 to 110 minutes on one core
# make cifar10_gpu   ResNet-20 and ResNet-56 for 160 epochs and more, three seeds (a GPU)
# make budget  one net for any budget against a net for each
# make ablation  DMNN's table 4 on the embedded data, 3 seeds: 12 runs of about 3 minutes on one core
# make weight  how much DMNN's resource loss weighs, on the embedded data
# make wide    RNR, DMNN and a static net wide enough for skipping to save time: three rows of 25 to 60 minutes on one core
# make bench   how fast skipping and training are on this machine
# make pruned  filter pruning beside them (Torch-Pruning)   make shapes  is cost spent by difficulty?
# make cifar100_small     DMNN and its controls, ResNet-20 on CIFAR-100: 13 rows of 8 to 55 minutes on one core
# make cifar100_longer    three of these rows for 15 epochs instead of 6: 20 to 50 minutes each on one core
# make cifar100_from_dense  four rows started from its dense net, 10 epochs more: 15 to 40 minutes each on one core
# make cifar100_width32   DMNN, ConvNet-AIG and their controls on a net of twice the width, from its dense net: rows of 15 to 35 minutes
# make cifar100_resnet50  DMNN's CIFAR-100 table (a GPU)      make cifar100_ablation  its table 4 there (a GPU)
# make conv4   RNP's net of four convolutions against narrower ones      make cifar100   RNP's VGG-16 recipe (a GPU)
PYTHON ?= python3
BIN := .venv/bin
DEMO := runs/demo
DATA ?= data
CIFAR10 := dense given given16 static_25 static_40 static_60 static_80 slimmable cascade_25_100 widths rnr multipath dmnn dmnn_flops rnp
CIFAR10_LONG := static28_25 static28_40 static28_60 static56_60 cascade28 rnr28 rnr56 rnr36x4 rnr28_40 rnr_40 rnr_50 rnr_60 rnr_80 rnr61_80 dmnn_any

ABLATION := dmnn_none dmnn_previous dmnn_category dmnn_both
CONV4 := start rnp rnp_joint rnp_paper_02 rnp_paper_05 rnp_paper_10 rnp_paper_20 vanilla_17 vanilla_23 vanilla_37 vanilla_61 vanilla_78 vanilla_100 cascade
BUDGET := dense static_40 static_60 static_80 widths rnp_any rnp_any4 rnp_40 rnp_60 rnp_60x4 rnp_80 dmnn_any dmnn_any4 dmnn_40 dmnn_60 dmnn_60x4 dmnn_80
SHAPES := dense widths rnr
WEIGHTS := 0.5 2 8
CIFAR100 := baseline widths rnp vanilla_9 vanilla_13 vanilla_26 vanilla_39 vanilla_55 vanilla_77
CIFAR10_GPU := dense static_25 static_40 static_60 dense16 cascade widths rnr
CIFAR100_SMALL := dense static_25 static_50 static_60 static_70 static_paths aig_50 aig_60 aig_70 dmnn_50 dmnn_60 dmnn_70 cascade
CIFAR100_LONGER := dense static_70 dmnn_70
CIFAR100_FROM_DENSE := dense static_70 dmnn_70 dmnn_70_budget
WIDE := rnr64 dmnn64 static64_50
EPOCHS ?= 60
CATS_OVER_SHIPS := --hard 3,5 --easy 1,8
TRAINED := run,backbone,target,batch,flops_ratio,over_eager,over_best,ideal_share,router_share,other_classes,torch

.PHONY: demo test lint check format slow coverage ablation weight budget cifar10 cifar10_long cifar10_gpu conv4 wide cifar100 \
  table clean shapes pruned bench cifar100_small cifar100_longer cifar100_from_dense cifar100_width32 cifar100_resnet50 \
  cifar100_ablation

.venv/ready: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[dev]'
	@touch $@

demo: .venv/ready
	@rm -rf $(DEMO)
	$(BIN)/dynroute train router.name=static router.width=0.49 backbone.parts=16 router.epochs=6 --out $(DEMO)/static
	$(BIN)/dynroute train router.name=dmnn router.epochs=7 --out $(DEMO)/dmnn
	$(BIN)/dynroute train -c experiments/shapes/rnp.yaml --out $(DEMO)/rnp
	$(BIN)/dynroute eval $(DEMO)/static
	$(BIN)/dynroute eval $(DEMO)/dmnn --flops-target 0.5
	$(BIN)/dynroute eval $(DEMO)/rnp --flops-target 0.5
	$(BIN)/dynroute compare $(DEMO)/static $(DEMO)/dmnn $(DEMO)/rnp --out $(DEMO)/comparison

test: .venv/ready
	$(BIN)/python -m pytest -n 2 -m 'not slow'

slow: .venv/ready
	$(BIN)/python -m pytest -m slow

coverage: .venv/ready
	$(BIN)/python -m pytest -n 2 -m 'not slow' --cov --cov-report=term --cov-fail-under=90

lint: .venv/ready
	$(BIN)/ruff format --check src tests experiments benchmarks
	$(BIN)/ruff check src tests experiments benchmarks
	$(BIN)/mypy

check: lint test

format: .venv/ready
	$(BIN)/ruff format src tests experiments benchmarks
	$(BIN)/ruff check --fix src tests experiments benchmarks

# $(call published,run,folder,name): the rows of a run, and which images they have right, for intervals over the same images.
published = mkdir -p $(2)/right && cp $(1)/eval.csv $(2)/$(3).csv && cp $(1)/right.csv $(2)/right/$(3).csv

# $(call rows,folder,names,targets,words): train with these words, evaluate and keep the CSV of each. A run resumes where it was
# stopped; a finished one is only evaluated again. Routed runs are evaluated at the targets, beside their own routes shuffled;
# one trained for a single budget at that, one for a single charge as it is, the slimmable net at its widths; what others start
# from is no row.
define rows
@for name in $(2); do \
  $(BIN)/dynroute train -c experiments/$(1)/$$name.yaml $(if $(filter shapes,$(1)),,data.path=$(DATA)) $(4) \
    --out runs/$(1)/$$name --resume && \
  case $$name in \
    widths|start|given16) continue ;; \
    rnp_paper*) $(BIN)/dynroute eval runs/$(1)/$$name --controls ;; \
    rnr*_*) $(BIN)/dynroute eval runs/$(1)/$$name --flops-target 0.$${name##*_} --controls || test $$? -eq 3 ;; \
    rn*|dmnn*|aig*|multipath|cascade*) \
      $(BIN)/dynroute eval runs/$(1)/$$name $(foreach t,$(3),--flops-target $(t)) --controls || test $$? -eq 3 ;; \
    slimmable) $(BIN)/dynroute eval runs/$(1)/$$name $(foreach t,0.25 0.5 0.75 1,--flops-target $(t)) || test $$? -eq 3 ;; \
    *) $(BIN)/dynroute eval runs/$(1)/$$name ;; \
  esac && \
  $(call published,runs/$(1)/$$name,experiments/results/$(1),$$name) || exit 1; \
done
endef

cifar10: .venv/ready
	$(call rows,cifar10,$(CIFAR10),0.4 0.5 0.6 0.8)
	$(BIN)/python experiments/easy_is_cheap.py runs/cifar10/rnr runs/cifar10/given $(CATS_OVER_SHIPS) --out experiments/results/cifar10_easy.csv
	@$(MAKE) table

# RNR for longer, for any budget and for each, from `widths` of cifar10, and static nets trained as long by the same teacher.
cifar10_long: .venv/ready
	$(call rows,cifar10,given given16 widths)
	$(call rows,cifar10_long,$(CIFAR10_LONG),0.4 0.5 0.6 0.8)
	$(BIN)/python experiments/easy_is_cheap.py runs/cifar10_long/rnr28 runs/cifar10/given $(CATS_OVER_SHIPS) \
	  --out experiments/results/cifar10_long_easy.csv
	$(BIN)/python experiments/easy_is_cheap.py runs/cifar10_long/rnr36x4 runs/cifar10/given $(CATS_OVER_SHIPS) \
	  --out experiments/results/cifar10_x4_easy.csv
	$(BIN)/python experiments/easy_is_cheap.py runs/cifar10_long/rnr56 runs/cifar10/given $(CATS_OVER_SHIPS) \
	  --out experiments/results/cifar10_long56_easy.csv
	@$(MAKE) table

# ResNet-20 and ResNet-56 for long, three seeds: each row resumes where it was stopped. It needs a GPU.
cifar10_gpu: .venv/ready
	@for seed in 0 1 2; do for net in resnet20 resnet56; do for row in $(CIFAR10_GPU); do \
	  at=runs/cifar10_gpu/$$net && run=$${net}_$$row-s$$seed && from=dense && \
	  case $$row in \
	    dense) words= ;; \
	    dense16) words="backbone.weights=$${at}_dense-s$$seed" ;; \
	    cascade) words="backbone.nets=[$${at}_static_25-s$$seed,$${at}_dense16-s$$seed]" ;; \
	    *) if [ $$row = rnr ]; then from=widths; fi; \
	       words="backbone.weights=$${at}_$$from-s$$seed optim.teacher=$${at}_dense-s$$seed" ;; \
	  esac && \
	  $(BIN)/dynroute train -c experiments/cifar10_gpu/$$row.yaml data.path=$(DATA) backbone.name=$$net seed=$$seed \
	    name=$${net}_$$row $$words --out runs/cifar10_gpu/$$run --resume && \
	  case $$row in \
	    widths|dense16) continue ;; \
	    rnr|cascade) $(BIN)/dynroute eval runs/cifar10_gpu/$$run $(foreach t,0.376 0.4 0.47 0.5 0.6 0.8,--flops-target $(t)) --controls \
	      || test $$? -eq 3 ;; \
	    *) $(BIN)/dynroute eval runs/cifar10_gpu/$$run ;; \
	  esac && \
	  $(call published,runs/cifar10_gpu/$$run,experiments/results/cifar10_gpu,$$run) || exit 1; \
	done; done; done
	$(BIN)/dynroute compare experiments/results/cifar10_gpu --out experiments/results/cifar10_gpu_comparison

# Each row as trained and, at one cost for all, by the dial at 0.7; a run resumes where it was stopped.
ablation: .venv/ready
	@for name in $(ABLATION); do \
	  $(BIN)/dynroute train -c experiments/ablation/$$name.yaml --seeds 0,1,2 --out runs/ablation/$$name --resume && \
	  for run in $$name-s0 $$name-s1 $$name-s2; do \
	    $(BIN)/dynroute eval runs/ablation/$$run --controls && \
	    { $(BIN)/dynroute eval runs/ablation/$$run --flops-target 0.7 --controls || test $$? -eq 3; } && \
	    $(call published,runs/ablation/$$run,experiments/results/ablation,$$run) || exit 1; \
	  done || exit 1; \
	done
	$(BIN)/dynroute compare experiments/results/ablation --out experiments/results/ablation_comparison

# How much the resource loss of DMNN weighs: each as trained and, at one cost for all, by the dial at 0.7.
weight: .venv/ready
	@for weight in $(WEIGHTS); do \
	  run=weight_$$weight && \
	  $(BIN)/dynroute train -c experiments/ablation/dmnn_both.yaml name=$$run router.resource_weight=$$weight \
	    --out runs/weight/$$run --resume && \
	  $(BIN)/dynroute eval runs/weight/$$run --controls && \
	  { $(BIN)/dynroute eval runs/weight/$$run --flops-target 0.7 --controls || test $$? -eq 3; } && \
	  $(call published,runs/weight/$$run,experiments/results/weight,$$run) || exit 1; \
	done
	@$(MAKE) table

conv4: .venv/ready
	$(call rows,conv4,$(CONV4),0.18 0.23 0.37 0.61 0.78 1)
	$(call rows,conv4_long,vanilla60_17)

wide: .venv/ready
	$(call rows,wide,$(WIDE),0.5)
	$(BIN)/python benchmarks/trained.py runs/wide/rnr64 runs/wide/dmnn64 --flops-target 0.5
	@$(MAKE) table

# Do easy images cost less, where the difficulty of each is known?
shapes: .venv/ready
	$(call rows,shapes,$(SHAPES),0.4 0.5 0.6)
	$(BIN)/python experiments/easy_is_cheap.py runs/shapes/rnr runs/shapes/dense --out experiments/results/shapes_easy.csv

# The given dense net, its filters pruned by a library to three shares, fine-tuned for as long as the static rows of cifar10; so
# too the net of conv4, for as long as RNP's CNN there.
pruned: .venv/ready
	$(BIN)/python -m pip install -q --disable-pip-version-check -e '.[controls]'
	$(BIN)/dynroute train -c experiments/cifar10/given.yaml data.path=$(DATA) --out runs/cifar10/given --resume
	$(BIN)/python experiments/prune.py runs/cifar10/given $(foreach s,0.4 0.6 0.8,--share $(s)) --by l1 --by taylor --by group \
	  --epochs 8 --out runs/cifar10/pruned --resume
	@for run in runs/cifar10/pruned/prune_*; do $(call published,$$run,experiments/results/cifar10,$${run##*/}) || exit 1; done
	$(call rows,conv4,start)
	$(BIN)/python experiments/prune.py runs/conv4/start $(foreach s,0.23 0.37 0.61,--share $(s)) --by l1 --by taylor --by group \
	  --epochs 7 --out runs/conv4_pruned --resume
	@for run in runs/conv4_pruned/prune_*; do $(call published,$$run,experiments/results/conv4,$${run##*/}) || exit 1; done
	@$(MAKE) table

cifar100: .venv/ready
	$(call rows,cifar100,$(CIFAR100),0.13 0.26 0.39 0.55 0.77)

budget: .venv/ready
	$(call rows,budget,$(BUDGET),0.3 0.4 0.5 0.6 0.7 0.8 0.9)
	$(BIN)/python experiments/budget_curves.py

# How fast skipping and training are on this machine, and the tables of docs/performance.md and docs/dmnn_training.md (ONNX
# Runtime: pip install -e '.[export]').
bench: .venv/ready
	$(BIN)/python benchmarks/skipping.py
	$(BIN)/python benchmarks/dmnn_step.py
	$(BIN)/python benchmarks/agent_step.py
	$(BIN)/python experiments/readme_table.py docs/performance.md benchmarks/results/skipping.csv skipping
	$(BIN)/python experiments/readme_table.py docs/dmnn_training.md benchmarks/results/dmnn_step.csv dmnn_step

cifar100_small: .venv/ready
	$(call rows,cifar100/small,$(CIFAR100_SMALL),0.5 0.6 0.7)

# Does DMNN only learn more slowly?
cifar100_longer: .venv/ready
	$(call rows,cifar100/longer,$(CIFAR100_LONGER),0.7)
	@$(MAKE) table

# And started from a dense net instead of from chance?
cifar100_from_dense: .venv/ready
	$(call rows,cifar100/longer,dense)
	$(call rows,cifar100/from_dense,$(CIFAR100_FROM_DENSE),0.7)
	@$(MAKE) table

# On a net of twice the width, whose halves of blocks are wide enough to be worth switching; gated nets at the target they had.
cifar100_width32: .venv/ready
	$(call rows,cifar100/width32,start dense static_25 static_50 static_70 cascade rnr,0.5 0.6 0.7)
	$(call rows,cifar100/width32,dmnn_50 aig_50,0.5)
	$(call rows,cifar100/width32,dmnn_60 aig_60,0.6)
	$(call rows,cifar100/width32,dmnn_70 aig_70,0.7)
	@$(MAKE) table

# The table at its trained points, stopped and resumed as you like, row by row and epoch by epoch. Sized for 30 minutes of one
# H200 at EPOCHS=60: 4 rows x 60 epochs x 45,000 images, 21 PFLOP; estimated (not measured) at 15,000 images/s for the dense
# net and 6,000 for DMNN's, whose small kernels are bound by their launch: 3 + 3 x 7.5 minutes. The paper's schedule is
# EPOCHS=200, estimated at 85 minutes; the two steps of the rate lie at a half and three quarters of either.
cifar100_resnet50: .venv/ready
	$(call rows,cifar100/resnet50,dense dmnn_t0.7 dmnn_t0.6 dmnn_t0.5,,router.epochs=$(EPOCHS))

cifar100_ablation: .venv/ready
	$(call rows,cifar100/ablation,dmnn_none dmnn_previous dmnn_category,,router.epochs=$(EPOCHS))

# The tables of README.md and docs/results.md, from the CSVs.
table: .venv/ready
	$(BIN)/dynroute compare experiments/results/cifar10 --out experiments/results/comparison
	$(BIN)/python experiments/readme_table.py README.md experiments/results/comparison/table.md results rows
	$(BIN)/python experiments/readme_table.py docs/results.md experiments/results/comparison/table.md controls controls
	$(BIN)/dynroute compare experiments/results/cifar10_long experiments/results/cifar10/given.csv \
	  --out experiments/results/cifar10_long_comparison
	$(BIN)/python experiments/readme_table.py README.md experiments/results/cifar10_long_comparison/table.md long rows
	$(BIN)/python experiments/readme_table.py docs/results.md experiments/results/cifar10_long_comparison/table.md long_controls controls
	$(BIN)/dynroute compare experiments/results/conv4 --out experiments/results/conv4_comparison
	$(BIN)/python experiments/readme_table.py docs/results.md experiments/results/conv4_comparison/table.md
	$(BIN)/python experiments/readme_table.py docs/results.md experiments/results/cifar10_easy.csv easy
	$(BIN)/python experiments/readme_table.py docs/results.md experiments/results/cifar10_long_easy.csv easy_long
	$(BIN)/python experiments/readme_table.py docs/results.md experiments/results/cifar10_x4_easy.csv easy_x4
	$(BIN)/python experiments/readme_table.py docs/results.md experiments/results/cifar10_long56_easy.csv easy_56
	$(BIN)/python experiments/readme_table.py docs/results.md experiments/results/shapes_easy.csv easy_shapes
	$(BIN)/python experiments/readme_table.py docs/results.md experiments/results/enumeration.csv enumeration
	$(BIN)/python experiments/readme_table.py docs/results.md experiments/results/batchnorm.csv batchnorm
	$(BIN)/python experiments/budget_curves.py
	$(BIN)/python experiments/readme_table.py docs/results.md experiments/results/budget_comparison/budget.csv budget
	$(BIN)/dynroute compare experiments/results/ablation --out experiments/results/ablation_comparison
	$(BIN)/python experiments/readme_table.py docs/results.md experiments/results/ablation_comparison/table.md ablation
	$(BIN)/dynroute compare experiments/results/cifar100/small --out experiments/results/cifar100_comparison
	$(BIN)/python experiments/readme_table.py docs/results.md experiments/results/cifar100_comparison/table.md cifar100
	$(BIN)/dynroute compare experiments/results/wide --out experiments/results/wide_comparison
	$(BIN)/python experiments/readme_table.py docs/results.md experiments/results/wide_comparison/table.md wide
	$(BIN)/dynroute compare experiments/results/cifar100/longer --out experiments/results/cifar100_longer_comparison
	$(BIN)/python experiments/readme_table.py docs/results.md experiments/results/cifar100_longer_comparison/table.md cifar100_longer
	$(BIN)/dynroute compare experiments/results/cifar100/from_dense --out experiments/results/cifar100_from_dense_comparison
	$(BIN)/python experiments/readme_table.py docs/results.md experiments/results/cifar100_from_dense_comparison/table.md from_dense
	$(BIN)/dynroute compare experiments/results/cifar100/width32 --out experiments/results/cifar100_width32_comparison
	$(BIN)/python experiments/readme_table.py docs/results.md experiments/results/cifar100_width32_comparison/table.md width32
	$(BIN)/dynroute compare experiments/results/weight --out experiments/results/weight_comparison
	$(BIN)/python experiments/readme_table.py docs/results.md experiments/results/weight_comparison/table.md weight rows
	$(BIN)/python experiments/readme_table.py docs/performance.md benchmarks/results/skipping.csv skipping
	$(BIN)/python experiments/readme_table.py docs/performance.md benchmarks/results/latency_target.csv latency
	$(BIN)/python experiments/readme_table.py docs/performance.md benchmarks/results/agent_step.csv agent_step
	$(BIN)/python experiments/readme_table.py README.md benchmarks/results/trained.csv trained $(TRAINED)
	$(BIN)/python experiments/readme_table.py docs/dmnn_training.md benchmarks/results/dmnn_step.csv dmnn_step

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache dist build
