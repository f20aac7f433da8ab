"""What a served model is: the one-file contract, its geometry, the repository, the bundled default."""
