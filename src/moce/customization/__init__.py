"""Stage 3: select experts for a task, and build a dense backbone from them."""
