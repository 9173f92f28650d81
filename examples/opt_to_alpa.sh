#!/bin/bash
# OPT from metaseq's files to the folder that Alpa's llm_serving reads, in one step: the raw parts and shards, resharded
# parts, or a singleton, with or without FSDP's metadata inside; float16 as llm_serving has it.
# Set the variables here or in the environment; further flags may follow on the command line
# (python -m parammap convert --help).

OPT_PATH=${OPT_PATH:-}    # the folder with checkpoint_last-model_part-*-shard*.pt or reshard-model_part-*.pt, or a prefix
ALPA_PATH=${ALPA_PATH:-}  # the folder to make, as in ~/opt_weights/175B_np
METADATA_FROM=${METADATA_FROM:-}  # for flat files that lost their metadata: the checkpoint they were made from
WORKERS=${WORKERS:-2}

if [ -z "$OPT_PATH" ] || [ -z "$ALPA_PATH" ]; then
    echo "$0: set OPT_PATH and ALPA_PATH, here or in the environment" >&2
    exit 2
fi

OPT_PATH=$(realpath -m "$OPT_PATH")
ALPA_PATH=$(realpath -m "$ALPA_PATH")
METADATA_FROM=${METADATA_FROM:+$(realpath -m "$METADATA_FROM")}
cd "$(dirname "$0")/.." || exit 2
exec "${PYTHON:-python3}" -m parammap convert "$OPT_PATH" "$ALPA_PATH" --to alpa --workers "$WORKERS" \
    ${METADATA_FROM:+--metadata-from "$METADATA_FROM"} "$@"
