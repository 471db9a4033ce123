"""Model folders: loading, saving, adapters, quantized weights, what they are pinned to."""
