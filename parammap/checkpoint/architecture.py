"""What a checkpoint's model computes: so that another framework can be told, or refused where it
cannot."""

from __future__ import annotations

from parammap.families import BLOOM, GPT2, LLAMA, MIXTURE, OPT, YUAN, Architecture

__all__ = ["BLOOM", "GPT2", "LLAMA", "MIXTURE", "OPT", "YUAN", "Architecture"]
