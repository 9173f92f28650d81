"""GPT-2 as Merak has it: transformers' names behind the number of the pipeline module,
`module.{M}.`.

A single tensor-parallel rank holds transformers' own Conv1D weights, [in, out]; of several, each
holds Linear's, [out, in], under names with `col_linear` or `row_linear`, and of c_attn the rows [q;
k; v] of its own heads.

Sources: Merak d72efe5 (tools/convert_merak_gpt2_checkpoint.py; Merak/modules/layer_proxy.py).
"""

from parammap.families.hugging_face import GPT2
from parammap.tensors.arrangement import REPLICATED, SHARD_0, SHARD_1, STACKED_QKV

#: of one tensor-parallel rank
WHOLE = GPT2
#: of several
CUT = {
    **GPT2,
    "layers.{i}.attention.qkv.{w}": (STACKED_QKV, "h.{i}.attn.c_attn.col_linear.{w}"),
    "layers.{i}.attention.out.weight": (SHARD_1, "h.{i}.attn.c_proj.row_linear.weight"),
    "layers.{i}.attention.out.bias": (REPLICATED, "h.{i}.attn.c_proj.row_linear.bias"),
    "layers.{i}.mlp.fc1.{w}": (SHARD_0, "h.{i}.mlp.c_fc.col_linear.{w}"),
    "layers.{i}.mlp.fc2.weight": (SHARD_1, "h.{i}.mlp.c_proj.row_linear.weight"),
    "layers.{i}.mlp.fc2.bias": (REPLICATED, "h.{i}.mlp.c_proj.row_linear.bias"),
}
