"""Images to pooled answers, without any transport."""
