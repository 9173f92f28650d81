"""What a checkpoint is, from headers and sidecars: the facts as a plain dict, and as text, JSON and
a picture."""
