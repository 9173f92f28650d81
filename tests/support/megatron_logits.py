"""What real megatron-core computes of a checkpoint: `python tests/support/megatron_logits.py
RELEASE SAVE TOKENS.npy OUT.npy`.

One process per rank builds the model by the checkpoint's own arguments, loads its file strictly,
and the last stage writes the logits of TOKENS, int64 [batch, sequence], to OUT: float32 [batch,
sequence, padded vocabulary]."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
#: what the arguments of the checkpoint need not say, as the model that is built here has it
UNSAID = {
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "sequence_parallel": False,
    "rope_scaling_factor": 8.0,
    "moe_shared_expert_intermediate_size": None,
    "use_rope_scaling": False,
    "bias_gelu_fusion": False,
    "rotary_base": 10000,
    "transformer_impl": "local",
    "multi_latent_attention": False,
    "context_parallel_size": 1,
    "moe_use_legacy_grouped_gemm": False,
}


def run(release: str, save: Path, tokens: np.ndarray, scratch: Path) -> np.ndarray:
    """The logits. Raises AssertionError with the process's last words where it fails."""
    np.save(scratch / "tokens.npy", tokens)
    command = [
        sys.executable,
        "-W",
        "ignore",
        __file__,
        release,
        save,
        scratch / "tokens.npy",
        scratch / "logits.npy",
    ]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return np.load(scratch / "logits.npy")


def _main(release: str, save: str, tokens: str, out: str) -> None:
    sys.path.insert(0, str(ROOT))
    from examples import cpu_shim
    from examples.cpu_shim import transformer_engine
    from examples.fetch_core import fetch_core
    from examples.train_tiny import needs_transformer_engine

    core = fetch_core(release)
    sys.path.insert(0, str(core))
    cpu_shim.install(transformer_engine=needs_transformer_engine(core))
    import torch

    tracked = (Path(save) / "latest_checkpointed_iteration.txt").read_text()
    folder = Path(save) / (f"iter_{int(tracked):07}" if tracked.isdigit() else tracked)
    args = torch.load(next(folder.glob("mp_rank_*/model_optim_rng.pt")), weights_only=False)["args"]
    args = argparse.Namespace(**{**UNSAID, **vars(args)})
    if args.transformer_impl == "transformer_engine":
        transformer_engine.install()
    cpu_shim.patch_megatron()
    with tempfile.TemporaryDirectory() as scratch:
        torch.multiprocessing.start_processes(
            _rank,
            (args, folder, np.load(tokens), Path(out), Path(scratch) / "store"),
            args.tensor_model_parallel_size * args.pipeline_model_parallel_size,
            start_method="fork",
        )


def _rank(
    rank: int, args: argparse.Namespace, folder: Path, tokens: np.ndarray, out: Path, store: Path
) -> None:
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.enums import ModelType
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from examples.tiny import model

    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(tp * pp), LOCAL_WORLD_SIZE=str(tp * pp)
    )
    dist.init_process_group("nccl", init_method=f"file://{store}", rank=rank, world_size=tp * pp)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp
    )
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    config = model.transformer_config(args)
    config.kv_channels = args.kv_channels
    config.add_qkv_bias = args.add_qkv_bias
    config.bias_activation_fusion = args.bias_gelu_fusion
    chunk = GPTModel(
        config=config,
        transformer_layer_spec=model.layer_spec(args),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        position_embedding_type=args.position_embedding_type,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        **model.known(
            GPTModel.__init__,
            rotary_base=args.rotary_base,
            rope_scaling=args.use_rope_scaling,
            rope_scaling_factor=args.rope_scaling_factor,
        ),
    ).eval()
    chunk.model_type = ModelType.encoder_or_decoder
    name = f"mp_rank_{rank % tp:02}" + (f"_{rank // tp:03}" if pp > 1 else "")
    chunk.load_state_dict(
        torch.load(folder / name / "model_optim_rng.pt", weights_only=False)["model"], strict=True
    )

    def forward(data, chunk):
        batch = next(data)
        length = batch.shape[1]
        mask = torch.triu(torch.ones(length, length), 1).bool()[None, None]
        positions = torch.arange(length)[None].expand(batch.shape[0], -1).contiguous()
        output = chunk(batch, positions, mask)
        return output, lambda output: (output.sum(), {"logits": gathered(output)})

    def gathered(output):
        return tensor_parallel.gather_from_tensor_model_parallel_region(output).float().numpy()

    with torch.no_grad():
        done = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iter([torch.from_numpy(tokens)]),
            model=chunk,
            num_microbatches=1,
            seq_length=tokens.shape[1],
            micro_batch_size=tokens.shape[0],
            decoder_seq_length=tokens.shape[1],
            forward_only=True,
        )
    if done and rank % tp == 0:
        np.save(out, done[0]["logits"])
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    _main(*sys.argv[1:])
