"""Build-time halves of the targets: how a region's program becomes code."""
