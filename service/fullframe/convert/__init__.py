"""Model files made and remade: any classifier to the contract, metadata, int8 copies. Torch for its sources only."""
