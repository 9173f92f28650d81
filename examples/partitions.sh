# What the scripts that end in _partitions.sh have in common: convert/repartition.py with their FLAGS. Not to be called.

if [ -z "$LOAD_CHECKPOINT_PATH" ] || [ -z "$SAVE_CHECKPOINT_PATH" ]; then
    echo "$0: set LOAD_CHECKPOINT_PATH and SAVE_CHECKPOINT_PATH, here or in the environment" >&2
    exit 2
fi

exec "${PYTHON:-python3}" "$(dirname "$0")/../convert/repartition.py" \
    --load "$LOAD_CHECKPOINT_PATH" --save "$SAVE_CHECKPOINT_PATH" "${FLAGS[@]}" "$@"
