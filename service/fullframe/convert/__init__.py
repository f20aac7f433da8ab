"""Models' files made and remade: any classifier to the contract, metadata, int8 copies. torch only for sources in PyTorch."""
