#!/bin/bash
# The command chains of Merak's guide (tools/README.md): Megatron-DeepSpeed to Merak, Merak to Merak in other degrees and with
# a custom partition, Merak to transformers, transformers to Merak. Without DS_PATH a tiny GPT-2 of 12 layers is made first.
# Set the variables here or in the environment.

OUT=${OUT:-}          # the folder to make everything in
DS_PATH=${DS_PATH:-}  # a Megatron-DeepSpeed checkpoint, as in …/checkpoint/global_step97500
CUSTOM_PARTITION=${CUSTOM_PARTITION:-0,3,7,11,15}  # for 12 layers at pp 4
WORKERS=${WORKERS:-2}

if [ -z "$OUT" ]; then
    echo "$0: set OUT, here or in the environment" >&2
    exit 2
fi

set -e
OUT=$(realpath -m "$OUT")
DS_PATH=${DS_PATH:+$(realpath -m "$DS_PATH")}
PYTHON=${PYTHON:-python3}
cd "$(dirname "$0")/.."
if [ -z "$DS_PATH" ]; then
    "$PYTHON" examples/tiny_gpt2.py "$OUT/tiny"
    DS_PATH=$OUT/tiny/deepspeed/global_step3
fi
merak() { "$PYTHON" convert/convert_merak_gpt2_checkpoint.py --workers "$WORKERS" "$@"; }

echo "1. Megatron-DeepSpeed to Merak"
"$PYTHON" convert/deepspeed_to_transformers.py --merak_tp 2 --merak_pp 4 --input_folder "$DS_PATH" \
    --output_folder "$OUT/ds_to_merak" --workers "$WORKERS"

echo "2. Merak to Merak"
merak --merak_tp 4 --merak_pp 4 --load_path "$OUT/ds_to_merak/release" --save_path "$OUT/merak_to_merak" --convert_type merak

echo "2.1. Merak to Merak by custom partition"
merak --merak_tp 4 --merak_pp 4 --load_path "$OUT/ds_to_merak/release" --save_path "$OUT/merak_custom" \
    --partition_method custom --custom_partition "$CUSTOM_PARTITION" --convert_type merak

echo "3. Merak to transformers"
merak --load_path "$OUT/merak_custom/release" --save_path "$OUT/merak_to_transformers" --convert_type transformers

echo "4. Transformers to Merak"
merak --merak_tp 4 --merak_pp 4 --load_path "$OUT/merak_to_transformers/pytorch_model.bin" \
    --json_path "$OUT/merak_to_transformers/config.json" --save_path "$OUT/transformers_to_merak" \
    --convert_type transformers_to_merak
