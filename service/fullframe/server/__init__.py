"""Transport only: RPCs, health, limits, metrics, lifecycle; nothing here knows how a model runs."""
