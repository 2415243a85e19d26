"""Many instances as one service."""
