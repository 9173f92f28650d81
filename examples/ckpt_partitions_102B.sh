#!/bin/bash
# Yuan-2.0 102B as it was published (32 pipeline stages, 84 layers) to 8 tensor-parallel ranks and one stage, in one step.
# Set the variables here or in the environment; further flags may follow on the command line
# (python convert/repartition.py --help).

LOAD_CHECKPOINT_PATH=${LOAD_CHECKPOINT_PATH:-}  # the checkpoint to read
SAVE_CHECKPOINT_PATH=${SAVE_CHECKPOINT_PATH:-}  # the folder to make
TOKENIZER_MODEL=${TOKENIZER_MODEL:-}            # not needed: no model is built
TARGET_TP=${TARGET_TP:-8}  # tensor-parallel ranks of the output
TARGET_PP=${TARGET_PP:-1}  # pipeline stages of the output
TARGET_PP_BLOCKS=${TARGET_PP_BLOCKS:-}  # layers of each, as 10,32; empty: even

STAGES=32 STAGE_LAYERS=2,2,2,2,2,2,2,2,2,2,3,3,3,3,3,3,3,3,3,3,3,3,3,3,3,3,3,3,3,3,2,2 LAYERS=84  # of the checkpoint as it was published
. "$(dirname "$0")/published_partitions.sh"
