# What ckpt_partitions_51B.sh and ckpt_partitions_102B.sh have in common: the layout that was published, checked. Not to be
# called.

FLAGS=(--tensor-model-parallel-size 1 --pipeline-model-parallel-size "$STAGES"
       --pipeline-model-parallel-blocks "$STAGE_LAYERS"
       --num-layers "$LAYERS" --hidden-size 8192 --num-attention-heads 64
       --target-tensor-model-parallel-size "$TARGET_TP" --target-pipeline-model-parallel-size "$TARGET_PP"
       ${TARGET_PP_BLOCKS:+--target-pipeline-model-parallel-blocks "$TARGET_PP_BLOCKS"})
. "$(dirname "$0")/partitions.sh"
