"""Which bytes of the source become which bytes of each output file. No tensor data is read."""
