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

if [ -z "$LOAD_CHECKPOINT_PATH" ] || [ -z "$SAVE_CHECKPOINT_PATH" ]; then
    echo "$0: set LOAD_CHECKPOINT_PATH and SAVE_CHECKPOINT_PATH, here or in the environment" >&2
    exit 2
fi

exec "${PYTHON:-python3}" "$(dirname "$0")/../convert/repartition.py" \
    --load "$LOAD_CHECKPOINT_PATH" \
    --save "$SAVE_CHECKPOINT_PATH" \
    --tensor-model-parallel-size 1 \
    --pipeline-model-parallel-size 32 \
    --pipeline-model-parallel-blocks 2,2,2,2,2,2,2,2,2,2,3,3,3,3,3,3,3,3,3,3,3,3,3,3,3,3,3,3,3,3,2,2 \
    --num-layers 84 --hidden-size 8192 --num-attention-heads 64 \
    --target-tensor-model-parallel-size "$TARGET_TP" \
    --target-pipeline-model-parallel-size "$TARGET_PP" \
    ${TARGET_PP_BLOCKS:+--target-pipeline-model-parallel-blocks "$TARGET_PP_BLOCKS"} \
    "$@"
