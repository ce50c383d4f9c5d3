"""The layers that can be sparse: their weights as matrices, their geometry, and which of them feed each other."""
