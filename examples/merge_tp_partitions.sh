#!/bin/bash
# Merge a Yuan-2.0 checkpoint along its tensors, over fewer tensor-parallel ranks.
# Set the variables here or in the environment; further flags may follow on the command line
# (python convert/repartition.py --help).

LOAD_CHECKPOINT_PATH=${LOAD_CHECKPOINT_PATH:-}  # the checkpoint to read
SAVE_CHECKPOINT_PATH=${SAVE_CHECKPOINT_PATH:-}  # the folder to make
TOKENIZER_MODEL=${TOKENIZER_MODEL:-}            # not needed: no model is built
TARGET_TP=${TARGET_TP:-1}  # tensor-parallel ranks of the output
PIPELINE_GENERATE_LAYER=${PIPELINE_GENERATE_LAYER:-}  # the pipeline stages to write, as 0,1,2; empty: all

FLAGS=(--target-tensor-model-parallel-size "$TARGET_TP"
       ${PIPELINE_GENERATE_LAYER:+--pipeline-generate-layer "$PIPELINE_GENERATE_LAYER"})
. "$(dirname "$0")/partitions.sh"
