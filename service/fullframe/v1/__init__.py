"""The generated messages and stubs of proto/fullframe/v1."""
