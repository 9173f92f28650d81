#!/bin/bash
# Merge a Yuan-2.0 checkpoint along its pipeline, over fewer stages (or other ones).
# Set the variables here or in the environment; further flags may follow on the command line
# (python convert/repartition.py --help).

LOAD_CHECKPOINT_PATH=${LOAD_CHECKPOINT_PATH:-}  # the checkpoint to read
SAVE_CHECKPOINT_PATH=${SAVE_CHECKPOINT_PATH:-}  # the folder to make
TOKENIZER_MODEL=${TOKENIZER_MODEL:-}            # not needed: no model is built
TARGET_PP=${TARGET_PP:-1}  # pipeline stages of the output
TARGET_PP_BLOCKS=${TARGET_PP_BLOCKS:-}  # layers of each, as 10,32; empty: even
TENSOR_GENERATE_LAYER=${TENSOR_GENERATE_LAYER:-}  # the tensor-parallel ranks to write, as 0,1,2; empty: all

FLAGS=(--target-pipeline-model-parallel-size "$TARGET_PP"
       ${TARGET_PP_BLOCKS:+--target-pipeline-model-parallel-blocks "$TARGET_PP_BLOCKS"}
       ${TENSOR_GENERATE_LAYER:+--tensor-generate-layer "$TENSOR_GENERATE_LAYER"})
. "$(dirname "$0")/partitions.sh"
