"""MindSpore, as MindSpeed-Core-MS lays its checkpoints out."""
