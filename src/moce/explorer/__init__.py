"""The explorer in the browser: a map of images, what a run makes of them, and a page that shows it."""
