"""File formats: one module and one record each (see format.py), which registry.py lists. A format
knows bytes and nothing of models.

Reading touches headers only and says where each tensor's bytes lie; a frame says, before a single
byte is written, which bytes an output file consists of (see frames.py). A folder of torch_dist and
MessagePack's trees are no files of tensors: their modules stand alone."""
