"""One file per command: settings in, a folder and a small result out. Called by moce.NAME and the CLI."""
