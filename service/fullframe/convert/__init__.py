"""Models' files made and remade: their metadata, int8 copies. Needs the onnx package, never torch."""
