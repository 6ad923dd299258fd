"""Stage 3: which experts a task gets, and the dense backbone made of them."""
